"""Chooses the survivors of merge groups and moves them, in at most two launches of fixed size.

Nearly every step has nothing to merge, and the launches sit in a CUDA graph all the same. So both
are small grids of persistent programs that look at the number of groups of all rows first, and
walk over (row, KV head, part of the work) only where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges

MAX_WINDOW = 1024
MAX_KEYS = 2**22
PROGRAMS_PER_SM = 4

# Rows looked at together.
_ROWS = 1024
# A row's keys are summed in at most this many parts, in as many as there is room for.
_MAX_PARTS = 64
_PARTS_TILE = 16
# Sums of unit keys are kept as integers in units of 2**-40: at most 2**22 keys stay in range.
_SCALE = tl.constexpr(float(2**40))
_POISON = tl.constexpr(-(2**63))
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _rows_with_groups(num_groups_ptr, num_rows, ROWS: tl.constexpr):
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
def _mean_key(
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
def _store_distinctiveness(
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


@triton.jit
def _comparable(x):
    """NaN below everything, infinities as the extreme finite values of their sign or beyond."""
    return tl.where(x != x, float("-inf"), tl.where(x < _SMALLEST, _SMALLEST, x))


@triton.jit
def _load_score(score_ptr, groups_at, places, head, score_stride_block, BLOCK_SIZE: tl.constexpr):
    blocks = tl.load(groups_at + places // BLOCK_SIZE).to(tl.int64)
    slots = head * BLOCK_SIZE + places % BLOCK_SIZE
    return _comparable(tl.load(score_ptr + blocks * score_stride_block + slots))


@triton.jit
def _count_below(x, places, others, other_places, WINDOW: tl.constexpr):
    """How many `others` of the same window are smaller than each `x`, or equal and older."""
    # [len(x), len(others)]
    mine, other = x[:, None], others[None, :]
    place, other_place = places[:, None], other_places[None, :]
    below = (other < mine) | ((other == mine) & (other_place < place))
    below = below & (other_place // WINDOW == place // WINDOW)
    return tl.sum(below.to(tl.int32), 1)


@triton.jit
def _store_worth(
    worth_at,
    distinct_at,
    score_ptr,
    groups_at,
    head,
    key_weight,
    score_stride_block,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Store rank(score) + key_weight * rank(distinctiveness) of each token of a group."""
    for start in range(0, GROUP, TOKENS):
        places = start + tl.arange(0, TOKENS)
        score = _load_score(score_ptr, groups_at, places, head, score_stride_block, BLOCK_SIZE)
        score_rank = tl.zeros([TOKENS], tl.int32)
        distinct_rank = tl.zeros([TOKENS], tl.int32)
        if HAS_WEIGHT:
            distinct = _comparable(tl.load(distinct_at + places))
        span = start // SPAN * SPAN
        for other_start in range(span, span + SPAN, TOKENS):
            others = other_start + tl.arange(0, TOKENS)
            other_score = _load_score(
                score_ptr, groups_at, others, head, score_stride_block, BLOCK_SIZE
            )
            score_rank += _count_below(score, places, other_score, others, WINDOW)
            if HAS_WEIGHT:
                other_distinct = _comparable(tl.load(distinct_at + others))
                distinct_rank += _count_below(distinct, places, other_distinct, others, WINDOW)
        worth = score_rank.to(tl.float32)
        if HAS_WEIGHT:
            worth += key_weight * distinct_rank.to(tl.float32)
        tl.store(worth_at + places, worth)


@triton.jit
def _store_sources(
    source_at,
    worth_at,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Store the survivors' places in a group, in order: the better half of every window."""
    taken = 0
    for start in range(0, GROUP, TOKENS):
        places = start + tl.arange(0, TOKENS)
        worth = tl.load(worth_at + places)
        rank = tl.zeros([TOKENS], tl.int32)
        span = start // SPAN * SPAN
        for other_start in range(span, span + SPAN, TOKENS):
            others = other_start + tl.arange(0, TOKENS)
            rank += _count_below(worth, places, tl.load(worth_at + others), others, WINDOW)
        survives = (rank >= WINDOW // 2).to(tl.int32)
        target = taken + tl.cumsum(survives, 0) - survives
        tl.store(source_at + target, places, mask=survives > 0)
        taken += tl.sum(survives)


@triton.jit
def _move(
    kv_ptr,
    score_ptr,
    token_ptr,
    source_at,
    groups_at,
    head,
    kv_stride_block,
    score_stride_block,
    token_stride_block,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    MOVE: tl.constexpr,
    MOVE_CHANNELS: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
):
    """Bring the survivors of a group into its first half.

    Survivor d goes to place d from source(d), and source(d) >= d because survivors stay in order.
    The tile of survivors [t, t + MOVE) writes places below t + MOVE alone, and every later tile
    reads places source(d) >= d >= t + MOVE: nothing is overwritten before a later tile reads it.
    Within a tile, and against earlier tiles' reads, the barrier parts all reads from the writes.
    """
    channels = tl.arange(0, MOVE_CHANNELS)
    has_channel = channels[None, :] < 2 * HEAD_SIZE
    for start in range(0, GROUP // 2, MOVE):
        targets = start + tl.arange(0, MOVE)
        sources = tl.load(source_at + targets)
        source_blocks = tl.load(groups_at + sources // BLOCK_SIZE).to(tl.int64)
        source_slots = head * BLOCK_SIZE + sources % BLOCK_SIZE
        target_blocks = tl.load(groups_at + targets // BLOCK_SIZE).to(tl.int64)
        target_slots = head * BLOCK_SIZE + targets % BLOCK_SIZE
        source_at_kv = source_blocks * kv_stride_block + source_slots * (2 * HEAD_SIZE)
        target_at_kv = target_blocks * kv_stride_block + target_slots * (2 * HEAD_SIZE)

        # [MOVE, MOVE_CHANNELS]
        kv = tl.load(kv_ptr + source_at_kv[:, None] + channels[None, :], mask=has_channel)
        score = tl.load(score_ptr + source_blocks * score_stride_block + source_slots)
        if HAS_TOKEN:
            token = tl.load(token_ptr + source_blocks * token_stride_block + source_slots)
        tl.debug_barrier()
        tl.store(kv_ptr + target_at_kv[:, None] + channels[None, :], kv, mask=has_channel)
        tl.store(score_ptr + target_blocks * score_stride_block + target_slots, score)
        if HAS_TOKEN:
            tl.store(token_ptr + target_blocks * token_stride_block + target_slots, token)


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
    total_rows = _rows_with_groups(num_groups_ptr, num_rows, ROWS)
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


@triton.jit(
    do_not_specialize=["num_rows", "num_sums", "groups_stride_row", "groups_stride_group"],
    do_not_specialize_on_alignment=["groups_ptr", "num_groups_ptr"],
)
def _merge_kernel(
    kv_ptr,
    score_ptr,
    token_ptr,
    groups_ptr,
    num_groups_ptr,
    sums_ptr,
    values_ptr,
    sources_ptr,
    counters_ptr,
    num_rows,
    num_sums,
    key_weight,
    kv_stride_block,
    score_stride_block,
    token_stride_block,
    groups_stride_row,
    groups_stride_group,
    values_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    MOVE: tl.constexpr,
    MOVE_CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_TOKEN: tl.constexpr,
    HAS_COUNTERS: tl.constexpr,
):
    total_rows = _rows_with_groups(num_groups_ptr, num_rows, ROWS)
    if total_rows == 0:
        return
    parts = tl.minimum(num_sums // total_rows, MAX_PARTS)
    program = tl.program_id(0).to(tl.int64)
    distinct_at = values_ptr + program * 2 * values_stride
    worth_at = distinct_at + values_stride
    source_at = sources_ptr + program * values_stride
    local_rows = tl.arange(0, ROWS)
    rows_before = 0
    merged = tl.full([], 0, tl.int32)
    for start in range(0, num_rows, ROWS):
        counts = tl.load(
            num_groups_ptr + start + local_rows, mask=start + local_rows < num_rows, other=0
        )
        has_groups = (counts > 0).to(tl.int32)
        ends = tl.cumsum(counts, 0)
        num_items = tl.sum(counts) * NUM_KV_HEADS
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            head = item % NUM_KV_HEADS
            index = item // NUM_KV_HEADS
            local_row = tl.sum((ends <= index).to(tl.int32))
            group = index - tl.sum(tl.where(local_rows < local_row, counts, 0))
            row = (start + local_row).to(tl.int64)
            groups_at = groups_ptr + row * groups_stride_row + group * groups_stride_group
            if HAS_WEIGHT:
                row_index = rows_before + tl.sum(tl.where(local_rows < local_row, has_groups, 0))
                mean = _mean_key(
                    sums_ptr,
                    row_index * parts,
                    parts,
                    head,
                    NUM_KV_HEADS,
                    HEAD_SIZE,
                    CHANNELS,
                    PARTS,
                )
                _store_distinctiveness(
                    distinct_at,
                    kv_ptr,
                    groups_at,
                    mean,
                    head,
                    kv_stride_block,
                    HEAD_SIZE,
                    BLOCK_SIZE,
                    CHANNELS,
                    GROUP,
                    KEYS,
                )
                tl.debug_barrier()
            _store_worth(
                worth_at,
                distinct_at,
                score_ptr,
                groups_at,
                head,
                key_weight,
                score_stride_block,
                BLOCK_SIZE,
                GROUP,
                WINDOW,
                TOKENS,
                SPAN,
                HAS_WEIGHT,
            )
            tl.debug_barrier()
            _store_sources(source_at, worth_at, GROUP, WINDOW, TOKENS, SPAN)
            tl.debug_barrier()
            _move(
                kv_ptr,
                score_ptr,
                token_ptr,
                source_at,
                groups_at,
                head,
                kv_stride_block,
                score_stride_block,
                token_stride_block,
                HEAD_SIZE,
                BLOCK_SIZE,
                GROUP,
                MOVE,
                MOVE_CHANNELS,
                HAS_TOKEN,
            )
            merged += 1
        rows_before += tl.sum(has_groups)
    if HAS_COUNTERS:
        # Integers, so the order of the programs does not matter.
        merged = merged.to(tl.int64)
        tl.atomic_add(counters_ptr, merged, mask=merged > 0)
        tl.atomic_add(counters_ptr + 1, merged * (GROUP // 2), mask=merged > 0)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the launches hand on to each other and keep for themselves.

    Args:
        sums: [num_sums, num_kv_heads, head_size] int64 sums of parts of the rows' unit keys.
        values: [num_programs, 2, group] float32 per token distinctiveness and worth.
        sources: [num_programs, group] int32 places of a group's survivors.
    """

    sums: torch.Tensor
    values: torch.Tensor
    sources: torch.Tensor


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Sizes of tiles.

    Args:
        sum_keys: Keys of a tile of the mean; another value may change its last bits.
        sum_warps: Warps of a program of the first launch.
        sum_stages: Tiles of the mean in flight in a program.
        group_keys: Keys of a tile whose cosine to the mean is taken.
        tokens: Tokens compared with as many at a time.
        move: Survivors moved at a time.
        merge_warps: Warps of a program of the second launch.
        max_registers: Bound on a thread's registers, for all programs to be resident at once.
    """

    sum_keys: int
    sum_warps: int
    sum_stages: int
    group_keys: int
    tokens: int
    move: int
    merge_warps: int
    max_registers: int


def launch_config(head_size: int, element_size: int, group: int) -> LaunchConfig:
    """Choose the tiles.

    Args:
        head_size: Channels of a key.
        element_size: Bytes of one.
        group: Tokens of a merge group.
    """
    channels = triton.next_power_of_2(head_size)
    keys = max(8192 // channels, 16)
    row_bytes = triton.next_power_of_2(2 * head_size) * element_size
    return LaunchConfig(
        sum_keys=keys,
        sum_warps=4,
        sum_stages=1,
        group_keys=min(keys, 64, group),
        tokens=min(32, group),
        move=min(max(16384 // row_bytes, 8), group // 2),
        merge_warps=4,
        max_registers=65536 // (4 * 32 * PROGRAMS_PER_SM),
    )


def make_scratch(
    max_rows: int,
    num_kv_heads: int,
    head_size: int,
    max_keys: int,
    device: torch.device,
    *,
    max_group: int = MAX_WINDOW,
    programs_per_sm: int = PROGRAMS_PER_SM,
) -> Scratch:
    """Allocate what `merge_groups` needs, whatever the number of rows that merge at once.

    Args:
        max_rows: Most rows of a call.
        num_kv_heads: KV heads.
        head_size: Channels of a key.
        max_keys: Most keys a row holds.
        device: Where.
        max_group: Most tokens of a merge group.
        programs_per_sm: Programs of a launch per multiprocessor.

    Raises:
        ValueError: If the sums of `max_keys` unit keys could leave their range.
    """
    if max_keys > MAX_KEYS:
        raise ValueError(f"a row may hold {MAX_KEYS} keys at most, got {max_keys}")
    num_programs = 3
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        num_programs = programs_per_sm * properties.multi_processor_count
    # One sum per row is enough; with more, few rows spread over the device as well.
    num_sums = max(max_rows, 4 * _MAX_PARTS)
    return Scratch(
        torch.empty(num_sums, num_kv_heads, head_size, dtype=torch.int64, device=device),
        torch.empty(num_programs, 2, max_group, dtype=torch.float32, device=device),
        torch.empty(num_programs, max_group, dtype=torch.int32, device=device),
    )


def _check(pages: Pages, merges: Merges, head_size: int, window: int, scratch: Scratch) -> None:
    """Raise ValueError if something does not fit."""
    _, num_kv_heads, block_size, channels = pages.kv.shape
    num_rows, _, blocks = merges.groups.shape
    group = blocks * block_size
    if channels != 2 * head_size:
        raise ValueError(f"pages have {channels} channels, not K and V of {head_size} each")
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError("pages must be dense within a block")
    if pages.score is None:
        raise ValueError("merging needs pages with scores")
    if window < 2 or window & (window - 1) or group % window:
        raise ValueError(f"window {window} must be a power of two that divides {group} tokens")
    if group & (group - 1) or blocks < 2:
        raise ValueError(f"a group must be a power of two of blocks, got {blocks} of {block_size}")
    if window > MAX_WINDOW:
        raise ValueError(f"window {window} is above MAX_WINDOW = {MAX_WINDOW}")
    if group > scratch.sources.shape[1]:
        raise ValueError(f"scratch is for {scratch.sources.shape[1]} tokens a group, not {group}")
    if num_rows > scratch.sums.shape[0]:
        raise ValueError(f"scratch is for {scratch.sums.shape[0]} rows, not {num_rows}")
    if scratch.sums.shape[1:] != (num_kv_heads, head_size):
        raise ValueError(
            f"scratch is for (heads, channels) {tuple(scratch.sums.shape[1:])}, "
            f"not {(num_kv_heads, head_size)}"
        )
    if merges.groups.stride(2) != 1 or merges.block_table.stride(1) != 1:
        raise ValueError("the blocks of a group and of a row must be dense")
    if merges.num_groups.shape != (num_rows,) or merges.num_keys.shape != (num_rows,):
        raise ValueError(f"num_groups and num_keys must have {num_rows} rows")


def merge_groups(
    pages: Pages,
    merges: Merges,
    head_size: int,
    window: int,
    key_weight: float,
    scratch: Scratch,
    counters: torch.Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """Write the survivors of every group into the first half of the group's own blocks.

    Of every `window` neighbours the half with the highest rank(score) + key_weight *
    rank(distinctiveness) survive, a tie in the sum to the newer. What a row keeps does not depend
    on which other rows merge at the same time.

    Args:
        pages: The layer's pages, with scores.
        merges: Which groups of which rows.
        head_size: Channels of a key.
        window: Neighbours of which half survive.
        key_weight: Weight of key distinctiveness; 0 leaves it out, and one launch with it.
        scratch: From `make_scratch`, for at least as many rows and tokens a group.
        counters: [2] int64, or None: gains the groups merged and the tokens dropped, each counted
            once per KV head.
        config: Sizes of tiles; None for those of `launch_config`.

    Raises:
        ValueError: If a shape, a stride or the window does not fit.
    """
    _check(pages, merges, head_size, window, scratch)
    assert pages.score is not None
    _, num_kv_heads, block_size, _ = pages.kv.shape
    num_rows, max_groups, blocks = merges.groups.shape
    if not num_rows or not max_groups:
        return
    group = blocks * block_size
    num_programs = scratch.sources.shape[0]
    config = config or launch_config(head_size, pages.kv.element_size(), group)
    channels = triton.next_power_of_2(head_size)
    if key_weight:
        _unit_key_sums_kernel[(num_programs,)](
            pages.kv,
            merges.num_groups,
            merges.num_keys,
            merges.block_table,
            scratch.sums,
            num_rows,
            scratch.sums.shape[0],
            pages.kv.stride(0),
            merges.block_table.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            HEAD_SIZE=head_size,
            BLOCK_SIZE=block_size,
            CHANNELS=channels,
            KEYS=config.sum_keys,
            STAGES=config.sum_stages,
            ROWS=_ROWS,
            MAX_PARTS=_MAX_PARTS,
            num_warps=config.sum_warps,
            num_stages=1,
            maxnreg=config.max_registers,
        )
    token = pages.token if pages.token is not None else pages.score
    _merge_kernel[(num_programs,)](
        pages.kv,
        pages.score,
        token,
        merges.groups,
        merges.num_groups,
        scratch.sums,
        scratch.values,
        scratch.sources,
        counters if counters is not None else scratch.sums,
        num_rows,
        scratch.sums.shape[0],
        float(key_weight),
        pages.kv.stride(0),
        pages.score.stride(0),
        token.stride(0),
        merges.groups.stride(0),
        merges.groups.stride(1),
        scratch.sources.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        CHANNELS=channels,
        GROUP=group,
        WINDOW=window,
        KEYS=config.group_keys,
        TOKENS=config.tokens,
        SPAN=max(window, config.tokens),
        MOVE=config.move,
        MOVE_CHANNELS=triton.next_power_of_2(2 * head_size),
        ROWS=_ROWS,
        MAX_PARTS=_MAX_PARTS,
        PARTS=_PARTS_TILE,
        HAS_WEIGHT=bool(key_weight),
        HAS_TOKEN=pages.token is not None,
        HAS_COUNTERS=counters is not None,
        num_warps=config.merge_warps,
        num_stages=1,
        maxnreg=config.max_registers,
        # As on a CPU, the weighted rank is rounded before it is added: ties stay ties.
        enable_fp_fusion=False,
    )
