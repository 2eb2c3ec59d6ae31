"""Causal attention of a round's segments over the workspace, where FlashAttention-3 is missing.

Source: FlashAttention-2, arXiv 2307.08691, section 3.1: a tile of queries meets the tiles of keys
in turn and, where a tile has a new maximum, rescales what it has summed so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import cdiv, launch, next_power_of_2
from vllm_cascade.kernels.primitives import LOG2_E, cap_logits, load_sink
from vllm_cascade.kernels.segments import Segments


@triton.jit(
    do_not_specialize=["lse_stride"],
    do_not_specialize_on_alignment=["query_spans_ptr", "key_spans_ptr"],
)
def _attend_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    query_spans_ptr,
    key_spans_ptr,
    sinks_ptr,
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
    SOFT_CAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend a tile of one segment's queries to all keys that they see.

    Grid: (query heads, tiles of the longest segment's queries, segments). A program writes the
    outputs and log-sum-exps of BLOCK_Q queries of one head; one past its segment's end returns.

    Args:
        out_ptr: The tensors and strides up to `value_ptr` are those of `attend`.
        query_spans_ptr: `Segments.query_spans`.
        key_spans_ptr: `Segments.key_spans`.
        sinks_ptr: [query heads] natural logits, or None.
        factor: Factor on a dot product that gives a logit in units of log 2.
        lse_stride: Elements between two heads of `lse_ptr`.
        GROUP: Query heads that share a KV head.
        SOFT_CAP: Soft cap on logits (`cap_logits`), or 0 for none.
        BLOCK_Q: Queries of a program.
        BLOCK_K: Keys looked at together.
        BLOCK_D: HEAD_SIZE rounded up to a power of two, at least 16.
    """
    head = tl.program_id(0)
    segment = tl.program_id(2)
    query_start = tl.load(query_spans_ptr + 2 * segment)
    query_len = tl.load(query_spans_ptr + 2 * segment + 1) - query_start
    # The last queries see the most keys: they go first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    if first >= query_len:
        return
    key_start = tl.load(key_spans_ptr + 2 * segment)
    key_len = tl.load(key_spans_ptr + 2 * segment + 1) - key_start
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
        if SOFT_CAP > 0:
            logit = cap_logits(logit, SOFT_CAP)
        seen = place[None, :] <= (prefix + index)[:, None]
        logit = tl.where(seen & (place < key_len)[None, :], logit, float("-inf"))
        # Every query sees key 0, which is in the first tile: `higher` is finite from there on.
        higher = tl.maximum(highest, tl.max(logit, axis=1))
        shrink = tl.exp2(highest - higher)
        weight = tl.exp2(logit - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        attended = attended * shrink[:, None]
        attended += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        highest = higher
    if sinks_ptr is not None:
        # A sink is a key that every query sees, with a value of zero.
        sink = load_sink(sinks_ptr, head)
        higher = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        attended = attended * shrink[:, None]
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


def _tiles(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Choose BLOCK_Q, BLOCK_K, warps and stages, so that tiles fit a Hopper GPU's shared memory."""
    if block_d > 256:
        return (32, 16, 8, 1) if dtype == torch.float32 else (64, 32, 8, 2)
    if dtype == torch.float32:
        return 32, 32, 4, 1
    return 128, 64 if block_d <= 128 else 32, 8, 3


def attend(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend causally in every segment; the last query of a segment sees the segment's last key.

    Query i of a segment of q queries and k keys sees keys 0 to k - q + i, as with FlashAttention.

    Args:
        out: [>= num_queries, num_heads, head_size] in the dtype of `query`, channels dense; the
            first num_queries rows are written.
        lse: [num_heads, >= num_queries] float32, queries dense; written: natural log of the summed
            exponentials, the sink's included.
        query: [>= num_queries, num_heads, head_size], rotated and packed, channels dense.
        key: [>= num_rows, num_kv_heads, head_size] in the dtype of `query`, rotated, channels
            dense.
        value: As `key`, but not rotated.
        segments: Where each segment's queries and keys start.
        scale: Factor on the logits.
        sinks: [num_heads] natural logits that only take part in the softmax's denominator, or None.
        soft_cap: Keys' logits become ``soft_cap * tanh(logit / soft_cap)``; 0 for no cap.

    Raises:
        ValueError: If a shape, stride or dtype does not fit.
    """
    _, num_heads, head_size = query.shape
    num_segments = len(segments.carry)
    if num_segments == 0 or segments.num_queries == 0:
        return
    if out.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"out must have the heads of query, {list(query.shape[1:])}, got {list(out.shape[1:])}"
        )
    if lse.shape[0] != num_heads or lse.dtype != torch.float32 or lse.stride(1) != 1:
        raise ValueError(
            f"lse must be float32 with {num_heads} dense rows, got {lse.dtype} of "
            f"{list(lse.shape)} with strides {lse.stride()}"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must be [{num_heads}], got {list(sinks.shape)}")
    if not out.stride(2) == query.stride(2) == key.stride(2) == value.stride(2) == 1:
        raise ValueError("the channels of out, query, key and value must be dense")
    block_d = max(16, next_power_of_2(head_size))
    block_q, block_k, num_warps, num_stages = _tiles(query.dtype, block_d)
    grid = (num_heads, cdiv(segments.max_query_len, block_q), num_segments)
    launch(
        _attend_kernel,
        grid,
        out,
        lse,
        query,
        key,
        value,
        segments.query_spans,
        segments.key_spans,
        sinks,
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
        SOFT_CAP=soft_cap,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )
