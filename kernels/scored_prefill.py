"""Prefill on the GPU: rotation into a workspace, attention, and exact scores per key.

A wave's segments are attended and scored together. `rotate_queries` and `gather_keys` fill a
workspace that the caller owns and keeps, of at least these shapes, all of the model's dtype:

- query and attention output, each [num_queries, num_heads, head_size];
- key and value, each [num_keys, num_kv_heads, head_size];

and a float32 log-sum-exp [num_heads, num_queries]. `attend` or FlashAttention turns them into
outputs and log-sum-exps, `score_keys` turns query, key and log-sum-exp into scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import load_angles, rotate_tile
from vllm_cascade.kernels.segments import Segments

LOG2_E = math.log2(math.e)

# Arguments that change from step to step are not specialized: each would be compiled anew.


# Rotation of packed queries.


@triton.jit(
    do_not_specialize=["num_packed"],
    do_not_specialize_on_alignment=["rows_ptr", "places_ptr"],
)
def _rotate_queries_kernel(
    out_ptr,
    query_ptr,
    rows_ptr,
    places_ptr,
    cos_ptr,
    sin_ptr,
    num_packed,
    query_stride_token,
    query_stride_head,
    out_stride_token,
    out_stride_head,
    cos_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # [BLOCK_T] packed queries; their angles serve all heads
    packed = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = packed < num_packed
    row = tl.load(rows_ptr + packed, mask=valid, other=0).to(tl.int64)
    line = tl.load(places_ptr + packed, mask=valid, other=0).to(tl.int64) * cos_stride
    cos, sin = load_angles(cos_ptr + line, sin_ptr + line, valid, ROTARY_DIM, BLOCK_D)
    first = tl.program_id(1) * BLOCK_H
    for head in range(first, tl.minimum(first + BLOCK_H, NUM_HEADS)):
        rotate_tile(
            out_ptr + packed.to(tl.int64) * out_stride_token + head * out_stride_head,
            query_ptr + row * query_stride_token + head * query_stride_head,
            cos,
            sin,
            valid,
            HEAD_SIZE,
            ROTARY_DIM,
            IS_NEOX,
            BLOCK_D,
        )


def rotate_queries(
    query: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    out: torch.Tensor,
) -> None:
    """Pack the queries of several segments and rotate them at their logical places.

    Args:
        query: [num_tokens, num_heads, head_size] before RoPE; channels dense.
        rows: [num_packed] int32 row of each packed query in `query`.
        places: [num_packed] int32 its logical place.
        cos: [num_positions, rotary_dim / 2] in any floating dtype; channels dense.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        out: [>= num_packed, num_heads, head_size] in the dtype of `query`; its first rows are
            written, rotated in float32 and rounded once.
    """
    num_packed, (_, num_heads, head_size) = len(rows), query.shape
    assert out.shape[0] >= num_packed and out.shape[1:] == query.shape[1:]
    assert out.dtype == query.dtype and query.stride(2) == out.stride(2) == 1
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    if num_packed == 0:
        return
    block_d = _rotation_width(head_size, 2 * cos.shape[1])
    block_h = min(num_heads, 8)
    block_t = 16
    grid = (triton.cdiv(num_packed, block_t), triton.cdiv(num_heads, block_h))
    _rotate_queries_kernel[grid](
        out,
        query,
        rows,
        places,
        cos,
        sin,
        num_packed,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        cos.stride(0),
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        ROTARY_DIM=2 * cos.shape[1],
        IS_NEOX=is_neox,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )


def _rotation_width(head_size: int, rotary_dim: int) -> int:
    """Channels of a tile of `rotate_tile`: half of a head, or of what is not rotated."""
    return triton.next_power_of_2(max(rotary_dim // 2, triton.cdiv(head_size - rotary_dim, 2)))


# Keys and values out of the pages.


@triton.jit(
    do_not_specialize_on_alignment=["key_starts_ptr", "block_table_ptr"],
)
def _gather_keys_kernel(
    key_out_ptr,
    value_out_ptr,
    kv_ptr,
    key_starts_ptr,
    block_table_ptr,
    cos_ptr,
    sin_ptr,
    kv_stride_block,
    table_stride,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    cos_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_H
    tile = tl.program_id(1)
    segment = tl.program_id(2)
    start = tl.load(key_starts_ptr + segment)
    num_keys = tl.load(key_starts_ptr + segment + 1) - start
    if tile * BLOCK_T >= num_keys:
        return
    # [BLOCK_T] logical places; their angles serve all heads
    place = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = place < num_keys
    line = place.to(tl.int64) * cos_stride
    cos, sin = load_angles(cos_ptr + line, sin_ptr + line, valid, ROTARY_DIM, BLOCK_D)
    table_ptr = block_table_ptr + segment.to(tl.int64) * table_stride
    block = tl.load(table_ptr + place // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    line_ptr = kv_ptr + block * kv_stride_block + (place % BLOCK_SIZE) * (2 * HEAD_SIZE)
    workspace_row = (start + place).to(tl.int64)
    channel = tl.arange(0, BLOCK_V)
    inside = valid[:, None] & (channel < HEAD_SIZE)[None, :]
    for head in range(first, tl.minimum(first + BLOCK_H, NUM_KV_HEADS)):
        source = line_ptr + head * (BLOCK_SIZE * 2 * HEAD_SIZE)
        rotate_tile(
            key_out_ptr + workspace_row * key_stride_token + head * key_stride_head,
            source,
            cos,
            sin,
            valid,
            HEAD_SIZE,
            ROTARY_DIM,
            IS_NEOX,
            BLOCK_D,
        )
        # [BLOCK_T, BLOCK_V]
        value = tl.load(source[:, None] + HEAD_SIZE + channel[None, :], mask=inside)
        target = value_out_ptr + workspace_row * value_stride_token + head * value_stride_head
        tl.store(target[:, None] + channel[None, :], value, mask=inside)


def gather_keys(
    pages: Pages,
    segments: Segments,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Copy each segment's keys and values out of the pages, the keys rotated at their places.

    Args:
        pages: The layer's pages, the segments' own keys and values already written.
        segments: Which blocks; row ``key_starts[s] + j`` of the workspace is place j of segment s.
        cos: [num_positions, rotary_dim / 2] in any floating dtype; channels dense.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        key_out: [>= num_keys, num_kv_heads, head_size] in the pages' dtype.
        value_out: As `key_out`.
    """
    _, num_kv_heads, block_size, channels = pages.kv.shape
    head_size = channels // 2
    assert key_out.shape[0] >= segments.num_keys and value_out.shape[0] >= segments.num_keys
    assert key_out.shape[1:] == value_out.shape[1:] == (num_kv_heads, head_size)
    assert key_out.dtype == value_out.dtype == pages.kv.dtype
    assert key_out.stride(2) == value_out.stride(2) == 1
    assert pages.kv.stride()[1:] == (block_size * channels, channels, 1)
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    num_segments = len(segments.carry)
    if num_segments == 0 or segments.num_keys == 0:
        return
    block_t, block_h = 16, min(num_kv_heads, 4)
    grid = (
        triton.cdiv(num_kv_heads, block_h),
        triton.cdiv(segments.max_key_len, block_t),
        num_segments,
    )
    _gather_keys_kernel[grid](
        key_out,
        value_out,
        pages.kv,
        segments.key_starts,
        segments.block_table,
        cos,
        sin,
        pages.kv.stride(0),
        segments.block_table.stride(0),
        key_out.stride(0),
        key_out.stride(1),
        value_out.stride(0),
        value_out.stride(1),
        cos.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        ROTARY_DIM=2 * cos.shape[1],
        IS_NEOX=is_neox,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_D=_rotation_width(head_size, 2 * cos.shape[1]),
        BLOCK_V=triton.next_power_of_2(head_size),
        num_warps=4,
    )


# Attention where FlashAttention-3 is not available.


@triton.jit(
    do_not_specialize=["lse_stride"],
    do_not_specialize_on_alignment=["query_starts_ptr", "key_starts_ptr"],
)
def _attend_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    query_starts_ptr,
    key_starts_ptr,
    factor,
    out_stride_token,
    out_stride_head,
    lse_stride,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    segment = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + segment)
    query_len = tl.load(query_starts_ptr + segment + 1) - query_start
    # The last queries see the most keys: they go first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    if first >= query_len:
        return
    key_start = tl.load(key_starts_ptr + segment)
    key_len = tl.load(key_starts_ptr + segment + 1) - key_start
    prefix = key_len - query_len

    channel = tl.arange(0, BLOCK_D)
    has_channel = (channel < HEAD_SIZE)[None, :]
    # [BLOCK_Q, BLOCK_D]
    index = first + tl.arange(0, BLOCK_Q)
    in_segment = (index < query_len)[:, None]
    query_row = (query_start + index).to(tl.int64)[:, None]
    query = tl.load(
        query_ptr + query_row * query_stride_token + head * query_stride_head + channel[None, :],
        mask=in_segment & has_channel,
        other=0.0,
    )
    key_head_ptr = key_ptr + (head // GROUP) * key_stride_head
    value_head_ptr = value_ptr + (head // GROUP) * value_stride_head
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    attended = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    seen_by_last = tl.minimum(prefix + first + BLOCK_Q, key_len)
    for start in range(0, seen_by_last, BLOCK_K):
        # [BLOCK_K, BLOCK_D]
        place = start + tl.arange(0, BLOCK_K)
        row = (key_start + place).to(tl.int64)[:, None]
        held = (place < key_len)[:, None] & has_channel
        key = tl.load(
            key_head_ptr + row * key_stride_token + channel[None, :], mask=held, other=0.0
        )
        value = tl.load(
            value_head_ptr + row * value_stride_token + channel[None, :], mask=held, other=0.0
        )
        # [BLOCK_Q, BLOCK_K] in units of log 2
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        seen = place[None, :] <= (prefix + index)[:, None]
        logit = tl.where(seen & (place < key_len)[None, :], logit, float("-inf"))
        # Key 0 is in the first tile and everyone sees it: finite from there on.
        higher = tl.maximum(highest, tl.max(logit, axis=1))
        shrink = tl.exp2(highest - higher)
        weight = tl.exp2(logit - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        attended = attended * shrink[:, None]
        attended += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = higher
    out = attended / total[:, None]
    tl.store(
        out_ptr + query_row * out_stride_token + head * out_stride_head + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_segment & has_channel,
    )
    # Back from base 2.
    lse = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head * lse_stride + query_start + index, lse, mask=index < query_len)


def attend(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
) -> None:
    """Attend causally in every segment, aligned at the end as FlashAttention does.

    Query i of a segment of q queries and k keys sees keys 0 to k - q + i.

    Args:
        out: [>= num_queries, num_heads, head_size] in the dtype of `query`, written.
        lse: [num_heads, >= num_queries] float32, written: natural log of the summed exponentials.
        query: [>= num_queries, num_heads, head_size], rotated and packed.
        key: [>= num_keys, num_kv_heads, head_size], rotated.
        value: As `key`.
        segments: Where each segment's queries and keys start.
        scale: Factor on the logits.
    """
    _, num_heads, head_size = query.shape
    num_segments = len(segments.carry)
    if num_segments == 0 or segments.num_queries == 0:
        return
    assert out.shape[1:] == query.shape[1:] and lse.shape[0] == num_heads
    assert lse.dtype == torch.float32 and lse.stride(1) == 1
    assert out.stride(2) == query.stride(2) == key.stride(2) == value.stride(2) == 1
    block_d = max(16, triton.next_power_of_2(head_size))
    is_single = query.dtype == torch.float32
    block_q, block_k = (32, 32) if is_single else (128, 64 if block_d <= 128 else 32)
    grid = (num_heads, triton.cdiv(segments.max_query_len, block_q), num_segments)
    _attend_kernel[grid](
        out,
        lse,
        query,
        key,
        value,
        segments.query_starts,
        segments.key_starts,
        scale * LOG2_E,
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        GROUP=num_heads // key.shape[1],
        HEAD_SIZE=head_size,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=4 if is_single else 8,
        num_stages=1 if is_single else 3,
    )


# Scores.


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """How `score_keys` is cut and launched.

    Args:
        block_k: Keys of a program.
        columns: Queries times query heads of one step, a power of two; split by the group.
        num_warps: Warps of a program.
        num_stages: Steps whose queries are in flight.
        key_in_registers: Keep the keys in registers instead of shared memory.
        max_registers: Bound on registers per thread, or None.
    """

    block_k: int
    columns: int
    num_warps: int
    num_stages: int
    key_in_registers: bool = True
    max_registers: int | None = None


SCORE_CONFIGS = {
    "k128_c64_w4": ScoreConfig(128, 64, 4, 4),
    "k128_c64_w8": ScoreConfig(128, 64, 8, 4, max_registers=128),
    "k128_c128_w4_shared": ScoreConfig(128, 128, 4, 2, key_in_registers=False),
}


def launch_config(dtype: torch.dtype, head_size: int, group: int) -> ScoreConfig:
    """Tile sizes of `score_keys`.

    Args:
        dtype: Of queries and keys.
        head_size: Channels of a key.
        group: Query heads per KV head.

    Returns:
        The tiles that suit a Hopper GPU.
    """
    heads = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return ScoreConfig(32, max(32, heads), 4, 1, key_in_registers=False)
    if head_size > 128:
        return ScoreConfig(128, 64, 8, 3)
    if heads > 8:
        # With fewer than eight queries a step, their heads would lie in several threads.
        return ScoreConfig(128, 128, 8, 3)
    # Sums are kept per query of a step: the fewer heads, the more registers they take.
    return ScoreConfig(128, 64, 8, 4) if heads == 1 else SCORE_CONFIGS["k128_c64_w4"]


@triton.jit(
    do_not_specialize=["lse_stride", "num_slots"],
    do_not_specialize_on_alignment=["query_starts_ptr", "exponents_ptr"],
)
def _shifts_kernel(
    shift_ptr,
    lse_ptr,
    query_starts_ptr,
    exponents_ptr,
    lse_factor,
    log2_decay,
    offset,
    lse_stride,
    num_slots,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """What is subtracted from a scaled logit so that exp2 gives a weighted, raised probability.

    One row of HEADS * BLOCK_Q per KV head and step of `score_keys`, in the order of its columns;
    infinite where there is no query or head.
    """
    tile = tl.program_id(0)
    segment = tl.program_id(1)
    kv_head = tl.program_id(2)
    start = tl.load(query_starts_ptr + segment)
    query_len = tl.load(query_starts_ptr + segment + 1) - start
    if tile * BLOCK_Q >= query_len:
        return
    exponent = tl.load(exponents_ptr + segment)
    # [HEADS * BLOCK_Q]
    column = tl.arange(0, HEADS * BLOCK_Q)
    head = column // BLOCK_Q
    query = tile * BLOCK_Q + column % BLOCK_Q
    valid = (head < GROUP) & (query < query_len)
    lse = tl.load(
        lse_ptr + (kv_head * GROUP + head).to(tl.int64) * lse_stride + start + query,
        mask=valid,
        other=0.0,
    )
    shift = lse * lse_factor - (exponent - query) * log2_decay + offset
    slot = kv_head.to(tl.int64) * num_slots + start // BLOCK_Q + segment + tile
    shift = tl.where(valid, shift, float("inf"))
    tl.store(shift_ptr + slot * (HEADS * BLOCK_Q) + column, shift)


@triton.jit
def _gain(
    acc,
    key,
    query_ptr,
    shift_ptr,
    begin,
    end,
    first_query,
    last_query,
    kv_head,
    place,
    prefix,
    factor,
    query_stride_token,
    query_stride_head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the queries of steps `begin` to `end` give the keys to `acc` [BLOCK_K, BLOCK_Q]."""
    # [HEADS * BLOCK_Q] head and query of each column. One head's queries lie side by side: then a
    # thread holds all heads of a query and a key, and reduces over them without a shuffle.
    column = tl.arange(0, HEADS * BLOCK_Q)
    # There may be fewer heads than columns for them; those columns count for nothing.
    head = kv_head * GROUP + tl.minimum(column // BLOCK_Q, GROUP - 1)
    channel = tl.arange(0, BLOCK_D)
    for step in tl.range(begin, end):
        # [HEADS * BLOCK_Q, BLOCK_D]. Past the end the last query again: columns that count for
        # nothing, but stay finite.
        row = tl.minimum(first_query + step * BLOCK_Q + column % BLOCK_Q, last_query)
        lines = query_ptr + row.to(tl.int64) * query_stride_token + head * query_stride_head
        if HEAD_SIZE == BLOCK_D:
            query = tl.load(lines[:, None] + channel[None, :])
        else:
            inside = (channel < HEAD_SIZE)[None, :]
            query = tl.load(lines[:, None] + channel[None, :], mask=inside, other=0.0)
        shift = tl.load(shift_ptr + step * (HEADS * BLOCK_Q) + column)
        # [BLOCK_K, HEADS * BLOCK_Q]
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * factor - shift[None, :]
        logit = tl.reshape(logit, (BLOCK_K, HEADS, BLOCK_Q))
        # [BLOCK_K, BLOCK_Q]
        given = tl.sum(tl.exp2(logit), axis=1) if MEAN else tl.exp2(tl.max(logit, axis=1))
        if MASKED:
            query_place = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
            seen = place[:, None] <= (prefix + query_place)[None, :]
            seen = seen & (first_query + query_place <= last_query)[None, :]
            given = tl.where(seen, given, 0.0)
        acc += given
    return acc


@triton.jit(
    do_not_specialize=["num_slots"],
    do_not_specialize_on_alignment=[
        "query_starts_ptr",
        "key_starts_ptr",
        "block_table_ptr",
        "carry_ptr",
    ],
)
def _score_keys_kernel(
    score_ptr,
    query_ptr,
    key_ptr,
    shift_ptr,
    query_starts_ptr,
    key_starts_ptr,
    block_table_ptr,
    carry_ptr,
    counter_ptr,
    factor,
    score_stride_block,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    table_stride,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
    KEY_IN_REGISTERS: tl.constexpr,
):
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    segment = tl.program_id(0) // NUM_KV_HEADS
    # Early keys are seen by the most queries: they go first, so that the last programs are short.
    first_place = tl.program_id(1) * BLOCK_K
    key_start = tl.load(key_starts_ptr + segment)
    key_len = tl.load(key_starts_ptr + segment + 1) - key_start
    if first_place >= key_len:
        return
    query_start = tl.load(query_starts_ptr + segment)
    query_len = tl.load(query_starts_ptr + segment + 1) - query_start
    prefix = key_len - query_len

    # [BLOCK_K, BLOCK_D]. Past the end the last key again, never stored.
    place = first_place + tl.arange(0, BLOCK_K)
    row = (key_start + tl.minimum(place, key_len - 1)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    inside = (channel < HEAD_SIZE)[None, :]
    key = tl.load(
        key_ptr + kv_head * key_stride_head + row[:, None] * key_stride_token + channel[None, :],
        mask=inside,
        other=0.0,
    )
    if KEY_IN_REGISTERS:
        # Passed through an accumulator, the keys have a layout from which they become an operand
        # without leaving their registers. Otherwise each step would read them from shared memory.
        left = tl.zeros([BLOCK_K, 16], key.dtype)
        right = tl.zeros([16, BLOCK_D], key.dtype)
        key = tl.dot(left, right, acc=key.to(tl.float32)).to(key.dtype)

    # Steps of BLOCK_Q queries. The first sees this program's first key, those before `clear` do
    # not see its last.
    steps = tl.cdiv(query_len, BLOCK_Q)
    begin = tl.maximum(first_place - prefix, 0) // BLOCK_Q
    clear = tl.cdiv(tl.maximum(first_place + BLOCK_K - 1 - prefix, 0), BLOCK_Q)
    clear = tl.minimum(clear, steps)
    shift_ptr += (kv_head.to(tl.int64) * num_slots + query_start // BLOCK_Q + segment) * (
        HEADS * BLOCK_Q
    )
    acc = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    last_query = query_start + query_len - 1
    acc = _gain(
        acc, key, query_ptr, shift_ptr, begin, clear, query_start, last_query, kv_head, place,
        prefix, factor, query_stride_token, query_stride_head,
        GROUP, HEADS, HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_D, MEAN, True,
    )  # fmt: skip
    acc = _gain(
        acc, key, query_ptr, shift_ptr, clear, steps, query_start, last_query, kv_head, place,
        prefix, factor, query_stride_token, query_stride_head,
        GROUP, HEADS, HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_D, MEAN, False,
    )  # fmt: skip
    # [BLOCK_K]
    gained = tl.sum(acc, axis=1)

    valid = place < key_len
    table_ptr = block_table_ptr + segment.to(tl.int64) * table_stride
    block = tl.load(table_ptr + place // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    slot_ptr = score_ptr + block * score_stride_block + kv_head * BLOCK_SIZE + place % BLOCK_SIZE
    old = tl.load(slot_ptr, mask=place < prefix, other=0.0)
    tl.store(slot_ptr, old * tl.load(carry_ptr + segment) + gained, mask=valid)
    if counter_ptr is not None:
        pairs = tl.where(valid, query_len - tl.maximum(place - prefix, 0), 0)
        tl.atomic_add(counter_ptr, tl.sum(pairs.to(tl.int64)))


def shifts_elements(num_queries: int, num_segments: int, num_heads: int, num_kv_heads: int) -> int:
    """Most elements that `score_keys` needs of `shifts`, whatever its configuration.

    Args:
        num_queries: Queries of a wave.
        num_segments: Segments of a wave.
        num_heads: Query heads.
        num_kv_heads: KV heads.

    Returns:
        Number of float32.
    """
    heads = num_kv_heads * triton.next_power_of_2(num_heads // num_kv_heads)
    widest = max(config.columns for config in SCORE_CONFIGS.values())
    return heads * num_queries + num_kv_heads * num_segments * widest


def score_keys(
    pages: Pages,
    segments: Segments,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    decay: float,
    power: float,
    reduction: str,
    counter: torch.Tensor | None,
    shifts: torch.Tensor | None = None,
    config: ScoreConfig | str | None = None,
) -> None:
    """Add to every key's score what the queries of its segment give it.

    With ``p[h, i, j] = exp(scale * q[h, i] . k[j] - lse[h, i])``, query i gives a key j that it
    sees ``decay ** (exponent - i)`` times the maximum (or mean) of ``p ** power`` over the query
    heads of the KV head. The sums go to the pages: ``score = score * carry + gained``; the
    segment's own keys had no score before, theirs is assigned.

    Args:
        pages: The layer's pages; `score` is updated.
        segments: Where queries and keys start, and the blocks that hold the scores.
        query: [>= num_queries, num_heads, head_size], rotated and packed.
        key: [>= num_keys, num_kv_heads, head_size], rotated.
        lse: [num_heads, >= num_queries] float32 natural log of each query's summed exponentials.
        scale: Factor on the logits.
        decay: Base of the queries' weights, positive.
        power: Exponent on the probability, positive.
        reduction: "max" or "mean".
        counter: [1] int64 or None; grows by the pairs of a query and a key it sees, once per KV
            head.
        shifts: Scratch of at least `shifts_elements` float32; None allocates it.
        config: How to launch, or a name in `SCORE_CONFIGS`; None chooses.

    Raises:
        ValueError: If `reduction` is unknown.
    """
    if reduction not in ("max", "mean"):
        raise ValueError(f"reduction is 'max' or 'mean', got {reduction!r}")
    assert pages.score is not None
    _, num_heads, head_size = query.shape
    num_kv_heads, block_size = pages.score.shape[1:]
    num_segments = len(segments.carry)
    if num_segments == 0 or segments.num_queries == 0:
        return
    assert key.shape[1:] == (num_kv_heads, head_size) and key.dtype == query.dtype
    assert lse.shape[0] == num_heads and lse.dtype == torch.float32 and lse.stride(1) == 1
    assert query.stride(2) == key.stride(2) == 1
    assert pages.score.stride()[1:] == (block_size, 1)
    group = num_heads // num_kv_heads
    heads = triton.next_power_of_2(group)
    if config is None:
        config = launch_config(query.dtype, head_size, group)
    elif isinstance(config, str):
        config = SCORE_CONFIGS[config]
    block_q = config.columns // heads
    block_d = max(16, triton.next_power_of_2(head_size))
    num_slots = segments.num_queries // block_q + num_segments
    elements = num_kv_heads * num_slots * config.columns
    if shifts is None:
        shifts = torch.empty(elements, dtype=torch.float32, device=query.device)
    assert shifts.numel() >= elements and shifts.is_contiguous()

    grid = (triton.cdiv(segments.max_query_len, block_q), num_segments, num_kv_heads)
    _shifts_kernel[grid](
        shifts,
        lse,
        segments.query_starts,
        segments.exponents,
        power * LOG2_E,
        math.log2(decay),
        math.log2(group) if reduction == "mean" else 0.0,
        lse.stride(0),
        num_slots,
        GROUP=group,
        HEADS=heads,
        BLOCK_Q=block_q,
        num_warps=1,
    )
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    grid = (num_kv_heads * num_segments, triton.cdiv(segments.max_key_len, config.block_k))
    _score_keys_kernel[grid](
        pages.score,
        query,
        key,
        shifts,
        segments.query_starts,
        segments.key_starts,
        segments.block_table,
        segments.carry,
        counter,
        scale * power * LOG2_E,
        pages.score.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        segments.block_table.stride(0),
        num_slots,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEADS=heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        BLOCK_K=config.block_k,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        MEAN=reduction == "mean",
        KEY_IN_REGISTERS=config.key_in_registers,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
