"""Writes new keys (before RoPE) and values into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import load_scale, to_e4m3


@triton.jit(
    do_not_specialize_on_alignment=["rows_ptr", "slots_ptr", "tokens_ptr"],
)
def _write_kernel(
    kv_ptr,
    token_ptr,
    key_ptr,
    value_ptr,
    rows_ptr,
    slots_ptr,
    tokens_ptr,
    key_scale_ptr,
    value_scale_ptr,
    kv_stride_block,
    token_stride_block,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    key_scale_stride,
    value_scale_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the key and value of one token into their page, for every KV head.

    Grid: (entries,). A program whose slot is negative returns at once.

    Args:
        kv_ptr: `Pages.kv`, whose blocks lie `kv_stride_block` elements apart.
        token_ptr: `Pages.token`, or None where tokens are not traced.
        tokens_ptr: [entries] int32 index of each token in its request; None as `token_ptr` is.
        key_scale_ptr: `Pages.key_scale`, None where pages are not in FP8; the next pointer is
            `Pages.value_scale` likewise.
        rows_ptr: [entries] int32 row of `key_ptr` and `value_ptr`.
        slots_ptr: [entries] int64 ``block * BLOCK_SIZE + offset``, -1 to skip the entry.
        HEADS: NUM_KV_HEADS rounded up to a power of two.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
    """
    entry = tl.program_id(0)
    slot = tl.load(slots_ptr + entry)
    if slot < 0:
        return
    row = tl.load(rows_ptr + entry).to(tl.int64)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE

    heads = tl.arange(0, HEADS)
    channels = tl.arange(0, CHANNELS)
    # [HEADS, CHANNELS]
    keep = (heads[:, None] < NUM_KV_HEADS) & (channels[None, :] < HEAD_SIZE)
    key_at = key_ptr + row * key_stride_token + heads[:, None] * key_stride_head
    key = tl.load(key_at + channels[None, :], mask=keep)
    value_at = value_ptr + row * value_stride_token + heads[:, None] * value_stride_head
    value = tl.load(value_at + channels[None, :], mask=keep)
    if key_scale_ptr is not None:
        # [HEADS, 1]; past the last head one that is there is loaded, and nothing stored
        head = tl.minimum(heads, NUM_KV_HEADS - 1)[:, None]
        key = to_e4m3(key, load_scale(key_scale_ptr, head, key_scale_stride))
        value = to_e4m3(value, load_scale(value_scale_ptr, head, value_scale_stride))

    head_slots = heads * BLOCK_SIZE + offset
    page_at = kv_ptr + block * kv_stride_block + head_slots[:, None] * (2 * HEAD_SIZE)
    page_at += channels[None, :]
    tl.store(page_at, key.to(kv_ptr.dtype.element_ty), mask=keep)
    tl.store(page_at + HEAD_SIZE, value.to(kv_ptr.dtype.element_ty), mask=keep)
    if token_ptr is not None:
        token = tl.load(tokens_ptr + entry)
        token_at = token_ptr + block * token_stride_block + head_slots
        tl.store(token_at, token + tl.zeros_like(heads), mask=heads < NUM_KV_HEADS)


def write(
    pages: Pages,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor | None,
) -> None:
    """Store some rows of a batch's keys and values in their page slots, for every KV head.

    Args:
        pages: The layer's pages, dense within a block; `kv` and, if there, `token` are written.
        key: [num_tokens, num_kv_heads, head_size] before RoPE, channels dense; rows and heads may
            be strided, as slices of a fused projection are.
        value: As `key`.
        rows: [num_entries] int32 row of `key` and `value`.
        slots: [num_entries] int64 ``block * block_size + offset``, -1 to skip the entry.
        tokens: [num_entries] int32 index of each token in its request; None where pages have no
            token indices.

    Raises:
        ValueError: If a shape or stride does not fit, or pages with token indices get none.
    """
    _, num_kv_heads, block_size, channels = pages.kv.shape
    head_size = channels // 2
    if key.shape[1:] != (num_kv_heads, head_size) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be [num_tokens, {num_kv_heads}, {head_size}], "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(
            "the channels of key and value must be dense, "
            f"got strides {key.stride()} and {value.stride()}"
        )
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError(f"pages must be dense within a block, got strides {pages.kv.stride()}")
    if pages.token is not None and tokens is None:
        raise ValueError("traced pages need the tokens' indices, got None")
    if len(rows) == 0:
        return
    launch(
        _write_kernel,
        (len(rows),),
        pages.kv,
        pages.token,
        key,
        value,
        rows,
        slots,
        None if pages.token is None else tokens,
        pages.key_scale,
        pages.value_scale,
        pages.kv.stride(0),
        0 if pages.token is None else pages.token.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *pages.scale_strides,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        HEADS=next_power_of_2(num_kv_heads),
        CHANNELS=next_power_of_2(head_size),
        num_warps=4,
    )
