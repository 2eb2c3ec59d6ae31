"""Moves the survivors of merge groups, in at most two launches of fixed size.

Nearly every step has nothing to merge, but a CUDA graph has the launches in every step. So both
launches are small grids of persistent programs. A program first looks at the number of groups of
all rows; only where there are any does it walk over rows, KV heads and parts of the work.

Source: arXiv 2406.17808, in which a full sub-cache hands half of what leaves it to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.merge.launch_config import (
    PROGRAMS_PER_SM,
    LaunchConfig,
    launch_config,
)
from vllm_cascade.kernels.merge.means import (
    add_units,
    make_sums,
    rows_at_a_time,
    rows_with_groups,
    store_distinctiveness,
)
from vllm_cascade.kernels.merge.survivors import store_sources, store_worth
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import Weights

# Most tokens of a window.
MAX_WINDOW = 1024


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
):
    """Move the survivors of a group into its first half.

    Survivor d goes to place d from source(d), and source(d) >= d because survivors stay in order.
    The tile of survivors [t, t + MOVE) writes only places below t + MOVE, and every later tile
    reads places source(d) >= d >= t + MOVE. So no tile overwrites what a later tile reads. The
    barrier separates the reads of a tile, and of earlier tiles, from the tile's writes.

    Args:
        kv_ptr: `Pages.kv`, whose blocks lie `kv_stride_block` elements apart; the next two pointers
            are `Pages.score` and `Pages.token` likewise, each None where pages have none.
        source_at: Pointer to [GROUP / 2] int32 places of the survivors in the group.
        groups_at: Pointer to the group's block ids, int32.
        head: KV head.
        GROUP: Tokens of a group.
        MOVE: Survivors moved at a time.
        MOVE_CHANNELS: Channels of a key and value together, rounded up to a power of two.
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
        if score_ptr is not None:
            score = tl.load(score_ptr + source_blocks * score_stride_block + source_slots)
        if token_ptr is not None:
            token = tl.load(token_ptr + source_blocks * token_stride_block + source_slots)
        tl.debug_barrier()
        tl.store(kv_ptr + target_at_kv[:, None] + channels[None, :], kv, mask=has_channel)
        if score_ptr is not None:
            tl.store(score_ptr + target_blocks * score_stride_block + target_slots, score)
        if token_ptr is not None:
            tl.store(token_ptr + target_blocks * token_stride_block + target_slots, token)


@triton.jit
def _zero_sums(
    sums_ptr,
    num_groups_ptr,
    num_rows,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Set the sums of all rows that had groups back to zero.

    Args:
        sums_ptr: [>= num_rows, ROW] int64.
        num_groups_ptr: [num_rows] int32 `Merges.num_groups`.
        num_rows: Rows.
        ROW: Elements of a row of sums.
        TILE: Elements set at a time.
        ROWS: Rows looked at together.
    """
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        counts = tl.load(num_groups_ptr + rows, mask=rows < num_rows, other=0)
        has_groups = (counts > 0).to(tl.int32)
        ends = tl.cumsum(has_groups, 0)
        for index in range(tl.sum(has_groups)):
            row = (start + tl.sum((ends <= index).to(tl.int32))).to(tl.int64)
            for first in range(0, ROW, TILE):
                at = first + tl.arange(0, TILE)
                tl.store(sums_ptr + row * ROW + at, tl.zeros([TILE], tl.int64), mask=at < ROW)


@triton.jit(
    do_not_specialize=["num_rows", "groups_stride_row", "groups_stride_group"],
    do_not_specialize_on_alignment=["groups_ptr", "num_groups_ptr"],
)
def _merge_kernel(
    kv_ptr,
    score_ptr,
    token_ptr,
    groups_ptr,
    num_groups_ptr,
    sums_ptr,
    finished_ptr,
    values_ptr,
    sources_ptr,
    counters_ptr,
    num_rows,
    score_weight,
    key_weight,
    value_weight,
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
    HAS_SCORE: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
):
    """Choose the survivors of all groups, and move them.

    Grid: (programs,), of any number. Program p takes items p, p + programs, p + 2 * programs and so
    on, with scratch of its own; an item is a group and a KV head. The last program to end sets the
    sums back to zero.

    Args:
        kv_ptr: `Pages.kv`, whose blocks lie `kv_stride_block` elements apart; the next two pointers
            are `Pages.score` and `Pages.token` likewise, each None where pages have none.
        groups_ptr: `Merges.groups`; the next pointer is `Merges.num_groups`.
        sums_ptr: `Scratch.sums`; the next three pointers are fields likewise.
        counters_ptr: [2] int64 that gains groups merged and tokens dropped, or None.
        score_weight: Weight of the score's rank; the next two are those of key and value.
        values_stride: Most tokens of a group: columns of `values_ptr` and of `sources_ptr`.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        GROUP: Tokens of a group.
        WINDOW: Tokens of a window, of which half survive.
        KEYS: Tokens of a tile whose cosine to the mean is taken.
        TOKENS: Tokens compared with as many at a time.
        SPAN: The larger of WINDOW and TOKENS.
        MOVE: Survivors moved at a time.
        MOVE_CHANNELS: Channels of a key and value together, rounded up to a power of two.
        ROWS: Rows looked at together.
        HAS_SCORE: Whether scores are ranked.
        HAS_KEY: Whether keys are ranked.
        HAS_VALUE: Whether values are ranked.
    """
    total_rows = rows_with_groups(num_groups_ptr, num_rows, ROWS)
    if total_rows == 0:
        return
    program = tl.program_id(0).to(tl.int64)
    key_at = values_ptr + program * 3 * values_stride
    value_at = key_at + values_stride
    worth_at = value_at + values_stride
    source_at = sources_ptr + program * values_stride
    local_rows = tl.arange(0, ROWS)
    merged = tl.full([], 0, tl.int32)
    for start in range(0, num_rows, ROWS):
        counts = tl.load(
            num_groups_ptr + start + local_rows, mask=start + local_rows < num_rows, other=0
        )
        ends = tl.cumsum(counts, 0)
        num_items = tl.sum(counts) * NUM_KV_HEADS
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            head = item % NUM_KV_HEADS
            index = item // NUM_KV_HEADS
            local_row = tl.sum((ends <= index).to(tl.int32))
            group = index - tl.sum(tl.where(local_rows < local_row, counts, 0))
            row = (start + local_row).to(tl.int64)
            groups_at = groups_ptr + row * groups_stride_row + group * groups_stride_group
            sums_at = sums_ptr + (row * NUM_KV_HEADS + head) * (2 * HEAD_SIZE)
            store_distinctiveness(
                key_at, value_at, kv_ptr, groups_at, sums_at, head, kv_stride_block,
                HEAD_SIZE, BLOCK_SIZE, CHANNELS, GROUP, KEYS, HAS_KEY, HAS_VALUE,
            )  # fmt: skip
            tl.debug_barrier()
            store_worth(
                worth_at,
                score_ptr,
                key_at,
                value_at,
                groups_at,
                head,
                score_weight,
                key_weight,
                value_weight,
                score_stride_block,
                BLOCK_SIZE,
                GROUP,
                WINDOW,
                TOKENS,
                SPAN,
                HAS_SCORE,
                HAS_KEY,
                HAS_VALUE,
            )
            tl.debug_barrier()
            store_sources(source_at, worth_at, GROUP, WINDOW, TOKENS, SPAN)
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
            )
            merged += 1
    if HAS_KEY or HAS_VALUE:
        # Once the last program is here, no program reads the sums any more.
        tl.debug_barrier()
        if tl.atomic_add(finished_ptr, 1) == tl.num_programs(0) - 1:
            _zero_sums(sums_ptr, num_groups_ptr, num_rows, NUM_KV_HEADS * 2 * HEAD_SIZE, 1024, ROWS)
            tl.store(finished_ptr, 0)
    if counters_ptr is not None:
        # The counters are integers, so the order of the programs does not matter.
        merged = merged.to(tl.int64)
        tl.atomic_add(counters_ptr, merged, mask=merged > 0)
        tl.atomic_add(counters_ptr + 1, merged * (GROUP // 2), mask=merged > 0)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the launches hand on to each other and keep for themselves.

    Args:
        sums: [max_rows, num_kv_heads, 2, head_size] int64, from `make_sums`; zero between merges.
        finished: [1] int32 programs that are done with the sums; zero between merges.
        values: [num_programs, 3, max_group] float32 for each token of a group: distinctiveness of
            the key and of the value, and worth.
        sources: [num_programs, max_group] int32 places of a group's survivors.
    """

    sums: torch.Tensor
    finished: torch.Tensor
    values: torch.Tensor
    sources: torch.Tensor


def make_scratch(
    max_rows: int,
    num_kv_heads: int,
    head_size: int,
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
        device: Where.
        max_group: Most tokens of a merge group.
        programs_per_sm: Programs of a launch per multiprocessor.

    Returns:
        The scratch: sums and the number of finished programs are zero, the rest uninitialised.
    """
    num_programs = 3
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        num_programs = programs_per_sm * properties.multi_processor_count
    return Scratch(
        make_sums(max_rows, num_kv_heads, head_size, device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.empty(num_programs, 3, max_group, dtype=torch.float32, device=device),
        torch.empty(num_programs, max_group, dtype=torch.int32, device=device),
    )


def _check(
    pages: Pages,
    merges: Merges,
    head_size: int,
    window: int,
    weights: Weights,
    scratch: Scratch,
) -> None:
    """Raise ValueError if something does not fit."""
    _, num_kv_heads, block_size, channels = pages.kv.shape
    num_rows, _, blocks = merges.groups.shape
    group = blocks * block_size
    if channels != 2 * head_size:
        raise ValueError(f"pages have {channels} channels, not K and V of {head_size} each")
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError(f"pages must be dense within a block, got strides {pages.kv.stride()}")
    if weights.score and pages.score is None:
        raise ValueError("a weight of scores needs pages with scores")
    if not any(weights) or min(weights) < 0:
        raise ValueError(f"weights are 0 or more, and one is above it, not {tuple(weights)}")
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
    if scratch.sums.shape[1:] != (num_kv_heads, 2, head_size):
        raise ValueError(
            f"scratch is for (heads, 2, channels) {tuple(scratch.sums.shape[1:])}, "
            f"not {(num_kv_heads, 2, head_size)}"
        )
    if merges.groups.stride(2) != 1 or merges.block_table.stride(1) != 1:
        raise ValueError(
            "the blocks of a group and of a row must be dense, got strides "
            f"{merges.groups.stride()} and {merges.block_table.stride()}"
        )
    if merges.num_groups.shape != (num_rows,) or merges.num_keys.shape != (num_rows,):
        raise ValueError(
            f"num_groups and num_keys must be [{num_rows}], "
            f"got {list(merges.num_groups.shape)} and {list(merges.num_keys.shape)}"
        )


def merge_groups(
    pages: Pages,
    merges: Merges,
    head_size: int,
    window: int,
    weights: Weights,
    scratch: Scratch,
    counters: torch.Tensor | None = None,
    *,
    has_sums: bool = False,
    config: LaunchConfig | None = None,
) -> None:
    """Write the survivors of every group into the first half of the group's own blocks.

    Of every `window` neighbours the half with the highest sums of weighted ranks survives; in a tie
    the newer token does. What a row keeps does not depend on which other rows merge at the same
    time.

    Args:
        pages: The layer's pages, dense within a block; `kv` and, if there, `score` and `token` are
            moved.
        merges: Which groups of which rows. A group is a power of two of blocks, at least two.
        head_size: Channels of a key; values have as many.
        window: Neighbours of which half survive: a power of two, at most `MAX_WINDOW`, that divides
            the tokens of a group.
        weights: Weights of the ranks, none negative and at least one above 0.
        scratch: From `make_scratch`, for at least as many rows, and as many tokens a group.
        counters: [2] int64, or None: gains the groups merged and the tokens dropped, each counted
            once per KV head.
        has_sums: Whether ``scratch.sums`` holds the sums already, as after `workspace.prepare`;
            else one more launch adds them up.
        config: Sizes of tiles; None for those of `launch_config`.

    Raises:
        ValueError: If a shape, a stride, a weight or the window does not fit.
    """
    _check(pages, merges, head_size, window, weights, scratch)
    _, num_kv_heads, block_size, _ = pages.kv.shape
    num_rows, max_groups, blocks = merges.groups.shape
    if not num_rows or not max_groups:
        return
    group = blocks * block_size
    num_programs = scratch.sources.shape[0]
    config = config or launch_config(head_size, pages.kv.element_size(), group)
    if (weights.key or weights.value) and not has_sums:
        add_units(
            pages,
            merges,
            scratch.sums,
            num_programs,
            has_key=bool(weights.key),
            has_value=bool(weights.value),
            tile_keys=config.sum_keys,
            num_warps=config.sum_warps,
            max_registers=config.max_registers,
        )
    launch(
        _merge_kernel,
        (num_programs,),
        pages.kv,
        pages.score,
        pages.token,
        merges.groups,
        merges.num_groups,
        scratch.sums,
        scratch.finished,
        scratch.values,
        scratch.sources,
        counters,
        num_rows,
        float(weights.score),
        float(weights.key),
        float(weights.value),
        pages.kv.stride(0),
        0 if pages.score is None else pages.score.stride(0),
        0 if pages.token is None else pages.token.stride(0),
        merges.groups.stride(0),
        merges.groups.stride(1),
        scratch.sources.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        CHANNELS=next_power_of_2(head_size),
        GROUP=group,
        WINDOW=window,
        KEYS=config.group_keys,
        TOKENS=config.tokens,
        SPAN=max(window, config.tokens),
        MOVE=config.move,
        MOVE_CHANNELS=next_power_of_2(2 * head_size),
        ROWS=rows_at_a_time(len(scratch.sums)),
        HAS_SCORE=bool(weights.score),
        HAS_KEY=bool(weights.key),
        HAS_VALUE=bool(weights.value),
        num_warps=config.merge_warps,
        num_stages=1,
        maxnreg=config.max_registers,
        # As on a CPU, a weighted rank is rounded before it is added: ties stay ties.
        enable_fp_fusion=False,
    )
