"""Reference of `kernels/compaction.py`: a row, a group and a KV head at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.selection import distinctiveness, rank


def held_keys(pages: Any, merges: Any, row: int, head: int, head_size: int) -> Tensor:
    """All keys a row holds at the boundary: [num_keys, head_size], in the dtype of the pages."""
    block_size = pages.kv.shape[2]
    num_keys = int(merges.num_keys[row])
    blocks = merges.block_table[row, : -(-num_keys // block_size)].long()
    return pages.kv[blocks, head, :, :head_size].flatten(0, 1)[:num_keys]


def group_distinctiveness(
    pages: Any,
    merges: Any,
    row: int,
    group: int,
    head: int,
    head_size: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Minus the cosine of each of a group's keys to the mean of the row's unit keys: [tokens]."""
    keys = held_keys(pages, merges, row, head, head_size)
    blocks = merges.groups[row, group].long()
    own = pages.kv[blocks, head, :, :head_size].flatten(0, 1)
    # The mean of the row's keys, then the cosine to it of the group's, which are among them.
    place = [
        int((merges.block_table[row].long() == block).nonzero()[0, 0]) for block in blocks.tolist()
    ]
    block_size = pages.kv.shape[2]
    at = torch.cat([torch.arange(p * block_size, (p + 1) * block_size) for p in place])
    assert torch.equal(keys[at.to(keys.device)].nan_to_num(), own.nan_to_num())
    return distinctiveness(keys.to(dtype))[at.to(keys.device)]


def survivors(score: Tensor, distinct: Tensor | None, window: int, key_weight: float) -> Tensor:
    """Which of a group's tokens survive: bool [tokens]."""
    score = score.clamp(min=torch.finfo(torch.float32).min)
    worth = rank(score.view(-1, window)).float()
    if distinct is not None:
        worth = worth + key_weight * rank(distinct.view(-1, window))
    return (rank(worth) >= window // 2).flatten()


def merge_groups(
    pages: Any,
    merges: Any,
    head_size: int,
    window: int,
    key_weight: float,
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
                distinct = None
                if key_weight != 0:
                    distinct = group_distinctiveness(pages, merges, row, group, head, head_size)
                score = pages.score[blocks, head].flatten()
                todo.append((blocks, head, survivors(score, distinct, window, key_weight)))
    for blocks, head, survives in todo:
        for pool in (pages.kv, pages.score, pages.token):
            if pool is not None:
                kept = pool[blocks, head].flatten(0, 1)[survives]
                half = blocks[: len(blocks) // 2]
                pool[half, head] = kept.unflatten(0, (-1, block_size))
        if counters is not None:
            counters += torch.tensor([1, len(survives) // 2], device=counters.device)
