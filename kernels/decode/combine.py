"""Second launch of paged decode: joins the splits of a row, and scores the row's keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.decode.launch_config import (
    Config,
    Scratch,
    Splits,
    count_teams,
    keys_per_split,
    last_of_team,
    tokens_together,
)
from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import load_sink
from vllm_cascade.kernels.segments import DecodeRows


@triton.jit
def _join(lse_ptr, active, sinks_ptr, member, SPLITS: tl.constexpr):
    """Return the log-sum-exp (base 2) of a query head over its splits and its sink.

    Args:
        lse_ptr: Pointer to the log-sum-exp, base 2, of the head's first split.
        active: Splits that the row has.
        sinks_ptr: Pointer to the sink of the KV head's first query head, or None.
        member: Which of the KV head's query heads.
        SPLITS: Most splits of a row, rounded up to a power of two.
    """
    split = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + split, mask=split < active, other=float("-inf"))
    top = tl.max(lse, axis=0)
    if sinks_ptr is None:
        norm = tl.sum(tl.exp2(lse - top), axis=0)
    else:
        sink = load_sink(sinks_ptr, member)
        top = tl.maximum(top, sink)
        norm = tl.sum(tl.exp2(lse - top), axis=0) + tl.exp2(sink - top)
    return top + tl.log2(norm)


@triton.jit(do_not_specialize=["max_splits"])
def _combine_kernel(
    output_ptr,
    score_ptr,
    counter_ptr,
    partial_ptr,
    lse_ptr,
    logits_ptr,
    rows_ptr,
    places_ptr,
    block_table_ptr,
    carry_ptr,
    weights_ptr,
    sinks_ptr,
    splits_ptr,
    power,
    output_stride_token,
    output_stride_head,
    score_stride_block,
    table_stride_row,
    logits_stride_head,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    TOKENS: tl.constexpr,
    DIRECT: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Join the splits of one query head, and score a piece of the row's keys.

    Grid: (KV heads, rows, pieces). Program p of a row and KV head writes the output of the KV
    head's query head p, if there is one, and updates the scores of the p-th part of the row's keys.
    Programs of a row at place -1 return.

    Args:
        output_ptr: [tokens, query heads, HEAD_SIZE], written.
        score_ptr: `Pages.score`, whose blocks lie `score_stride_block` elements apart; None where
            scores are not kept.
        counter_ptr: [1] int64 that gains each row's keys, once per KV head; or None.
        partial_ptr: [rows, query heads, max_splits, HEAD_SIZE] float32 normalised outputs, of
            splits that have keys.
        lse_ptr: [rows, query heads, max_splits] float32 log-sum-exps, base 2.
        logits_ptr: [rows, query heads, logits_stride_head] float32 scaled logits, base 2; read
            where scores are kept.
        rows_ptr: `DecodeRows.rows`; the next four pointers are fields likewise.
        sinks_ptr: [query heads] natural logits, or None.
        splits_ptr: `Splits.table`.
        power: Exponent on the probability in the score.
        GROUP: Query heads that share a KV head.
        KEYS: Keys of a tile of the first launch.
        SPLITS: Most splits of a row, rounded up to a power of two.
        SPLIT_TILE: Splits joined at a time.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        ROWS: Most teams of a launch, rounded up to a power of two.
        PER_REQUEST: `DecodeRows.per_request`.
        TOKENS: `tokens_together`.
        BLOCKS: Blocks scored at a time.
        DIRECT: Whether the first launch wrote the output of a row that has a single split.
        MEAN: Whether the gain is the mean over query heads, else the maximum.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    place = tl.load(places_ptr + row)
    if place < 0:
        return
    length = place + 1
    TEAMS: tl.constexpr = (PER_REQUEST + TOKENS - 1) // TOKENS
    num_teams = tl.num_programs(1) // PER_REQUEST * TEAMS
    number = row % PER_REQUEST // TOKENS * TOKENS
    team_row = row // PER_REQUEST * PER_REQUEST + number
    _, last = last_of_team(number, team_row, places_ptr, PER_REQUEST, TOKENS)
    split_keys = keys_per_split(
        last + 1, places_ptr, splits_ptr, num_teams, KEYS, ROWS, PER_REQUEST, TOKENS
    )
    active = tl.cdiv(last + 1, split_keys)
    head = (row * tl.num_programs(0) + kv_head) * GROUP
    if sinks_ptr is not None:
        sinks_ptr += kv_head * GROUP

    if piece < GROUP and not (DIRECT and active == 1):
        split_at = (head + piece) * max_splits
        norm = _join(lse_ptr + split_at, active, sinks_ptr, piece, SPLITS)
        channel = tl.arange(0, CHANNELS)
        output = tl.zeros([CHANNELS], tl.float32)
        for first in range(0, active, SPLIT_TILE):
            # [SPLIT_TILE]
            split = first + tl.arange(0, SPLIT_TILE)
            lse = tl.load(lse_ptr + split_at + split, mask=split < active, other=float("-inf"))
            # [SPLIT_TILE, CHANNELS]
            held = (split < active)[:, None] & (channel < HEAD_SIZE)[None, :]
            partial_at = partial_ptr + (split_at + split)[:, None] * HEAD_SIZE + channel[None, :]
            partial = tl.load(partial_at, mask=held, other=0.0)
            output += tl.sum(partial * tl.exp2(lse - norm)[:, None], axis=0)
        output_at = output_ptr + tl.load(rows_ptr + row).to(tl.int64) * output_stride_token
        output_at += (kv_head * GROUP + piece) * output_stride_head + channel
        tl.store(output_at, output.to(output_ptr.dtype.element_ty), mask=channel < HEAD_SIZE)

    if counter_ptr is not None:
        tl.atomic_add(counter_ptr, length.to(tl.int64), mask=piece == 0)

    if score_ptr is not None:
        carry = tl.load(carry_ptr + row)
        weight = tl.load(weights_ptr + row)
        TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
        piece_keys = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), TILE) * TILE
        start = piece * piece_keys
        for base in range(start, tl.minimum(start + piece_keys, length), TILE):
            first = base + tl.arange(0, BLOCKS) * BLOCK_SIZE
            slot = tl.arange(0, BLOCK_SIZE)
            # [BLOCKS, BLOCK_SIZE]
            key_place = first[:, None] + slot[None, :]
            # Whole blocks are loaded and stored, so that words are wide; slots past the row's end
            # get back the bits that they had.
            held = (first < length)[:, None]
            logits_at = logits_ptr + head * logits_stride_head + key_place
            best = tl.full([BLOCKS, BLOCK_SIZE], float("-inf"), tl.float32)
            total = tl.zeros([BLOCKS, BLOCK_SIZE], tl.float32)
            for member in tl.static_range(GROUP):
                lse_at = lse_ptr + (head + member) * max_splits
                norm = _join(lse_at, active, sinks_ptr, member, SPLITS)
                logit = tl.load(logits_at + member * logits_stride_head, mask=held, other=0.0)
                if MEAN:
                    total += tl.exp2((logit - norm) * power)
                else:
                    best = tl.maximum(best, logit - norm, propagate_nan=tl.PropagateNan.ALL)
            gained = total / GROUP if MEAN else tl.exp2(best * power)
            table_at = block_table_ptr + row * table_stride_row + first // BLOCK_SIZE
            block = tl.load(table_at, mask=first < length, other=0).to(tl.int64)
            score_at = score_ptr + (block * score_stride_block + kv_head * BLOCK_SIZE)[:, None]
            score_at += slot[None, :]
            score = tl.load(score_at, mask=held, other=0.0)
            # The query's own key has no score yet: what its slot holds is dropped.
            kept = tl.where(key_place < place, score * carry, 0.0)
            score = tl.where(key_place < length, kept + gained * weight, score)
            tl.store(score_at, score, mask=held)


def is_direct(scored: bool, sinks: torch.Tensor | None) -> bool:
    """Whether the first launch writes the output of a row that has a single split."""
    return not scored and sinks is None


def combine(
    output: torch.Tensor,
    pages: Pages,
    batch: DecodeRows,
    power: float,
    reduction: str,
    splits: Splits,
    scratch: Scratch,
    scored: bool,
    counter: torch.Tensor | None,
    sinks: torch.Tensor | None,
    config: Config,
) -> None:
    """Write the rows' outputs and update the scores of their keys, after the first launch.

    `decode` has checked the arguments.

    Args:
        output: [num_tokens, num_heads, head_size], channels dense; the batch's rows are written.
        pages: The layer's pages; `score` is updated if `scored`.
        batch: Which rows and blocks, at most as many rows as `scratch` has.
        power: Exponent on the probability in the score.
        reduction: "max" or "mean" over the query heads of a KV head.
        splits: The splits of the first launch.
        scratch: What the first launch left.
        scored: Whether to update the scores.
        counter: [1] int64, or None. Gains the number of keys of each row and KV head.
        sinks: [num_heads] natural logits that only take part in the softmax's denominator, or None.
        config: How the first launch ran, and how this one does.
    """
    _, num_kv_heads, block_size, _ = pages.kv.shape
    num_heads, _, head_size = scratch.partial.shape
    group = num_heads // num_kv_heads
    num_teams = count_teams(len(batch.rows), batch.per_request, group, head_size)
    max_splits = splits.most[num_teams]
    score = pages.score if scored else None
    pieces = max(group, config.score_pieces) if scored else group
    launch(
        _combine_kernel,
        (num_kv_heads, len(batch.rows), pieces),
        output,
        score,
        counter,
        scratch.partial,
        scratch.lse,
        scratch.logits,
        batch.rows,
        batch.places,
        batch.block_table,
        batch.carry,
        batch.weights,
        sinks,
        splits.table,
        float(power),
        output.stride(0),
        output.stride(1),
        0 if score is None else score.stride(0),
        batch.block_table.stride(0),
        scratch.logits.stride(1),
        max_splits,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        KEYS=config.keys,
        SPLITS=next_power_of_2(max(splits.most)),
        SPLIT_TILE=min(8, next_power_of_2(max(splits.most))),
        CHANNELS=next_power_of_2(head_size),
        ROWS=next_power_of_2(splits.max_rows),
        PER_REQUEST=batch.per_request,
        TOKENS=tokens_together(batch.per_request, group, head_size),
        BLOCKS=max(1, config.score_tile // block_size),
        DIRECT=is_direct(scored, sinks),
        MEAN=reduction == "mean",
        num_warps=config.score_warps if scored else 1,
    )
