"""Choosing the survivors of merge groups and moving them, in plain PyTorch on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_cascade.kernels.pages import Pages


@dataclass(frozen=True, slots=True)
class MergeBatch:
    """The merge groups of every request whose boundary runs in one wave.

    Args:
        groups: [num_groups, blocks_per_group] int64 block ids, oldest first.
        group_request: [num_groups] int64 index into `held`.
        held: Per request, [num_blocks] int64 block ids of all it holds, in logical order, every
            block full.
    """

    groups: torch.Tensor
    group_request: torch.Tensor
    held: list[torch.Tensor]


def rank(x: torch.Tensor) -> torch.Tensor:
    """For each element of the last dimension, how many are smaller, or equal and to its left.

    Args:
        x: [..., window] float32, oldest first. NaN is smaller than everything.

    Returns:
        [..., window] int64, a permutation of 0 .. window - 1 in every row.
    """
    x = x.clamp(min=torch.finfo(x.dtype).min).nan_to_num(nan=float("-inf"), posinf=float("inf"))
    return x.argsort(dim=-1, stable=True).argsort(dim=-1)


def select(
    score: torch.Tensor, distinctiveness: torch.Tensor | None, key_weight: float
) -> torch.Tensor:
    """Choose half of every window: the highest rank(score) + key_weight * rank(distinctiveness).

    Args:
        score: [..., window] float32, oldest first.
        distinctiveness: [..., window] float32, or None if it has no weight.
        key_weight: Weight of the second rank.

    Returns:
        [..., window / 2] int64 positions of the survivors in ascending order. A tie in the sum
        goes to the newer.
    """
    worth = rank(score).float()
    if distinctiveness is not None:
        worth += key_weight * rank(distinctiveness)
    half = score.shape[-1] // 2
    best = worth.argsort(dim=-1, stable=True)[..., half:]
    return best.sort(dim=-1).values


def unit_keys(key: torch.Tensor) -> torch.Tensor:
    """Keys scaled to length one, in float32; a zero key stays zero.

    Args:
        key: [..., head_size].

    Returns:
        [..., head_size] float32.
    """
    return torch.nn.functional.normalize(key.float(), dim=-1, eps=1e-30)


def merge_groups(
    pages: Pages, batch: MergeBatch, head_size: int, window: int, key_weight: float
) -> None:
    """Write the survivors of every group into the first half of the group's own blocks.

    Args:
        pages: The layer's pages.
        batch: Which blocks.
        head_size: Channels of a key.
        window: Neighbours of which half survive.
        key_weight: Weight of key distinctiveness; 0 leaves it out.
    """
    assert pages.score is not None
    blocks = batch.groups.shape[1]
    block_size, channels = pages.kv.shape[2:]
    tokens = blocks * block_size

    def lined_up(pool: torch.Tensor) -> torch.Tensor:
        """[num_groups, num_kv_heads, tokens, ...] of a pool's groups."""
        return pool[batch.groups].transpose(1, 2).flatten(2, 3)

    kv, score = lined_up(pages.kv), lined_up(pages.score)
    distinctiveness = None
    if key_weight:
        means = [unit_keys(pages.kv[ids][..., :head_size]).mean(dim=(0, 2)) for ids in batch.held]
        # [num_groups, num_kv_heads, head_size]
        mean = unit_keys(torch.stack(means))[batch.group_request]
        unit = unit_keys(kv[..., :head_size])
        distinctiveness = -(unit @ mean[..., None]).squeeze(-1)
        distinctiveness = distinctiveness.unflatten(-1, (-1, window))
    kept = select(score.unflatten(-1, (-1, window)), distinctiveness, key_weight)
    # [num_groups, num_kv_heads, tokens / 2] positions within the group
    kept = (kept + torch.arange(0, tokens, window)[:, None]).flatten(2)

    target = batch.groups[:, : blocks // 2]

    def put(pool: torch.Tensor, survivors: torch.Tensor) -> None:
        pool[target] = survivors.unflatten(2, (-1, block_size)).transpose(1, 2)

    put(pages.kv, kv.gather(2, kept[..., None].expand(-1, -1, -1, channels)))
    put(pages.score, score.gather(2, kept))
    if pages.token is not None:
        put(pages.token, lined_up(pages.token).gather(2, kept))
