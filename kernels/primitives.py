"""Device functions that several kernels share."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)
# The largest finite number of FP8 (e4m3).
_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def load_sink(sinks_ptr, head):
    """Load the logit of a query head's sink, float32 in units of log 2 as keys' logits are.

    Args:
        sinks_ptr: [query heads] natural logits in any floating dtype.
        head: Query head.
    """
    return tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E


@triton.jit
def cap_logits(logits, SOFT_CAP: tl.constexpr):
    """Cap logits softly: ``SOFT_CAP * tanh(logits / SOFT_CAP)``.

    Args:
        logits: float32 logits in units of log 2.
        SOFT_CAP: The cap on natural logits, positive.

    Returns:
        As `logits`, in the same units.
    """
    # tanh(x) = 1 - 2 / (exp(2x) + 1). The units of `logits` make exp(2x) a power of two.
    CAP: tl.constexpr = SOFT_CAP * _LOG2_E
    return CAP - (2 * CAP) / (tl.exp2(logits * (2 / SOFT_CAP)) + 1)


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
def to_e4m3(x, scale):
    """Divide by a scale and round to what FP8 (e4m3) can hold, to nearest, ties to even.

    Triton's interpreter casts wrongly where a cast rounds. What is rounded before is cast to
    `tl.float8e4nv` and back without a loss, by any cast.

    Args:
        x: A tile of numbers of any floating dtype.
        scale: float32 scale, broadcast against `x`.

    Returns:
        As `x`, float32. What is beyond +-448 becomes +-448; NaN stays NaN.
    """
    x = x.to(tl.float32)
    x = tl.div_rn(x, tl.zeros_like(x) + scale)
    x = tl.where(x > _E4M3_MAX, _E4M3_MAX, tl.where(x < -_E4M3_MAX, -_E4M3_MAX, x))
    # Three of the 23 bits of a mantissa stay.
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2**-6 numbers are multiples of 2**-9, as float32 numbers from 2**14 to 2**15 are.
    subnormal = (x + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return tl.where(x == x, rounded, x)


@triton.jit
def split_words(words, COMPILED: tl.constexpr):
    """Turn the two FP8 numbers (e4m3) of each 16-bit word into float16, without a loss.

    Tensor cores take numbers of 16 bits from shared memory in one instruction for a tile, and bytes
    one by one. So FP8 tiles that are multiplied are loaded as words.

    Args:
        words: A tile of int16.
        COMPILED: Whether the kernel is compiled, not interpreted.

    Returns:
        Two tiles: of the words' low bytes, which come first in memory, and of their high bytes.
    """
    if COMPILED:
        # Two words at a time: their low bytes side by side, then their high bytes.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    low = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    high = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def load_scale(scale_ptr, head, stride):
    """Load the float32 scale of a KV head, or of several.

    Args:
        scale_ptr: `Pages.key_scale` or `Pages.value_scale`.
        head: KV head, or a tile of them.
        stride: Elements between the scales of two heads; 0 where all heads share one.
    """
    return tl.load(scale_ptr + head * stride)


@triton.jit
def _store(at, x, mask):
    """Store numbers in the dtype of the memory."""
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


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
    scale=None,
):
    """Copy heads; rotate their first ROTARY_DIM channels in float32 and round once.

    With a scale, one of source and second copy is in FP8. A source in FP8 is multiplied by the
    scale. Of another source the second copy is in FP8, and what is rotated is what can be read
    back from there.

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
        scale: float32 scale of the head in FP8, or None where nothing is.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    # [rows, BLOCK_D] pairs of channels
    pair = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (pair < HALF)[None, :]
    if IS_NEOX:
        first = tl.load(source[:, None] + pair[None, :], mask=inside, other=0.0)
        second = tl.load(source[:, None] + HALF + pair[None, :], mask=inside, other=0.0)
        if scale is not None and plain is not None:
            first, second = to_e4m3(first, scale), to_e4m3(second, scale)
        if plain is not None:
            _store(plain[:, None] + pair[None, :], first, inside)
            _store(plain[:, None] + HALF + pair[None, :], second, inside)
        if scale is not None:
            first, second = first.to(tl.float32) * scale, second.to(tl.float32) * scale
    else:
        # [rows, 2 * BLOCK_D]
        channel = tl.arange(0, 2 * BLOCK_D)
        both = valid[:, None] & (channel < ROTARY_DIM)[None, :]
        x = tl.load(source[:, None] + channel[None, :], mask=both, other=0.0)
        if scale is not None and plain is not None:
            x = to_e4m3(x, scale)
        if plain is not None:
            _store(plain[:, None] + channel[None, :], x, both)
        if scale is not None:
            x = x.to(tl.float32) * scale
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
        if scale is not None and plain is not None:
            tail = to_e4m3(tail, scale)
        if plain is not None:
            _store(plain[:, None] + rest[None, :], tail, kept)
        if scale is not None:
            tail = tail.to(tl.float32) * scale
        tl.store(target[:, None] + rest[None, :], tail.to(dtype), mask=kept)
