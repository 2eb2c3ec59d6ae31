"""Reference of `kernels/merge/groups.py`: a row, a group and a KV head at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.selection import distinctiveness, rank


def held(pages: Any, merges: Any, row: int, head: int, part: slice) -> Tensor:
    """Some channels of all slots a row holds at the boundary: [num_keys, channels]."""
    block_size = pages.kv.shape[2]
    num_keys = int(merges.num_keys[row])
    blocks = merges.block_table[row, : -(-num_keys // block_size)].long()
    return pages.kv[blocks, head, :, part].flatten(0, 1)[:num_keys]


def group_distinctiveness(
    pages: Any,
    merges: Any,
    row: int,
    group: int,
    head: int,
    part: slice,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Minus the cosine of each of a group's vectors to the mean of the row's: [tokens].

    Args:
        part: The channels of a slot that are looked at: those of its key, or of its value.
    """
    vectors = held(pages, merges, row, head, part)
    blocks = merges.groups[row, group].long()
    own = pages.kv[blocks, head, :, part].flatten(0, 1)
    # The mean of the row's, then the cosine to it of the group's, which are among them.
    place = [
        int((merges.block_table[row].long() == block).nonzero()[0, 0]) for block in blocks.tolist()
    ]
    block_size = pages.kv.shape[2]
    at = torch.cat([torch.arange(p * block_size, (p + 1) * block_size) for p in place])
    assert torch.equal(vectors[at.to(vectors.device)].nan_to_num(), own.nan_to_num())
    return distinctiveness(vectors.to(dtype))[at.to(vectors.device)]


def survivors(terms: list[tuple[float, Tensor]], window: int) -> Tensor:
    """Which of a group's tokens survive: bool [tokens]. As the kernels, sums are of float32."""
    worth = None
    for weight, values in terms:
        values = values.clamp(min=torch.finfo(torch.float32).min)
        weighted = weight * rank(values.view(-1, window)).float()
        worth = weighted if worth is None else worth + weighted
    return (rank(worth) >= window // 2).flatten()


def merge_groups(
    pages: Any,
    merges: Any,
    head_size: int,
    window: int,
    weights: Any,
    scratch: Any = None,
    counters: Tensor | None = None,
) -> None:
    """Write the survivors of every group into the first half of its blocks, in place."""
    num_kv_heads, block_size = pages.kv.shape[1:3]
    todo = []
    for row, count in enumerate(merges.num_groups.tolist()):
        for group in range(count):
            blocks = merges.groups[row, group].long()
            for head in range(num_kv_heads):
                terms = []
                if weights.score:
                    terms.append((weights.score, pages.score[blocks, head].flatten()))
                for weight, part in (
                    (weights.key, slice(head_size)),
                    (weights.value, slice(head_size, None)),
                ):
                    if weight:
                        distinct = group_distinctiveness(pages, merges, row, group, head, part)
                        terms.append((weight, distinct))
                todo.append((blocks, head, survivors(terms, window)))
    for blocks, head, survives in todo:
        for pool in (pages.kv, pages.score, pages.token):
            if pool is not None:
                kept = pool[blocks, head].flatten(0, 1)[survives]
                half = blocks[: len(blocks) // 2]
                pool[half, head] = kept.unflatten(0, (-1, block_size))
        if counters is not None:
            counters += torch.tensor([1, len(survives) // 2], device=counters.device)
