"""What a program of prefill's first launch, `kernels.prefill.workspace`, does with its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_cascade.kernels.merge.means import add_units_of, is_in_mean
from vllm_cascade.kernels.primitives import load_angles, load_scale, rotate_tile, to_e4m3


@triton.jit
def take_own_queries(
    out_ptr,
    query_ptr,
    cos_ptr,
    sin_ptr,
    packed,
    row,
    place,
    valid,
    first_head,
    cos_stride,
    query_stride_token,
    query_stride_head,
    out_stride_token,
    out_stride_head,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pack and rotate some query heads of a segment's own tokens.

    Args:
        packed: [rows] int64 row of each token among the packed queries.
        row: [rows] int64 row of each token in the batch.
        place: [rows] logical place of each token.
        valid: [rows] which rows there are.
        first_head: First query head of this program, which takes HEADS of them.
        HEADS: Most query heads of a program.
    """
    line = place.to(tl.int64) * cos_stride
    cos, sin = load_angles(cos_ptr + line, sin_ptr + line, valid, ROTARY_DIM, BLOCK_D)
    for head in range(first_head, tl.minimum(first_head + HEADS, NUM_HEADS)):
        rotate_tile(
            out_ptr + packed * out_stride_token + head * out_stride_head,
            query_ptr + row * query_stride_token + head * query_stride_head,
            cos,
            sin,
            valid,
            HEAD_SIZE,
            ROTARY_DIM,
            IS_NEOX,
            BLOCK_D,
        )


@triton.jit
def take_own_keys(
    key_out_ptr,
    value_out_ptr,
    kv_ptr,
    token_ptr,
    sums_at,
    key_ptr,
    value_ptr,
    tokens_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_at,
    cos_ptr,
    sin_ptr,
    packed,
    row,
    place,
    out_row,
    valid,
    summed,
    first_head,
    cos_stride,
    out_stride_token,
    out_stride_head,
    kv_stride_block,
    token_stride_block,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    key_scale_stride,
    value_scale_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    SUM_VALUES: tl.constexpr,
):
    """Bring some KV heads of a segment's own tokens to the workspace and to their pages.

    Args:
        token_ptr: `Pages.token`, or None where tokens are not traced.
        sums_at: Pointer to the segment's sums, [KV heads, 2, HEAD_SIZE] int64.
        tokens_ptr: [queries] int32 index of each token in its request; read if traced.
        key_scale_ptr: `Pages.key_scale`, None where pages are not in FP8; the next pointer is
            `Pages.value_scale` likewise.
        table_at: Pointer to the segment's row of the block table.
        packed: [rows] int64 row of each token among the packed queries.
        row: [rows] int64 row of each token in the batch.
        place: [rows] logical place of each token.
        out_row: [rows] row of each token in the workspace.
        valid: [rows] which rows there are.
        summed: Whether groups of the segment merge, so that its unit vectors are added up.
        first_head: First KV head of this program, which takes HEADS of them.
        HEADS: Most KV heads of a program.
    """
    IS_FP8: tl.constexpr = kv_ptr.dtype.element_ty == tl.float8e4nv
    channel = tl.arange(0, BLOCK_V)
    held = valid[:, None] & (channel < HEAD_SIZE)[None, :]
    in_mean = is_in_mean(place)
    counted = held & in_mean[:, None]
    summed = summed & (tl.max((valid & in_mean).to(tl.int32), 0) > 0)
    line = place.to(tl.int64) * cos_stride
    # Loaded once for all heads.
    cos, sin = load_angles(cos_ptr + line, sin_ptr + line, valid, ROTARY_DIM, BLOCK_D)
    block = tl.load(table_at + place // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    for head in range(first_head, tl.minimum(first_head + HEADS, NUM_KV_HEADS)):
        slot = head * BLOCK_SIZE + place % BLOCK_SIZE
        page = kv_ptr + block * kv_stride_block + slot * (2 * HEAD_SIZE)
        source = key_ptr + row * key_stride_token + head * key_stride_head
        target = out_row.to(tl.int64) * out_stride_token + head * out_stride_head
        key_scale = None
        if key_scale_ptr is not None:
            key_scale = load_scale(key_scale_ptr, head, key_scale_stride)
        rotate_tile(
            key_out_ptr + target,
            source,
            cos,
            sin,
            valid,
            HEAD_SIZE,
            ROTARY_DIM,
            IS_NEOX,
            BLOCK_D,
            page,
            key_scale,
        )
        # [rows, BLOCK_V]
        value_at = value_ptr + row * value_stride_token + head * value_stride_head
        value = tl.load(value_at[:, None] + channel[None, :], mask=held, other=0.0)
        used = value
        if value_scale_ptr is not None:
            value_scale = load_scale(value_scale_ptr, head, value_scale_stride)
            value = to_e4m3(value, value_scale)
            used = (value * value_scale).to(value_out_ptr.dtype.element_ty)
        page_value = value.to(kv_ptr.dtype.element_ty)
        tl.store(page[:, None] + HEAD_SIZE + channel[None, :], page_value, mask=held)
        tl.store((value_out_ptr + target)[:, None] + channel[None, :], used, mask=held)
        if token_ptr is not None:
            token = tl.load(tokens_ptr + packed, mask=valid, other=0)
            tl.store(token_ptr + block * token_stride_block + slot, token, mask=valid)
        if (SUM_KEYS or SUM_VALUES) and summed:
            key = tl.load(source[:, None] + channel[None, :], mask=counted, other=0.0)
            if key_scale is not None:
                key = to_e4m3(key, key_scale)
            value = tl.where(counted, value, tl.zeros_like(value))
            sum_at = sums_at + head * (2 * HEAD_SIZE)
            add_units_of(sum_at, key, value, BLOCK_V, HEAD_SIZE, SUM_KEYS, SUM_VALUES, IS_FP8)


@triton.jit
def take_held(
    key_out_ptr,
    value_out_ptr,
    kv_ptr,
    sums_at,
    key_scale_ptr,
    value_scale_ptr,
    table_at,
    cos_ptr,
    sin_ptr,
    place,
    out_row,
    valid,
    written,
    summed,
    first_head,
    cos_stride,
    out_stride_token,
    out_stride_head,
    kv_stride_block,
    key_scale_stride,
    value_scale_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    SUM_VALUES: tl.constexpr,
):
    """Bring some KV heads of tokens in the pages to the workspace.

    Args:
        sums_at: Pointer to the segment's sums, [KV heads, 2, HEAD_SIZE] int64.
        key_scale_ptr: `Pages.key_scale`, None where pages are not in FP8; the next pointer is
            `Pages.value_scale` likewise.
        table_at: Pointer to the segment's row of the block table.
        place: [rows] logical place of each token.
        out_row: [rows] row of each token in the workspace.
        valid: [rows] which tokens are in the pages.
        written: [rows] which values are written: those of `valid`, and zeros as padding.
        summed: Whether groups of the segment merge, so that its unit vectors are added up.
        first_head: First KV head of this program, which takes HEADS of them.
        HEADS: Most KV heads of a program.
    """
    IS_FP8: tl.constexpr = kv_ptr.dtype.element_ty == tl.float8e4nv
    channel = tl.arange(0, BLOCK_V)
    in_head = (channel < HEAD_SIZE)[None, :]
    held = valid[:, None] & in_head
    in_mean = is_in_mean(place)
    counted = held & in_mean[:, None]
    summed = summed & (tl.max((valid & in_mean).to(tl.int32), 0) > 0)
    line = place.to(tl.int64) * cos_stride
    cos, sin = load_angles(cos_ptr + line, sin_ptr + line, valid, ROTARY_DIM, BLOCK_D)
    block = tl.load(table_at + place // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    for head in range(first_head, tl.minimum(first_head + HEADS, NUM_KV_HEADS)):
        slot = head * BLOCK_SIZE + place % BLOCK_SIZE
        source = kv_ptr + block * kv_stride_block + slot * (2 * HEAD_SIZE)
        target = out_row.to(tl.int64) * out_stride_token + head * out_stride_head
        key_scale = None
        if key_scale_ptr is not None:
            key_scale = load_scale(key_scale_ptr, head, key_scale_stride)
        rotate_tile(
            key_out_ptr + target,
            source,
            cos,
            sin,
            valid,
            HEAD_SIZE,
            ROTARY_DIM,
            IS_NEOX,
            BLOCK_D,
            None,
            key_scale,
        )
        # [rows, BLOCK_V]
        value = tl.load(source[:, None] + HEAD_SIZE + channel[None, :], mask=held, other=0.0)
        used = value
        if value_scale_ptr is not None:
            value = value.to(tl.float32)
            value_scale = load_scale(value_scale_ptr, head, value_scale_stride)
            used = (value * value_scale).to(value_out_ptr.dtype.element_ty)
        target_at = (value_out_ptr + target)[:, None] + channel[None, :]
        tl.store(target_at, used, mask=written[:, None] & in_head)
        if (SUM_KEYS or SUM_VALUES) and summed:
            key = tl.load(source[:, None] + channel[None, :], mask=counted, other=0.0)
            if key_scale is not None:
                key = key.to(tl.float32)
            value = tl.where(counted, value, tl.zeros_like(value))
            sum_at = sums_at + head * (2 * HEAD_SIZE)
            add_units_of(sum_at, key, value, BLOCK_V, HEAD_SIZE, SUM_KEYS, SUM_VALUES, IS_FP8)
