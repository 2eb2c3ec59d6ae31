"""Chooses the survivors of merge groups and moves them, in plain PyTorch on a CPU.

Source: arXiv 2406.17808, where one of two neighbours survives a sub-cache by its score, and, for
distinctiveness, KeyDiff, arXiv 2504.15364. Here half of a window survives, by up to three ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.weights import MEAN_PERIOD, MEAN_RUN, Weights


@dataclass(frozen=True, slots=True)
class MergeBatch:
    """The merge groups of every request whose boundary runs in one wave.

    Args:
        groups: [num_groups, blocks_per_group] int64 block ids, oldest first.
        group_request: [num_groups] int64 index into `held`.
        held: For each request [num_blocks] int64 block ids of all that it holds, in logical order;
            every block is full.
    """

    groups: torch.Tensor
    group_request: torch.Tensor
    held: list[torch.Tensor]


def rank(x: torch.Tensor) -> torch.Tensor:
    """Count for each element of the last dimension those that are smaller, or equal and older.

    Args:
        x: [..., window] float32, oldest first. NaN is smaller than everything.

    Returns:
        [..., window] int64, a permutation of 0 .. window - 1 in every row.
    """
    x = x.clamp(min=torch.finfo(x.dtype).min).nan_to_num(nan=float("-inf"), posinf=float("inf"))
    return x.argsort(dim=-1, stable=True).argsort(dim=-1)


def select(terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """Choose half of every window: the highest sums of weighted ranks.

    Args:
        terms: What tokens are ranked by, at least one: a weight, and values [..., window] float32,
            oldest first.

    Returns:
        [..., window / 2] int64 positions of the survivors in ascending order. In a tie the newer
        token survives.
    """
    worth = sum(weight * rank(values).float() for weight, values in terms)
    half = worth.shape[-1] // 2
    best = worth.argsort(dim=-1, stable=True)[..., half:]
    return best.sort(dim=-1).values


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors to length one, in float32; a zero vector stays zero.

    Args:
        vectors: [..., head_size], any floating dtype.

    Returns:
        [..., head_size] float32; NaN where a vector is not finite.
    """
    return torch.nn.functional.normalize(vectors.float(), dim=-1, eps=1e-30)


def mean_direction(pool: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Return the direction of the mean of a request's unit keys or unit values.

    The mean is over the places that `kernels.weights` names.

    Args:
        pool: [num_blocks, num_kv_heads, block_size, head_size] keys or values; a vector that is not
            finite counts as zero.
        held: [num_blocks held] int64 block ids of all that the request holds, in logical order;
            every block is full.

    Returns:
        [num_kv_heads, head_size] float32.
    """
    block_size = pool.shape[2]
    place = torch.arange(len(held) * block_size)
    place = place[place % MEAN_PERIOD < MEAN_RUN]
    units = unit(pool[held[place // block_size], :, place % block_size])
    return unit(torch.where(units.isnan(), 0.0, units).mean(dim=0))


def merge_groups(
    pages: Pages, batch: MergeBatch, head_size: int, window: int, weights: Weights
) -> None:
    """Write the survivors of every group into the first half of the group's own blocks.

    Args:
        pages: The layer's pages; `kv` and, if there, `score` and `token` are moved.
        batch: Which blocks.
        head_size: Channels of a key.
        window: Neighbours of which half survive; divides the tokens of a group.
        weights: Weights of the ranks, at least one above 0.

    Raises:
        ValueError: If scores weigh something and pages have none.
    """
    blocks = batch.groups.shape[1]
    block_size, channels = pages.kv.shape[2:]
    tokens = blocks * block_size

    def lined_up(pool: torch.Tensor) -> torch.Tensor:
        """[num_groups, num_kv_heads, tokens, ...] of a pool's groups."""
        return pool[batch.groups].transpose(1, 2).flatten(2, 3)

    kv = lined_up(pages.kv)
    score = None if pages.score is None else lined_up(pages.score)
    # [num_groups, num_kv_heads, tokens] each
    terms = []
    if weights.score:
        if score is None:
            raise ValueError("a weight of scores needs pages with scores")
        terms.append((weights.score, score))
    for weight, part in (
        (weights.key, slice(head_size)),
        (weights.value, slice(head_size, None)),
    ):
        if weight:
            means = torch.stack([mean_direction(pages.kv[..., part], ids) for ids in batch.held])
            mean = means[batch.group_request]
            terms.append((weight, -(unit(kv[..., part]) @ mean[..., None]).squeeze(-1)))
    kept = select([(weight, x.unflatten(-1, (-1, window))) for weight, x in terms])
    # [num_groups, num_kv_heads, tokens / 2] positions within the group
    kept = (kept + torch.arange(0, tokens, window)[:, None]).flatten(2)

    target = batch.groups[:, : blocks // 2]

    def put(pool: torch.Tensor, survivors: torch.Tensor) -> None:
        pool[target] = survivors.unflatten(2, (-1, block_size)).transpose(1, 2)

    # PyTorch gathers no FP8 on a CPU.
    moved = kv.view(torch.uint8) if pages.is_fp8 else kv
    moved = moved.gather(2, kept[..., None].expand(-1, -1, -1, channels))
    put(pages.kv, moved.view(pages.kv.dtype))
    if score is not None:
        put(pages.score, score.gather(2, kept))
    if pages.token is not None:
        put(pages.token, lined_up(pages.token).gather(2, kept))
