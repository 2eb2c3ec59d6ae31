"""Prepares a wave of prefill in one launch: all that attention reads, and what pages keep.

A segment's own queries, keys and values come from the activations. The launch writes queries and
keys to the workspace rotated, values as they are; and it writes keys (before RoPE) and values to
their pages. Where pages are in FP8, the workspace gets what can be read back from them, in the
model's dtype: so results do not depend on how a prompt is cut into steps. The launch gathers into
the workspace what the segment finds in the pages. Where a boundary follows, the launch also adds up
unit keys and unit values, for the mean that the merge compares tokens with.

The caller owns the workspace and keeps it. Its shapes, all of the model's dtype: query
[num_queries, num_heads, head_size]; key and value, each [num_rows, num_kv_heads, head_size].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import cdiv, launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.prefill.tiles import take_held, take_own_keys, take_own_queries
from vllm_cascade.kernels.segments import KEY_PADDING, Segments
from vllm_cascade.kernels.weights import Weights

# Tokens of a program that takes a segment's own tokens, and of one that takes tokens in the pages.
OWN_TOKENS = 16
PAGE_TOKENS = 16
NUM_WARPS = 2
# With heads of more than 256 channels. Several warps share such a vector: as many as in `add_units`
# of `kernels.merge.means`, for the same order of sums.
WIDE_WARPS = 4
# Heads of a program; all of them use the angles that it loads for its tokens.
QUERY_HEADS = 8
KV_HEADS = 4


@triton.jit(
    do_not_specialize=["own_tiles"],
    do_not_specialize_on_alignment=[
        "rows_ptr",
        "tokens_ptr",
        "query_spans_ptr",
        "key_spans_ptr",
        "block_table_ptr",
        "num_groups_ptr",
    ],
)
def _prepare_kernel(
    query_out_ptr,
    key_out_ptr,
    value_out_ptr,
    kv_ptr,
    token_ptr,
    sums_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    rows_ptr,
    tokens_ptr,
    key_scale_ptr,
    value_scale_ptr,
    query_spans_ptr,
    key_spans_ptr,
    block_table_ptr,
    num_groups_ptr,
    cos_ptr,
    sin_ptr,
    own_tiles,
    query_out_stride_token,
    query_out_stride_head,
    out_stride_token,
    out_stride_head,
    kv_stride_block,
    token_stride_block,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    key_scale_stride,
    value_scale_stride,
    table_stride,
    cos_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    OWN_T: tl.constexpr,
    PAGE_T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PADDING: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    SUM_VALUES: tl.constexpr,
):
    """Prepare some heads of a tile of one segment's tokens.

    Grid: (tiles times parts of the heads, segments). The first ``own_tiles * OWN_PARTS`` programs
    of a segment take OWN_T of its own tokens, with HEADS query heads or KV_HEADS KV heads. The
    others take PAGE_T tokens that the segment finds in the pages, or rows of padding, with KV_HEADS
    KV heads. A program past its segment's last tile returns.

    Args:
        query_out_ptr: The first three pointers are the workspace, of `prepare`'s shapes.
        token_ptr: `Pages.token`, or None where tokens are not traced.
        sums_ptr: [>= segments, KV heads, 2, HEAD_SIZE] int64 from `means.make_sums`.
        rows_ptr: [queries] int32 row in the batch of each packed query.
        tokens_ptr: [queries] int32 index of each token in its request; read if traced.
        key_scale_ptr: `Pages.key_scale`, None where pages are not in FP8; the next pointer is
            `Pages.value_scale` likewise.
        query_spans_ptr: `Segments.query_spans`; the next three pointers are fields likewise.
        own_tiles: Tiles of the longest segment's own tokens.
        OWN_T: Own tokens of a program.
        PAGE_T: Tokens in the pages, or rows of padding, of a program.
        HEADS: Query heads of a program.
        KV_HEADS: KV heads of a program.
        BLOCK_D: At least half of either the rotated or the other channels; a power of two.
        BLOCK_V: HEAD_SIZE rounded up to a power of two.
        PADDING: `segments.KEY_PADDING`.
        SUM_KEYS: Whether the mean of keys is needed at a boundary.
        SUM_VALUES: Whether the mean of values is needed at a boundary.
    """
    QUERY_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + KV_HEADS - 1) // KV_HEADS
    OWN_PARTS: tl.constexpr = QUERY_PARTS + KV_PARTS
    segment = tl.program_id(1)
    query_start = tl.load(query_spans_ptr + 2 * segment)
    num_own = tl.load(query_spans_ptr + 2 * segment + 1) - query_start
    key_start = tl.load(key_spans_ptr + 2 * segment)
    num_keys = tl.load(key_spans_ptr + 2 * segment + 1) - key_start
    prefix = num_keys - num_own
    table_at = block_table_ptr + segment.to(tl.int64) * table_stride
    sums_at = sums_ptr + segment.to(tl.int64) * (NUM_KV_HEADS * 2 * HEAD_SIZE)
    summed = tl.load(num_groups_ptr + segment) > 0

    if tl.program_id(0) < own_tiles * OWN_PARTS:
        part = tl.program_id(0) % OWN_PARTS
        first_own = tl.program_id(0) // OWN_PARTS * OWN_T
        # [OWN_T] the segment's own tokens
        index = first_own + tl.arange(0, OWN_T)
        is_own = index < num_own
        packed = (query_start + index).to(tl.int64)
        row = tl.load(rows_ptr + packed, mask=is_own, other=0).to(tl.int64)
        if first_own >= num_own:
            pass
        elif part < QUERY_PARTS:
            take_own_queries(
                query_out_ptr, query_ptr, cos_ptr, sin_ptr,
                packed, row, prefix + index, is_own, part * HEADS, cos_stride,
                query_stride_token, query_stride_head,
                query_out_stride_token, query_out_stride_head,
                NUM_HEADS, HEADS, HEAD_SIZE, ROTARY_DIM, IS_NEOX, BLOCK_D,
            )  # fmt: skip
        else:
            take_own_keys(
                key_out_ptr, value_out_ptr, kv_ptr, token_ptr, sums_at,
                key_ptr, value_ptr, tokens_ptr, key_scale_ptr, value_scale_ptr,
                table_at, cos_ptr, sin_ptr,
                packed, row, prefix + index, key_start + prefix + index, is_own, summed,
                (part - QUERY_PARTS) * KV_HEADS,
                cos_stride, out_stride_token, out_stride_head, kv_stride_block, token_stride_block,
                key_stride_token, key_stride_head, value_stride_token, value_stride_head,
                key_scale_stride, value_scale_stride,
                NUM_KV_HEADS, KV_HEADS, BLOCK_SIZE, HEAD_SIZE, ROTARY_DIM, IS_NEOX,
                BLOCK_D, BLOCK_V, SUM_KEYS, SUM_VALUES,
            )  # fmt: skip
    else:
        program = tl.program_id(0) - own_tiles * OWN_PARTS
        prefix_tiles = tl.cdiv(prefix, PAGE_T)
        tile = program // KV_PARTS
        # [PAGE_T] places in the pages; after the last tile of these, rows past the segment's end
        past = num_keys + (tile - prefix_tiles) * PAGE_T
        place = tl.where(tile < prefix_tiles, tile * PAGE_T, past) + tl.arange(0, PAGE_T)
        valid = place < prefix
        written = valid | ((place >= num_keys) & (place < num_keys + PADDING))
        if tile < prefix_tiles + (PADDING + PAGE_T - 1) // PAGE_T:
            take_held(
                key_out_ptr, value_out_ptr, kv_ptr, sums_at, key_scale_ptr, value_scale_ptr,
                table_at, cos_ptr, sin_ptr,
                place, key_start + place, valid, written, summed,
                program % KV_PARTS * KV_HEADS,
                cos_stride, out_stride_token, out_stride_head, kv_stride_block,
                key_scale_stride, value_scale_stride,
                NUM_KV_HEADS, KV_HEADS, BLOCK_SIZE, HEAD_SIZE, ROTARY_DIM, IS_NEOX,
                BLOCK_D, BLOCK_V, SUM_KEYS, SUM_VALUES,
            )  # fmt: skip


def prepare(
    pages: Pages,
    segments: Segments,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    weights: Weights,
    sums: torch.Tensor,
) -> None:
    """Write a wave's keys and values into their pages, and into the workspace what attention reads.

    Args:
        pages: The layer's pages, dense within a block; the segments' own keys (before RoPE) and
            values are written and, if there, their token indices.
        segments: The wave; row ``key_spans[s, 0] + j`` of the workspace is place j of segment s.
        query: [num_tokens, num_heads, head_size] before RoPE; channels dense.
        key: [num_tokens, num_kv_heads, head_size] before RoPE; channels dense.
        value: As `key`.
        rows: [num_queries] int32 row of each packed query in `query`, `key` and `value`.
        tokens: [num_queries] int32 index of each token in its request; read if pages have token
            indices.
        cos: [num_positions, rotary_dim / 2] in any floating dtype; columns dense.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        query_out: [>= num_queries, num_heads, head_size] in the dtype of `query`, channels dense;
            the first num_queries rows are written, packed, rotated in float32 and rounded once.
        key_out: [>= num_rows, num_kv_heads, head_size] in the pages' dtype, or in the dtype of
            `query` where pages are in FP8; channels dense; written likewise. Rows of padding keep
            what they have.
        value_out: As `key_out`, with its strides, but not rotated; rows of padding become zero.
        weights: What is ranked at a boundary. Units of keys, or of values, are added up only if
            their weight is above 0.
        sums: [>= num_segments, num_kv_heads, 2, head_size] int64 from `means.make_sums`. Row s
            gains the units of segment s's mean if groups of segment s merge.

    Raises:
        ValueError: If a shape, stride or dtype does not fit.
    """
    _, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, channels = pages.kv.shape
    num_segments = len(segments.num_groups)
    head_shape = (num_kv_heads, head_size)
    if channels != 2 * head_size or not key.shape[1:] == value.shape[1:] == head_shape:
        raise ValueError(
            f"key and value of {list(key.shape)} and {list(value.shape)}, and queries of "
            f"{head_size} channels, do not fit pages of {list(pages.kv.shape)}"
        )
    if query_out.shape[0] < segments.num_queries or query_out.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"query_out must be [{segments.num_queries} or more, {num_heads}, {head_size}], "
            f"got {list(query_out.shape)}"
        )
    has_rows = key_out.shape[0] >= segments.num_rows and value_out.shape[0] >= segments.num_rows
    if not has_rows or not key_out.shape[1:] == value_out.shape[1:] == head_shape:
        raise ValueError(
            f"key_out and value_out must be [{segments.num_rows} or more, {num_kv_heads}, "
            f"{head_size}], got {list(key_out.shape)} and {list(value_out.shape)}"
        )
    dtype = query.dtype if pages.is_fp8 else pages.kv.dtype
    if query_out.dtype != query.dtype or not key_out.dtype == value_out.dtype == dtype:
        raise ValueError(
            f"the workspace must be of {query.dtype} (query) and {dtype} (key, value), "
            f"got {query_out.dtype}, {key_out.dtype} and {value_out.dtype}"
        )
    if not query.stride(2) == key.stride(2) == value.stride(2) == query_out.stride(2) == 1:
        raise ValueError("the channels of query, key, value and query_out must be dense")
    if key_out.stride(2) != 1 or key_out.stride() != value_out.stride():
        raise ValueError(
            "key_out and value_out must have the same strides and dense channels, "
            f"got {key_out.stride()} and {value_out.stride()}"
        )
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError(f"pages must be dense within a block, got strides {pages.kv.stride()}")
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise ValueError(
            "cos and sin must have the same strides and dense columns, "
            f"got {cos.stride()} and {sin.stride()}"
        )
    if num_segments == 0 or segments.num_queries == 0:
        return
    if len(sums) < num_segments and (weights.key or weights.value):
        raise ValueError(f"sums must have {num_segments} rows or more, got {len(sums)}")
    heads, kv_heads = min(num_heads, QUERY_HEADS), min(num_kv_heads, KV_HEADS)
    kv_parts = cdiv(num_kv_heads, kv_heads)
    own_tiles = cdiv(segments.max_query_len, OWN_TOKENS)
    page_tiles = cdiv(segments.max_prefix_len, PAGE_TOKENS) + cdiv(KEY_PADDING, PAGE_TOKENS)
    num_programs = own_tiles * (cdiv(num_heads, heads) + kv_parts) + page_tiles * kv_parts
    rotary_dim = 2 * cos.shape[1]
    launch(
        _prepare_kernel,
        (num_programs, num_segments),
        query_out,
        key_out,
        value_out,
        pages.kv,
        pages.token,
        sums,
        query,
        key,
        value,
        rows,
        tokens,
        pages.key_scale,
        pages.value_scale,
        segments.query_spans,
        segments.key_spans,
        segments.block_table,
        segments.num_groups,
        cos,
        sin,
        own_tiles,
        query_out.stride(0),
        query_out.stride(1),
        key_out.stride(0),
        key_out.stride(1),
        pages.kv.stride(0),
        0 if pages.token is None else pages.token.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *pages.scale_strides,
        segments.block_table.stride(0),
        cos.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        ROTARY_DIM=rotary_dim,
        IS_NEOX=is_neox,
        OWN_T=OWN_TOKENS,
        PAGE_T=PAGE_TOKENS,
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK_D=next_power_of_2(max(rotary_dim // 2, cdiv(head_size - rotary_dim, 2))),
        BLOCK_V=next_power_of_2(head_size),
        PADDING=KEY_PADDING,
        SUM_KEYS=weights.key > 0,
        SUM_VALUES=weights.value > 0,
        num_warps=NUM_WARPS if head_size <= 256 else WIDE_WARPS,
    )
