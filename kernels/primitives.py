"""Device functions that several kernels share."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def load_sink(sinks_ptr, head):
    """Load the logit of a query head's sink, float32 in units of log 2 as keys' logits are.

    Args:
        sinks_ptr: [query heads] natural logits in any floating dtype.
        head: Query head.
    """
    return tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E


@triton.jit
def load_angles(cos_line, sin_line, valid, ROTARY_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load cosines and sines [rows, BLOCK_D] as float32; zero past the table's width.

    Args:
        cos_line: [rows] pointers to each row's line of the rotary table, ROTARY_DIM / 2 long.
        sin_line: As `cos_line`.
        valid: [rows] which rows are read.
        ROTARY_DIM: Channels that are rotated.
        BLOCK_D: At least half of them.
    """
    pair = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (pair < ROTARY_DIM // 2)[None, :]
    cos = tl.load(cos_line[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_line[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def rotate_tile(
    target,
    source,
    cos,
    sin,
    valid,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    plain=None,
):
    """Copy heads; rotate their first ROTARY_DIM channels in float32 and round once.

    Args:
        target: [rows] pointers to channel 0 of each head to write.
        source: [rows] pointers to channel 0 of each head to read.
        cos: [rows, BLOCK_D] float32 from `load_angles`.
        sin: As `cos`.
        valid: [rows] which rows are read and written.
        HEAD_SIZE: Channels of a head.
        ROTARY_DIM: Channels that are rotated.
        IS_NEOX: Whether channel i pairs with i + ROTARY_DIM / 2 (else 2i with 2i + 1).
        BLOCK_D: At least half of either the rotated or the other channels.
        plain: [rows] pointers to channel 0 of a second copy, which is not rotated; or None.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    # [rows, BLOCK_D] pairs of channels
    pair = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (pair < HALF)[None, :]
    if IS_NEOX:
        first = tl.load(source[:, None] + pair[None, :], mask=inside, other=0.0)
        second = tl.load(source[:, None] + HALF + pair[None, :], mask=inside, other=0.0)
        if plain is not None:
            tl.store(plain[:, None] + pair[None, :], first, mask=inside)
            tl.store(plain[:, None] + HALF + pair[None, :], second, mask=inside)
    else:
        # [rows, 2 * BLOCK_D]
        channel = tl.arange(0, 2 * BLOCK_D)
        both = valid[:, None] & (channel < ROTARY_DIM)[None, :]
        x = tl.load(source[:, None] + channel[None, :], mask=both, other=0.0)
        if plain is not None:
            tl.store(plain[:, None] + channel[None, :], x, mask=both)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK_D, 2)))
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    dtype = target.dtype.element_ty
    if IS_NEOX:
        tl.store(target[:, None] + pair[None, :], turned_first.to(dtype), mask=inside)
        tl.store(target[:, None] + HALF + pair[None, :], turned_second.to(dtype), mask=inside)
    else:
        turned = tl.reshape(tl.join(turned_first, turned_second), (x.shape[0], 2 * BLOCK_D))
        tl.store(target[:, None] + channel[None, :], turned.to(dtype), mask=both)
    if ROTARY_DIM < HEAD_SIZE:
        rest = ROTARY_DIM + tl.arange(0, 2 * BLOCK_D)
        kept = valid[:, None] & (rest < HEAD_SIZE)[None, :]
        tail = tl.load(source[:, None] + rest[None, :], mask=kept, other=0.0)
        tl.store(target[:, None] + rest[None, :], tail.to(dtype), mask=kept)
        if plain is not None:
            tl.store(plain[:, None] + rest[None, :], tail, mask=kept)
