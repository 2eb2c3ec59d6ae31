"""Directions of the mean of a row's unit keys and unit values, and how far each lies from them.

The mean is over the places that `weights` names, a quarter of all that a row holds.

Sums of unit vectors are integers, so they are the same to the bit in whatever order and by however
many programs they are added up, as long as a tile has at least 16 bytes of a vector for each
thread: then the length of a vector is summed in the same order too. Prefill adds them where it
reads keys and values anyway (`prefill_workspace`); single tokens have a launch of their own
(`add_units`). Whoever merges sets the sums back to zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import MEAN_PERIOD, MEAN_RUN

# Rows looked at together, at most.
ROWS_AT_A_TIME = 1024
# A row's keys are summed by at most this many programs.
MAX_PARTS = 64

_RUN = tl.constexpr(MEAN_RUN)
_PERIOD = tl.constexpr(MEAN_PERIOD)
# Elements of unit vectors are counted in units of 2**-24, which 64 bits never overflow.
_SCALE = tl.constexpr(float(2**24))


def rows_at_a_time(max_rows: int) -> int:
    """Rows that a program looks at together, where there are at most `max_rows`."""
    return min(max(next_power_of_2(max_rows), 16), ROWS_AT_A_TIME)


@triton.jit
def rows_with_groups(num_groups_ptr, num_rows, ROWS: tl.constexpr):
    """How many rows have something to merge."""
    total = 0
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        total += tl.sum((counts > 0).to(tl.int32))
    return total


@triton.jit
def is_in_mean(place):
    """Whether the mean is over what lies at a place."""
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
):
    """Add the units of some tokens' keys and values to their sums in memory.

    Args:
        sums_at: Pointer to the first channel of the keys' sum; the values' follows.
        key: [M, CHANNELS] of at most 128 tokens; zeros add nothing.
        value: As `key`.
        CHANNELS: Columns of `key`.
        HEAD_SIZE: How many of them there are in a sum.
        HAS_KEY: Whether keys are summed.
        HAS_VALUE: Whether values are summed.
    """
    part = tl.arange(0, 2)
    channel = tl.arange(0, CHANNELS)
    # [M, CHANNELS, 2]: both at once, for threads wait for each other in a sum over tokens
    x = tl.join(key, value).to(tl.float32)
    # [M, 2]
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    # What is not finite has no direction.
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
    """Direction of a sum of unit vectors: [CHANNELS] float32."""
    channel = tl.arange(0, CHANNELS)
    total = tl.load(sums_at + channel, mask=channel < HEAD_SIZE, other=0).to(tl.float32) / _SCALE
    length = tl.sqrt(tl.sum(total * total))
    return total / tl.where(length < 1e-30, 1e-30, length)


@triton.jit
def _unit(x):
    """Rows of `x` [M, N] float32 scaled to length one; a zero row stays zero.

    A row that is not finite becomes NaN.
    """
    # Correctly rounded: vectors alike but for their length should stay alike.
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
    """Store minus the cosine of each of a group's keys and values to the mean of all."""
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
        # [KEYS, CHANNELS]; both are on their way before the first is looked at
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
    """Persistent programs walk over (row with groups, part of its keys, KV head)."""
    total_rows = rows_with_groups(num_groups_ptr, num_rows, ROWS)
    if total_rows == 0:
        return
    # Enough work for every program, and no more sums in memory than that takes.
    parts = tl.cdiv(2 * tl.num_programs(0), total_rows * NUM_KV_HEADS)
    parts = tl.minimum(parts, MAX_PARTS)
    channels = tl.arange(0, CHANNELS)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        has_groups = (counts > 0).to(tl.int32)
        ends = tl.cumsum(has_groups, 0)
        # Heads go fastest: they share blocks.
        num_items = tl.sum(has_groups) * parts * NUM_KV_HEADS
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            head = item % NUM_KV_HEADS
            part = item // NUM_KV_HEADS % parts
            index = item // NUM_KV_HEADS // parts
            row = (start + tl.sum((ends <= index).to(tl.int32))).to(tl.int64)
            num_keys = tl.load(num_keys_ptr + row)
            table_at = block_table_ptr + row * table_stride_row
            sums_at = sums_ptr + (row * NUM_KV_HEADS + head) * (2 * HEAD_SIZE)
            # The places of the mean, counted without those between.
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
                add_units_of(sums_at, key, value, CHANNELS, HEAD_SIZE, HAS_KEY, HAS_VALUE)


def make_sums(
    max_rows: int, num_kv_heads: int, head_size: int, device: torch.device
) -> torch.Tensor:
    """Sums of unit vectors for as many rows as merge at once, all zero.

    Args:
        max_rows: Most rows of a call.
        num_kv_heads: KV heads.
        head_size: Channels of a key or value.
        device: Where.

    Returns:
        [max_rows, num_kv_heads, 2, head_size] int64 in units of 2**-24; keys, then values.
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

    Args:
        pages: The layer's pages.
        merges: Which rows merge, and all they hold.
        sums: From `make_sums`, at least a row for each; zero before.
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
