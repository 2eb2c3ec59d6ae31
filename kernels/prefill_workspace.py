"""Fills the workspace of a prefill: queries packed and rotated, keys and values out of the pages.

The caller owns the workspace and keeps it. Its shapes, all of the model's dtype: query and
attention output, each [num_queries, num_heads, head_size]; key and value, each [num_rows,
num_kv_heads, head_size].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import cdiv, launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import load_angles, rotate_tile
from vllm_cascade.kernels.segments import KEY_PADDING, Segments

# Arguments that change from step to step are not specialized: each would be compiled anew.


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
    grid = (cdiv(num_packed, block_t), cdiv(num_heads, block_h))
    launch(
        _rotate_queries_kernel,
        grid,
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
    return next_power_of_2(max(rotary_dim // 2, cdiv(head_size - rotary_dim, 2)))


@triton.jit(
    do_not_specialize_on_alignment=["key_spans_ptr", "block_table_ptr"],
)
def _gather_keys_kernel(
    key_out_ptr,
    value_out_ptr,
    kv_ptr,
    key_spans_ptr,
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
    PADDING: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_H
    tile = tl.program_id(1)
    segment = tl.program_id(2)
    start = tl.load(key_spans_ptr + 2 * segment)
    num_keys = tl.load(key_spans_ptr + 2 * segment + 1) - start
    if tile * BLOCK_T >= num_keys + PADDING:
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
    held = valid[:, None] & (channel < HEAD_SIZE)[None, :]
    written = (place < num_keys + PADDING)[:, None] & (channel < HEAD_SIZE)[None, :]
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
        value = tl.load(source[:, None] + HEAD_SIZE + channel[None, :], mask=held, other=0.0)
        target = value_out_ptr + workspace_row * value_stride_token + head * value_stride_head
        tl.store(target[:, None] + channel[None, :], value, mask=written)


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
        segments: Which blocks; row ``key_spans[s, 0] + j`` is place j of segment s.
        cos: [num_positions, rotary_dim / 2] in any floating dtype; channels dense.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        key_out: [>= num_rows, num_kv_heads, head_size] in the pages' dtype; padding is left.
        value_out: As `key_out`; padding becomes zero.
    """
    _, num_kv_heads, block_size, channels = pages.kv.shape
    head_size = channels // 2
    assert key_out.shape[0] >= segments.num_rows and value_out.shape[0] >= segments.num_rows
    assert key_out.shape[1:] == value_out.shape[1:] == (num_kv_heads, head_size)
    assert key_out.dtype == value_out.dtype == pages.kv.dtype
    assert key_out.stride(2) == value_out.stride(2) == 1
    assert pages.kv.stride()[1:] == (block_size * channels, channels, 1)
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    num_segments = len(segments.carry)
    if num_segments == 0:
        return
    block_t, block_h = 16, min(num_kv_heads, 4)
    grid = (
        cdiv(num_kv_heads, block_h),
        cdiv(segments.max_key_len + KEY_PADDING, block_t),
        num_segments,
    )
    launch(
        _gather_keys_kernel,
        grid,
        key_out,
        value_out,
        pages.kv,
        segments.key_spans,
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
        BLOCK_V=next_power_of_2(head_size),
        PADDING=KEY_PADDING,
        num_warps=4,
    )
