"""Which tokens of a merge group survive: device functions of the merge kernel.

Source: arXiv 2406.17808, where one of two neighbours survives a sub-cache by its score. Here half
of a window survives, by up to three ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SMALLEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _comparable(x):
    """Make values comparable: NaN becomes the lowest, -inf the lowest finite value."""
    return tl.where(x != x, float("-inf"), tl.where(x < _SMALLEST, _SMALLEST, x))


@triton.jit
def _load_score(score_ptr, groups_at, places, head, score_stride_block, BLOCK_SIZE: tl.constexpr):
    """Load the scores of tokens at some places in a group, made comparable."""
    blocks = tl.load(groups_at + places // BLOCK_SIZE).to(tl.int64)
    slots = head * BLOCK_SIZE + places % BLOCK_SIZE
    return _comparable(tl.load(score_ptr + blocks * score_stride_block + slots))


@triton.jit
def _count_below(x, places, others, other_places, WINDOW: tl.constexpr):
    """Count for each `x` the `others` of its window that are smaller, or equal and older.

    Args:
        x: [M] float32 values.
        places: [M] their places in the group, oldest first.
        others: [N] float32 values.
        other_places: [N] their places in the group.
        WINDOW: Tokens of a window.

    Returns:
        [M] int32.
    """
    # [len(x), len(others)]
    mine, other = x[:, None], others[None, :]
    place, other_place = places[:, None], other_places[None, :]
    below = (other < mine) | ((other == mine) & (other_place < place))
    below = below & (other_place // WINDOW == place // WINDOW)
    return tl.sum(below.to(tl.int32), 1)


@triton.jit
def store_worth(
    worth_at,
    score_ptr,
    key_at,
    value_at,
    groups_at,
    head,
    score_weight,
    key_weight,
    value_weight,
    score_stride_block,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    """Store the worth of each token of a group: the sum of its weighted ranks within its window.

    Args:
        worth_at: Pointer to [GROUP] float32, written.
        score_ptr: `Pages.score`, whose blocks lie `score_stride_block` elements apart; read if
            HAS_SCORE.
        key_at: Pointer to [GROUP] float32 distinctiveness of keys; read if HAS_KEY.
        value_at: Pointer to [GROUP] float32 distinctiveness of values; read if HAS_VALUE.
        groups_at: Pointer to the group's block ids, int32.
        head: KV head.
        score_weight: Weight of the score's rank; the next two are those of key and value.
        GROUP: Tokens of a group.
        WINDOW: Tokens of a window.
        TOKENS: Tokens compared with as many at a time.
        SPAN: Tokens that have all the neighbours of any of them: a window, or TOKENS where a
            window is smaller.
        HAS_SCORE: Whether scores are ranked.
        HAS_KEY: Whether keys are ranked.
        HAS_VALUE: Whether values are ranked.
    """
    for start in range(0, GROUP, TOKENS):
        places = start + tl.arange(0, TOKENS)
        score_rank = tl.zeros([TOKENS], tl.int32)
        key_rank = tl.zeros([TOKENS], tl.int32)
        value_rank = tl.zeros([TOKENS], tl.int32)
        if HAS_SCORE:
            score = _load_score(score_ptr, groups_at, places, head, score_stride_block, BLOCK_SIZE)
        if HAS_KEY:
            key = _comparable(tl.load(key_at + places))
        if HAS_VALUE:
            value = _comparable(tl.load(value_at + places))
        span = start // SPAN * SPAN
        for other_start in range(span, span + SPAN, TOKENS):
            others = other_start + tl.arange(0, TOKENS)
            if HAS_SCORE:
                other = _load_score(
                    score_ptr, groups_at, others, head, score_stride_block, BLOCK_SIZE
                )
                score_rank += _count_below(score, places, other, others, WINDOW)
            if HAS_KEY:
                other = _comparable(tl.load(key_at + others))
                key_rank += _count_below(key, places, other, others, WINDOW)
            if HAS_VALUE:
                other = _comparable(tl.load(value_at + others))
                value_rank += _count_below(value, places, other, others, WINDOW)
        worth = tl.zeros([TOKENS], tl.float32)
        if HAS_SCORE:
            worth += score_weight * score_rank.to(tl.float32)
        if HAS_KEY:
            worth += key_weight * key_rank.to(tl.float32)
        if HAS_VALUE:
            worth += value_weight * value_rank.to(tl.float32)
        tl.store(worth_at + places, worth)


@triton.jit
def store_sources(
    source_at,
    worth_at,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Store the survivors' places in a group, in order: the better half of every window.

    Args:
        source_at: Pointer to [GROUP / 2] int32, written.
        worth_at: Pointer to [GROUP] float32 from `store_worth`; the newer token wins a tie.
        GROUP: Tokens of a group.
        WINDOW: Tokens of a window.
        TOKENS: Tokens compared with as many at a time.
        SPAN: As in `store_worth`.
    """
    taken = 0
    for start in range(0, GROUP, TOKENS):
        places = start + tl.arange(0, TOKENS)
        worth = tl.load(worth_at + places)
        rank = tl.zeros([TOKENS], tl.int32)
        span = start // SPAN * SPAN
        for other_start in range(span, span + SPAN, TOKENS):
            others = other_start + tl.arange(0, TOKENS)
            rank += _count_below(worth, places, tl.load(worth_at + others), others, WINDOW)
        survives = (rank >= WINDOW // 2).to(tl.int32)
        target = taken + tl.cumsum(survives, 0) - survives
        tl.store(source_at + target, places, mask=survives > 0)
        taken += tl.sum(survives)
