"""Mean directions of a row's unit keys and unit values, and each token's cosine to them.

The mean is over the places that `kernels.weights` names, a quarter of all that a row holds.

Sums of unit vectors are integers. So the sums are the same to the bit whatever the order and the
number of programs, as long as a tile has at least 16 bytes of a vector for each thread: then the
squares of a vector are summed in the same order too. In FP8, squares are summed without rounding,
in any order; scales are left out, for a unit vector does not depend on its length. Prefill adds
units up where it reads keys and values anyway (`kernels.prefill.workspace`); for single tokens
there is a launch (`add_units`). The merge kernel sets the sums back to zero.

Source: KeyDiff, arXiv 2504.15364, which keeps the keys that are least similar to the mean key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import MEAN_PERIOD, MEAN_RUN

# Most rows that a program looks at together.
ROWS_AT_A_TIME = 1024
# Most programs that share the keys of a row.
MAX_PARTS = 64

_RUN = tl.constexpr(MEAN_RUN)
_PERIOD = tl.constexpr(MEAN_PERIOD)
# Sums are in units of 2**-24: no sum of elements of unit vectors overflows 64 bits.
_SCALE = tl.constexpr(float(2**24))


def rows_at_a_time(max_rows: int) -> int:
    """Return how many rows a program looks at together, where there are at most `max_rows`."""
    return min(max(next_power_of_2(max_rows), 16), ROWS_AT_A_TIME)


@triton.jit
def rows_with_groups(num_groups_ptr, num_rows, ROWS: tl.constexpr):
    """Count the rows that have groups to merge.

    Args:
        num_groups_ptr: [num_rows] int32 `Merges.num_groups`.
        num_rows: Rows.
        ROWS: Rows looked at together.
    """
    total = 0
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        total += tl.sum((counts > 0).to(tl.int32))
    return total


@triton.jit
def is_in_mean(place):
    """Whether the mean is also over the token at a logical place."""
    return place % _PERIOD < _RUN


@triton.jit
def add_units_of(
    sums_at,
    key,
    value,
    CHANNELS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """Add the units of some tokens' keys and values to their sums in memory.

    Args:
        sums_at: Pointer to [2, HEAD_SIZE] int64 sums of keys and of values, in units of 2**-24.
        key: [M, CHANNELS] of at most 128 tokens; zeros add nothing.
        value: As `key`.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        HEAD_SIZE: Channels of a key or value.
        HAS_KEY: Whether keys are summed.
        HAS_VALUE: Whether values are summed.
        IS_FP8: Whether all elements are numbers of FP8 (e4m3). Their squares are summed exactly.
    """
    part = tl.arange(0, 2)
    channel = tl.arange(0, CHANNELS)
    # [M, CHANNELS, 2]: keys and values at once, for each sum over tokens makes threads wait
    x = tl.join(key, value).to(tl.float32)
    # [M, 2]
    squares = x * x
    if IS_FP8:
        # A square is a multiple of 2**-18 below 2**18: float64 holds the sum of any 2**17 of them.
        squares = squares.to(tl.float64)
    length = tl.sqrt_rn(tl.sum(squares, 1).to(tl.float32))
    # A vector that is not finite has no direction: it adds nothing.
    is_finite = length < float("inf")
    length = tl.where(is_finite, tl.where(length < 1e-30, 1e-30, length), 1.0)
    scale = tl.div_rn(tl.zeros_like(length) + _SCALE, length)
    counted = (tl.where(is_finite[:, None, :], x, 0.0) * scale[:, None, :]).to(tl.int32)
    is_summed = (HAS_KEY & (part == 0)) | (HAS_VALUE & (part == 1))
    tl.atomic_add(
        sums_at + channel[:, None] + HEAD_SIZE * part[None, :],
        tl.sum(counted, 0).to(tl.int64),
        mask=(channel < HEAD_SIZE)[:, None] & is_summed[None, :],
        sem="relaxed",
    )


@triton.jit
def mean_direction(sums_at, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Scale a sum of unit vectors to length one: [CHANNELS] float32; a zero sum stays zero.

    Args:
        sums_at: Pointer to [HEAD_SIZE] int64, in units of 2**-24.
        HEAD_SIZE: Channels of a key or value.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
    """
    channel = tl.arange(0, CHANNELS)
    total = tl.load(sums_at + channel, mask=channel < HEAD_SIZE, other=0).to(tl.float32) / _SCALE
    length = tl.sqrt(tl.sum(total * total))
    return total / tl.where(length < 1e-30, 1e-30, length)


@triton.jit
def _unit(x):
    """Scale the rows of `x` [M, N] float32 to length one; a zero row stays zero.

    A row that is not finite becomes NaN.
    """
    # Correctly rounded, so that vectors that differ in length alone have the same unit vector.
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    length = tl.where(length < 1e-30, 1e-30, length)
    return x * tl.div_rn(tl.zeros_like(length) + 1.0, length)[:, None]


@triton.jit
def store_distinctiveness(
    key_at,
    value_at,
    kv_ptr,
    groups_at,
    sums_at,
    head,
    kv_stride_block,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    """Store the distinctiveness of a group's keys and values: minus the cosine to the mean.

    Args:
        key_at: Pointer to [GROUP] float32 for keys, written if HAS_KEY.
        value_at: Pointer to [GROUP] float32 for values, written if HAS_VALUE.
        kv_ptr: `Pages.kv`, whose blocks lie `kv_stride_block` elements apart.
        groups_at: Pointer to the group's block ids, int32.
        sums_at: Pointer to the [2, HEAD_SIZE] int64 sums of the row and KV head.
        head: KV head.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        GROUP: Tokens of a group.
        KEYS: Tokens of a tile.
        HAS_KEY: Whether keys are ranked.
        HAS_VALUE: Whether values are ranked.
    """
    channels = tl.arange(0, CHANNELS)
    in_head = channels[None, :] < HEAD_SIZE
    if HAS_KEY:
        key_mean = mean_direction(sums_at, HEAD_SIZE, CHANNELS)
    if HAS_VALUE:
        value_mean = mean_direction(sums_at + HEAD_SIZE, HEAD_SIZE, CHANNELS)
    for start in range(0, GROUP, KEYS):
        places = start + tl.arange(0, KEYS)
        blocks = tl.load(groups_at + places // BLOCK_SIZE).to(tl.int64)
        slots = head * BLOCK_SIZE + places % BLOCK_SIZE
        at = (kv_ptr + blocks * kv_stride_block + slots * (2 * HEAD_SIZE))[:, None]
        at += channels[None, :]
        # [KEYS, CHANNELS]; both loads are issued before either result is needed
        if HAS_KEY:
            key = tl.load(at, mask=in_head, other=0.0)
        if HAS_VALUE:
            value = tl.load(at + HEAD_SIZE, mask=in_head, other=0.0)
        if HAS_KEY:
            cosine = tl.sum(_unit(key.to(tl.float32)) * key_mean[None, :], 1)
            tl.store(key_at + places, -cosine)
        if HAS_VALUE:
            cosine = tl.sum(_unit(value.to(tl.float32)) * value_mean[None, :], 1)
            tl.store(value_at + places, -cosine)


@triton.jit(
    do_not_specialize=["num_rows", "table_stride_row"],
    do_not_specialize_on_alignment=["num_groups_ptr", "num_keys_ptr", "block_table_ptr"],
)
def _add_units_kernel(
    kv_ptr,
    num_groups_ptr,
    num_keys_ptr,
    block_table_ptr,
    sums_ptr,
    num_rows,
    kv_stride_block,
    table_stride_row,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    """Add up the units of the mean, for all rows that have groups to merge.

    Grid: (programs,), of any number. Program p takes items p, p + programs, p + 2 * programs and so
    on; an item is a row with groups, a part of the row's keys and a KV head.

    Args:
        kv_ptr: `Pages.kv`, whose blocks lie `kv_stride_block` elements apart.
        num_groups_ptr: `Merges.num_groups`; the next two pointers are fields likewise.
        sums_ptr: [>= num_rows, NUM_KV_HEADS, 2, HEAD_SIZE] int64, in units of 2**-24; gains units.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        KEYS: Keys of a tile.
        ROWS: Rows looked at together.
        MAX_PARTS: Most parts of a row's keys.
        HAS_KEY: Whether keys are summed.
        HAS_VALUE: Whether values are summed.
    """
    total_rows = rows_with_groups(num_groups_ptr, num_rows, ROWS)
    if total_rows == 0:
        return
    # As many parts as keep every program busy. More parts would add to memory more often.
    parts = tl.cdiv(2 * tl.num_programs(0), total_rows * NUM_KV_HEADS)
    parts = tl.minimum(parts, MAX_PARTS)
    channels = tl.arange(0, CHANNELS)
    IS_FP8: tl.constexpr = kv_ptr.dtype.element_ty == tl.float8e4nv
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        has_groups = (counts > 0).to(tl.int32)
        ends = tl.cumsum(has_groups, 0)
        # KV heads vary fastest, for they share blocks.
        num_items = tl.sum(has_groups) * parts * NUM_KV_HEADS
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            head = item % NUM_KV_HEADS
            part = item // NUM_KV_HEADS % parts
            index = item // NUM_KV_HEADS // parts
            row = (start + tl.sum((ends <= index).to(tl.int32))).to(tl.int64)
            num_keys = tl.load(num_keys_ptr + row)
            table_at = block_table_ptr + row * table_stride_row
            sums_at = sums_ptr + (row * NUM_KV_HEADS + head) * (2 * HEAD_SIZE)
            # Only the places that the mean is over are counted; `places` skips the others.
            num_counted = num_keys // _PERIOD * _RUN + tl.minimum(num_keys % _PERIOD, _RUN)
            share = tl.cdiv(tl.cdiv(num_counted, KEYS), parts) * KEYS
            last = tl.minimum(part * share + share, num_counted)
            for first in range(part * share, last, KEYS):
                counted = first + tl.arange(0, KEYS)
                held = counted < last
                places = counted // _RUN * _PERIOD + counted % _RUN
                blocks = tl.load(table_at + places // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
                slots = head * BLOCK_SIZE + places % BLOCK_SIZE
                # [KEYS, CHANNELS]
                at = (kv_ptr + blocks * kv_stride_block + slots * (2 * HEAD_SIZE))[:, None]
                at += channels[None, :]
                within = held[:, None] & (channels[None, :] < HEAD_SIZE)
                key = tl.load(at, mask=within, other=0.0)
                value = tl.load(at + HEAD_SIZE, mask=within, other=0.0)
                if IS_FP8:
                    key, value = key.to(tl.float32), value.to(tl.float32)
                add_units_of(sums_at, key, value, CHANNELS, HEAD_SIZE, HAS_KEY, HAS_VALUE, IS_FP8)


def make_sums(
    max_rows: int, num_kv_heads: int, head_size: int, device: torch.device
) -> torch.Tensor:
    """Allocate sums of unit vectors, all zero, for as many rows as merge at once.

    Args:
        max_rows: Most rows of a call.
        num_kv_heads: KV heads.
        head_size: Channels of a key or value.
        device: Where.

    Returns:
        [max_rows, num_kv_heads, 2, head_size] int64 in units of 2**-24: sums of keys, then sums of
        values.
    """
    shape = (max_rows, num_kv_heads, 2, head_size)
    return torch.zeros(shape, dtype=torch.int64, device=device)


def add_units(
    pages: Pages,
    merges: Merges,
    sums: torch.Tensor,
    num_programs: int,
    *,
    has_key: bool,
    has_value: bool,
    tile_keys: int,
    num_warps: int,
    max_registers: int,
) -> None:
    """Add up the unit keys and unit values of the mean, of every row that has groups to merge.

    The caller has checked pages, merges and sums, as `merge_groups` does.

    Args:
        pages: The layer's pages, dense within a block.
        merges: Which rows merge, and the blocks that each row holds.
        sums: [>= num_rows, num_kv_heads, 2, head_size] int64 from `make_sums`; zero before.
        num_programs: Programs that share the work.
        has_key: Whether keys are summed.
        has_value: Whether values are summed.
        tile_keys: Keys of a tile.
        num_warps: Warps of a program.
        max_registers: Bound on a thread's registers.
    """
    _, num_kv_heads, _, head_size = sums.shape
    launch(
        _add_units_kernel,
        (num_programs,),
        pages.kv,
        merges.num_groups,
        merges.num_keys,
        merges.block_table,
        sums,
        len(merges.num_groups),
        pages.kv.stride(0),
        merges.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pages.kv.shape[2],
        CHANNELS=next_power_of_2(head_size),
        KEYS=tile_keys,
        ROWS=rows_at_a_time(len(sums)),
        MAX_PARTS=MAX_PARTS,
        HAS_KEY=has_key,
        HAS_VALUE=has_value,
        num_warps=num_warps,
        num_stages=1,
        maxnreg=max_registers,
    )
