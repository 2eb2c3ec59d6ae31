"""The direction of the mean of a row's unit keys, and how far keys lie from it.

Sums of unit keys are taken in parts, by a grid of fixed size, and added up by whoever needs the
mean: a row alone is spread over the device as well as many rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges

MAX_KEYS = 2**22
# Rows looked at together.
ROWS_AT_A_TIME = 1024
# A row's keys are summed in at most this many parts, in as many as there is room for.
MAX_PARTS = 64
PARTS_TILE = 16

# Sums of unit keys are kept as integers in units of 2**-40: at most 2**22 keys stay in range.
_SCALE = tl.constexpr(float(2**40))
_POISON = tl.constexpr(-(2**63))


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
def _unit(x):
    """Rows of `x` [M, N] float32 scaled to length one; a zero row stays zero, NaN stays NaN."""
    # Correctly rounded: keys alike but for their length should stay alike.
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    length = tl.where(length < 1e-30, 1e-30, length)
    return x * tl.div_rn(tl.zeros_like(length) + 1.0, length)[:, None]


@triton.jit
def _sum_of_unit_keys(
    kv_ptr,
    block_table_at,
    num_keys,
    head,
    part,
    parts,
    kv_stride_block,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum of one part of a row's unit keys: [CHANNELS] int64, `_POISON` where one is NaN.

    A tile is summed in float32, and which keys are in it depends on nothing but their places; the
    tiles' sums are added as integers. So the total over all parts is the same, to the bit, however
    many parts there are.
    """
    channels = tl.arange(0, CHANNELS)
    num_tiles = tl.cdiv(num_keys, KEYS)
    share = tl.cdiv(num_tiles, parts)
    total = tl.zeros([CHANNELS], tl.int64)
    poisoned = tl.zeros([CHANNELS], tl.int32)
    last = tl.minimum(part * share + share, num_tiles)
    for tile in tl.range(part * share, last, num_stages=STAGES):
        places = tile * KEYS + tl.arange(0, KEYS)
        held = places < num_keys
        blocks = tl.load(block_table_at + places // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        slots = head * BLOCK_SIZE + places % BLOCK_SIZE
        key_at = kv_ptr + blocks * kv_stride_block + slots * (2 * HEAD_SIZE)
        # [KEYS, CHANNELS]
        key = tl.load(
            key_at[:, None] + channels[None, :],
            mask=held[:, None] & (channels[None, :] < HEAD_SIZE),
            other=0.0,
        )
        tile_sum = tl.sum(_unit(key.to(tl.float32)), 0)
        is_nan = tile_sum != tile_sum
        poisoned |= is_nan.to(tl.int32)
        total += (tl.where(is_nan, 0.0, tile_sum) * _SCALE).to(tl.int64)
    return tl.where(poisoned > 0, tl.full([CHANNELS], _POISON, tl.int64), total)


@triton.jit
def mean_key(
    sums_ptr,
    first_sum,
    parts,
    head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Direction of the mean of all unit keys of a row: [CHANNELS] float32, NaN if any is."""
    channels = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.int64)
    poisoned = 0
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = ((first_sum + part).to(tl.int64) * NUM_KV_HEADS + head) * HEAD_SIZE
        # [PARTS, CHANNELS]
        sums = tl.load(
            sums_ptr + at[:, None] + channels[None, :],
            mask=(part[:, None] < parts) & (channels[None, :] < HEAD_SIZE),
            other=0,
        )
        poisoned += tl.sum(tl.sum((sums == _POISON).to(tl.int32), 1))
        total += tl.sum(sums, 0)
    mean = total.to(tl.float32) / _SCALE
    length = tl.sqrt(tl.sum(mean * mean))
    mean = mean / tl.where(length < 1e-30, 1e-30, length)
    return tl.where(poisoned > 0, float("nan"), mean)


@triton.jit
def store_distinctiveness(
    distinct_at,
    kv_ptr,
    groups_at,
    mean,
    head,
    kv_stride_block,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Store minus the cosine of each of a group's keys to the direction `mean`."""
    channels = tl.arange(0, CHANNELS)
    for start in range(0, GROUP, KEYS):
        places = start + tl.arange(0, KEYS)
        blocks = tl.load(groups_at + places // BLOCK_SIZE).to(tl.int64)
        slots = head * BLOCK_SIZE + places % BLOCK_SIZE
        key_at = kv_ptr + blocks * kv_stride_block + slots * (2 * HEAD_SIZE)
        # [KEYS, CHANNELS]
        key = tl.load(
            key_at[:, None] + channels[None, :], mask=channels[None, :] < HEAD_SIZE, other=0.0
        )
        cosine = tl.sum(_unit(key.to(tl.float32)) * mean[None, :], 1)
        tl.store(distinct_at + places, -cosine)


@triton.jit(
    do_not_specialize=["num_rows", "num_sums", "table_stride_row"],
    do_not_specialize_on_alignment=["num_groups_ptr", "num_keys_ptr", "block_table_ptr"],
)
def _unit_key_sums_kernel(
    kv_ptr,
    num_groups_ptr,
    num_keys_ptr,
    block_table_ptr,
    sums_ptr,
    num_rows,
    num_sums,
    kv_stride_block,
    table_stride_row,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    total_rows = rows_with_groups(num_groups_ptr, num_rows, ROWS)
    if total_rows == 0:
        return
    parts = tl.minimum(num_sums // total_rows, MAX_PARTS)
    channels = tl.arange(0, CHANNELS)
    rows_before = 0
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        has_groups = (counts > 0).to(tl.int32)
        ends = tl.cumsum(has_groups, 0)
        rows_here = tl.sum(has_groups)
        # Heads go fastest: they share blocks.
        num_items = rows_here * parts * NUM_KV_HEADS
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            head = item % NUM_KV_HEADS
            part = item // NUM_KV_HEADS % parts
            index = item // NUM_KV_HEADS // parts
            row = (start + tl.sum((ends <= index).to(tl.int32))).to(tl.int64)
            total = _sum_of_unit_keys(
                kv_ptr,
                block_table_ptr + row * table_stride_row,
                tl.load(num_keys_ptr + row),
                head,
                part,
                parts,
                kv_stride_block,
                HEAD_SIZE,
                BLOCK_SIZE,
                CHANNELS,
                KEYS,
                STAGES,
            )
            at = ((rows_before + index) * parts + part).to(tl.int64) * NUM_KV_HEADS + head
            tl.store(sums_ptr + at * HEAD_SIZE + channels, total, mask=channels < HEAD_SIZE)
        rows_before += rows_here


def sum_unit_keys(
    pages: Pages,
    merges: Merges,
    sums: torch.Tensor,
    num_programs: int,
    *,
    tile_keys: int,
    num_warps: int,
    num_stages: int,
    max_registers: int,
) -> None:
    """Sum the unit keys of every row that has groups to merge, in parts.

    Args:
        pages: The layer's pages.
        merges: Which rows merge, and all they hold.
        sums: [num_sums, num_kv_heads, head_size] int64, at least one per row: the rows' parts, one
            row with groups after the other, in units of 2**-40.
        num_programs: Programs that share the work.
        tile_keys: Keys of a tile; another value may change the last bits of a sum.
        num_warps: Warps of a program.
        num_stages: Tiles in flight in a program.
        max_registers: Bound on a thread's registers.
    """
    num_sums, num_kv_heads, head_size = sums.shape
    launch(
        _unit_key_sums_kernel,
        (num_programs,),
        pages.kv,
        merges.num_groups,
        merges.num_keys,
        merges.block_table,
        sums,
        len(merges.num_groups),
        num_sums,
        pages.kv.stride(0),
        merges.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pages.kv.shape[2],
        CHANNELS=next_power_of_2(head_size),
        KEYS=tile_keys,
        STAGES=num_stages,
        ROWS=ROWS_AT_A_TIME,
        MAX_PARTS=MAX_PARTS,
        num_warps=num_warps,
        num_stages=1,
        maxnreg=max_registers,
    )
