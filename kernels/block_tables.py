"""Applies the cascade table to block-table rows, on the device.

Which block holds which place follows from how many tokens a request has computed. So a step's block
tables are made from token counts alone: the kernel reads no score and sends nothing to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.segments import DecodeRows, Merges

# Block-table entries that a program copies at a time, at most.
CHUNK = 1024
# Which tokens of a request in a step `resolve_decodes` resolves.
ALL, ALL_BUT_LAST, LAST = range(3)
_ALL, _LAST = tl.constexpr(ALL), tl.constexpr(LAST)


@dataclass(frozen=True, slots=True)
class CascadeTable:
    """The structure of all epochs of a request, on the device.

    Args:
        entries: [num_epochs, max_blocks] int16 or int32 row entry at each logical place, in blocks.
        groups: [num_epochs, max_groups, blocks_per_group] as `entries`; row entries of the groups
            that merge at the epoch's end.
        num_groups: [num_epochs] int32.
        starts: [num_epochs] int32 first token of each epoch.
        prefixes: [num_epochs] int32 tokens held from earlier epochs.
        first_end: One past the last token of epoch 0.
        stride: Tokens of every later epoch.
        num_sink_tokens: Token at which the grid of strides starts.
        block_size: Tokens of a block.
        decay: Factor on a query's weight for each token after it, above 0 and at most 1.
    """

    entries: torch.Tensor
    groups: torch.Tensor
    num_groups: torch.Tensor
    starts: torch.Tensor
    prefixes: torch.Tensor
    first_end: int
    stride: int
    num_sink_tokens: int
    block_size: int
    decay: float


@dataclass(frozen=True, slots=True)
class Resolved:
    """What `resolve_decodes` and `resolve_segments` write for each of up to n segments.

    Where there is no segment, only `rows`, `places`, `slots`, `num_groups` and `num_keys` are set.

    Args:
        block_table: [n, max_blocks] int32 physical blocks in logical order.
        groups: [n, max_groups, blocks_per_group] int32 physical blocks of the groups.
        num_groups: [n] int32 groups that merge at the segment's end. Of tokens resolved one by one
            only a request's first can end an epoch: item r is request r's.
        places: [n] int32 logical place of the first token; -1 where there is no segment.
        num_keys: [n] int32 keys held at the segment's end; as `num_groups`.
        rows: [n] int32 row of the first token in the batch.
        slots: [n] int64 ``block * block_size + offset`` of the last token; -1 for no segment.
        tokens: [n] int32 index of the last token in its request.
        carry: [n] float32 factor on the scores kept so far.
        exponents: [n] float32; the first query weighs ``decay ** exponent``.
        weights: [n] float32 weight of the first query.
    """

    block_table: torch.Tensor
    groups: torch.Tensor
    num_groups: torch.Tensor
    places: torch.Tensor
    num_keys: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor
    carry: torch.Tensor
    exponents: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def empty(cls, table: CascadeTable, num_segments: int) -> Resolved:
        """Allocate room for `num_segments` segments on the table's device; nothing is set."""

        def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(num_segments, *shape, dtype=dtype, device=table.entries.device)

        return cls(
            block_table=make(torch.int32, table.entries.shape[1]),
            groups=make(torch.int32, *table.groups.shape[1:]),
            num_groups=make(torch.int32),
            places=make(torch.int32),
            num_keys=make(torch.int32),
            rows=make(torch.int32),
            slots=make(torch.int64),
            tokens=make(torch.int32),
            carry=make(torch.float32),
            exponents=make(torch.float32),
            weights=make(torch.float32),
        )

    def decode_rows(self, start: int, end: int, per_request: int) -> DecodeRows:
        """View segments ``start .. end - 1`` as single tokens, `per_request` of each request."""
        part = slice(start, end)
        return DecodeRows(
            rows=self.rows[part],
            places=self.places[part],
            block_table=self.block_table[part],
            carry=self.carry[part],
            weights=self.weights[part],
            per_request=per_request,
        )

    def merges(self, start: int, end: int, per_request: int = 1) -> Merges:
        """View the merge groups of segments ``start .. end - 1``, `per_request` of each request."""
        part = slice(start, end, per_request)
        owners = slice(start // per_request, end // per_request)
        return Merges(
            groups=self.groups[part],
            num_groups=self.num_groups[owners],
            block_table=self.block_table[part],
            num_keys=self.num_keys[owners],
        )


@triton.jit
def _epoch_end(token, first_end, stride):
    """Return the end of the epoch of a token: one past the epoch's last token."""
    after_first = tl.where(token < first_end, 0, (token - first_end) // stride + 1)
    return first_end + after_first * stride


@triton.jit
def _num_together(first, first_end, stride):
    """Return how many tokens may be computed together from `first` on: a boundary's token is alone.

    `Layout.most_together` is the same on the host.
    """
    return tl.maximum(_epoch_end(first, first_end, stride) - 1 - first, 1)


@triton.jit(
    do_not_specialize=["ahead"],
    do_not_specialize_on_alignment=[
        "requests_ptr",
        "ends_ptr",
        "query_start_loc_ptr",
        "lengths_ptr",
        "row_ptr",
    ],
)
def _resolve_kernel(
    requests_ptr,
    ends_ptr,
    query_start_loc_ptr,
    lengths_ptr,
    row_ptr,
    rows_ptr,
    table_ptr,
    entries_ptr,
    epoch_groups_ptr,
    epoch_num_groups_ptr,
    epoch_starts_ptr,
    epoch_prefixes_ptr,
    block_table_ptr,
    groups_ptr,
    num_groups_ptr,
    places_ptr,
    num_keys_ptr,
    slots_ptr,
    tokens_ptr,
    carry_ptr,
    exponents_ptr,
    weights_ptr,
    table_stride,
    num_epochs,
    first_end,
    stride,
    num_sinks,
    log2_decay,
    max_blocks,
    group_entries,
    ahead,
    MOST: tl.constexpr,
    DRAFTED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Look up what one segment needs: its place, its blocks, its weights and its merge groups.

    Grid: (segments,). A program writes the row of its segment in each tensor of a `Resolved`.

    Args:
        requests_ptr: [segments] int32 row in `table_ptr`; None where segment s is token s % MOST
            of request s // MOST in this step, of requests that have MOST tokens or fewer.
        ends_ptr: [segments] int32 tokens of the request at the segment's end; where `requests_ptr`
            is None, [requests] int32 tokens of each request once the step is done.
        query_start_loc_ptr: [requests + 1] int32 first row of each request in the batch; None where
            `requests_ptr` is given.
        lengths_ptr: [segments] int32 tokens of each segment; None where `requests_ptr` is.
        row_ptr: [segments] int32 row of each segment's first token; None where `requests_ptr` is.
        rows_ptr: Output `Resolved.rows`; the outputs from `block_table_ptr` on are named likewise.
        table_ptr: [requests, table_stride] int32 block-table rows as vLLM has them.
        entries_ptr: `CascadeTable.entries`; the other ``epoch_*`` pointers are its next fields.
        log2_decay: Base-2 logarithm of `CascadeTable.decay`.
        max_blocks: Columns of `entries_ptr` and of `block_table_ptr`.
        group_entries: Row entries of all groups of an epoch together.
        ahead: `num_ahead` of `resolve_decodes`; not read where `requests_ptr` is given.
        MOST: Most tokens of a request that are resolved one by one; a constant of the engine.
        DRAFTED: `drafted` of `resolve_decodes`.
        PART: `part` of `resolve_decodes`.
        CHUNK: Entries copied at a time.
    """
    segment = tl.program_id(0)
    if requests_ptr is None:
        request = segment // MOST
        number = segment % MOST
        owner, is_first = request, number == 0
        end = tl.load(ends_ptr + request)
        row = tl.load(query_start_loc_ptr + request)
        tokens = tl.load(query_start_loc_ptr + request + 1) - row
        first = end - tokens
        # The model's, and those that are computed now. Those behind come once the boundary has run.
        asked = tokens if PART == _ALL else tokens - 1
        num = tl.where(
            asked <= DRAFTED, tl.minimum(asked, _num_together(first, first_end, stride)), asked
        )
        if PART == _LAST:
            length = tl.where((number < tokens) & (end > 0), 1, 0)
            number = num
        else:
            length = tl.where((number < asked) & (asked <= MOST) & (end > 0), 1, 0)
            is_late = number >= num
        row += number
        end = first + (number if PART == _LAST else tl.minimum(number, num - 1)) + 1
        # The end of the epoch of the next token that the model computes.
        end = tl.minimum(end, _epoch_end(end - ahead, first_end, stride))
    else:
        end = tl.load(ends_ptr + segment)
        request = tl.load(requests_ptr + segment)
        row = tl.load(row_ptr + segment)
        length = tl.load(lengths_ptr + segment)
        owner, is_first = segment, True
    tl.store(rows_ptr + segment, row)
    if length == 0:
        tl.store(places_ptr + segment, -1)
        tl.store(slots_ptr + segment, tl.full((), -1, tl.int64))
        tl.store(num_groups_ptr + owner, 0, mask=is_first)
        tl.store(num_keys_ptr + owner, 0, mask=is_first)
        return
    start = end - length
    epoch = tl.where(start < first_end, 0, (start - first_end) // stride + 1)
    epoch = tl.minimum(epoch, num_epochs - 1)
    epoch_start = tl.load(epoch_starts_ptr + epoch)
    place = tl.load(epoch_prefixes_ptr + epoch) + start - epoch_start
    last = place + length - 1
    tl.store(places_ptr + segment, place)
    tl.store(num_keys_ptr + owner, last + 1, mask=is_first)
    tl.store(tokens_ptr + segment, end - 1)

    # Strides that are over at the segment's end, and at its start; those of epoch 0 count as well.
    passed = tl.maximum(end - num_sinks, 0) // stride
    before = tl.maximum(start - num_sinks, 0) // stride
    exponent = (passed * stride - (start - num_sinks) - 1).to(tl.float32)
    tl.store(exponents_ptr + segment, exponent)
    tl.store(weights_ptr + segment, tl.exp2(exponent * log2_decay))
    tl.store(carry_ptr + segment, tl.exp2(((passed - before) * stride).to(tl.float32) * log2_decay))

    entries_row = entries_ptr + epoch.to(tl.int64) * max_blocks
    table_row = table_ptr + request.to(tl.int64) * table_stride
    out_row = block_table_ptr + segment.to(tl.int64) * max_blocks
    num_blocks = last // BLOCK_SIZE + 1
    for first in range(0, num_blocks, CHUNK):
        # [CHUNK]
        at = first + tl.arange(0, CHUNK)
        inside = at < num_blocks
        entry = tl.load(entries_row + at, mask=inside, other=0).to(tl.int32)
        tl.store(out_row + at, tl.load(table_row + entry, mask=inside, other=0), mask=inside)
    block = tl.load(table_row + tl.load(entries_row + last // BLOCK_SIZE).to(tl.int32))
    slot = block.to(tl.int64) * BLOCK_SIZE + last % BLOCK_SIZE

    # The boundary runs if the segment ends its epoch and another follows.
    ends_epoch = (end == first_end + epoch * stride) & (epoch + 1 < num_epochs)
    if requests_ptr is None and PART != _LAST:
        slot = tl.where(is_late, -1, slot)
    tl.store(slots_ptr + segment, slot)
    ends_epoch = ends_epoch & is_first
    num_groups = tl.where(ends_epoch, tl.load(epoch_num_groups_ptr + epoch), 0)
    tl.store(num_groups_ptr + owner, num_groups, mask=is_first)
    if num_groups > 0:
        groups_row = epoch_groups_ptr + epoch.to(tl.int64) * group_entries
        out_groups = groups_ptr + segment.to(tl.int64) * group_entries
        for first in range(0, group_entries, CHUNK):
            # [CHUNK]; entries past num_groups are zero and unread
            at = first + tl.arange(0, CHUNK)
            inside = at < group_entries
            entry = tl.load(groups_row + at, mask=inside, other=0).to(tl.int32)
            tl.store(out_groups + at, tl.load(table_row + entry, mask=inside, other=0), mask=inside)


def resolve_decodes(
    out: Resolved,
    table: CascadeTable,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    most: int = 1,
    part: int = ALL,
    num_ahead: int = 0,
    drafted: int | None = None,
) -> None:
    """Resolve each token of the requests that have few of them; mark all others as skipped.

    A token that may be a draft is late if it is at a boundary, or behind one, that the row's first
    token does not run. It attends to what the row's other tokens attend to, so that its output is
    finite, and is written nowhere. `find_late` tells which drafts have to be rejected for this.

    Args:
        out: Row ``most * r + i`` is written for token i of request r in this step, counted from 0.
        table: The structure.
        query_start_loc: [num_requests + 1] int32 first row of each request in the batch.
        seq_lens: [num_requests] int32 tokens of each request once the step is done.
        block_table: [num_requests or more, width] int32 blocks of each request's row; rows dense.
        most: Most tokens of a request that are resolved, at least 1. A row of more is none of
            drafts.
        part: Which tokens of each request are resolved and counted: `ALL`; `ALL_BUT_LAST`, which
            are the model's; `LAST`, which is behind those of them that are not late.
        num_ahead: Last tokens of each request that a drafter computes ahead of the model. One that
            lies behind the epoch in which the model is has the place of the epoch's last token.
        drafted: Most tokens of a row with drafts, without one that a drafter computes ahead; `most`
            if not given.

    Raises:
        ValueError: If `out` has fewer rows than `most` for each request, or `block_table` does not
            fit.
    """
    num_requests = len(seq_lens)
    if num_requests:
        starts, rows = query_start_loc, most * num_requests
        modes = most, most if drafted is None else drafted, part, num_ahead
        _launch(out, table, rows, block_table, seq_lens, starts, None, *modes)


def resolve_segments(
    out: Resolved,
    table: CascadeTable,
    segments: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Resolve segments that the host cut.

    Args:
        out: Row s is written for segment s.
        table: The structure.
        segments: [4, num_segments] int32: request, tokens of the request at the segment's end,
            tokens of the segment, row of its first token.
        block_table: [num_requests or more, width] int32 blocks of each request's row; rows dense.

    Raises:
        ValueError: If `out` has fewer rows than there are segments, or `block_table` does not fit.
    """
    if segments.shape[1]:
        _launch(out, table, segments.shape[1], block_table, segments[1], None, segments)


def _launch(
    out: Resolved,
    table: CascadeTable,
    num_segments: int,
    block_table: torch.Tensor,
    ends: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    segments: torch.Tensor | None,
    most: int = 1,
    drafted: int = 1,
    part: int = ALL,
    num_ahead: int = 0,
) -> None:
    """Launch for tokens one by one, given `query_start_loc`, or for `segments`."""
    if num_segments > len(out.places):
        raise ValueError(f"{num_segments} segments, room for {len(out.places)}")
    if block_table.stride(1) != 1 or block_table.dtype != torch.int32:
        raise ValueError(
            "block_table must be int32 with dense rows, "
            f"got {block_table.dtype} with strides {block_table.stride()}"
        )
    launch(
        _resolve_kernel,
        (num_segments,),
        None if segments is None else segments[0],
        ends,
        query_start_loc,
        None if segments is None else segments[2],
        None if segments is None else segments[3],
        out.rows,
        block_table,
        table.entries,
        table.groups,
        table.num_groups,
        table.starts,
        table.prefixes,
        out.block_table,
        out.groups,
        out.num_groups,
        out.places,
        out.num_keys,
        out.slots,
        out.tokens,
        out.carry,
        out.exponents,
        out.weights,
        block_table.stride(0),
        table.entries.shape[0],
        table.first_end,
        table.stride,
        table.num_sink_tokens,
        math.log2(table.decay),
        table.entries.shape[1],
        table.groups.shape[1] * table.groups.shape[2],
        num_ahead,
        MOST=most,
        DRAFTED=drafted,
        PART=part,
        BLOCK_SIZE=table.block_size,
        CHUNK=min(CHUNK, next_power_of_2(max(16, table.entries.shape[1]))),
    )


@triton.jit
def _late_kernel(
    out_ptr, positions_ptr, indices_ptr, numbers_ptr, count, first_end, stride, BLOCK: tl.constexpr
):
    """Tell of each of BLOCK logits whether its token is late. Grid: (logits / BLOCK,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    index = tl.load(indices_ptr + at, mask=inside, other=0)
    number = tl.load(numbers_ptr + at, mask=inside, other=0)
    first = tl.load(positions_ptr + index, mask=inside, other=0).to(tl.int32) - number
    is_late = (number > 0) & (number >= _num_together(first, first_end, stride))
    tl.store(out_ptr + at, is_late, mask=inside)


def find_late(
    positions: torch.Tensor,
    indices: torch.Tensor,
    numbers: torch.Tensor,
    first_end: int,
    stride: int,
) -> torch.Tensor:
    """Find the drafts that a boundary keeps from being computed; they have to be rejected.

    Args:
        positions: [num_tokens] integers, index of each token of a step in its request.
        indices: [num_logits] integers, tokens whose logits are asked for.
        numbers: [num_logits] integers, number of each such token in its request's row of a token
            and its drafts; 0 for a token that is none.
        first_end: `CascadeTable.first_end`.
        stride: `CascadeTable.stride`.

    Returns:
        [num_logits] bool, on the device.
    """
    late = torch.empty(len(indices), dtype=torch.bool, device=indices.device)
    if len(late):
        grid = (triton.cdiv(len(late), CHUNK),)
        args = late, positions, indices, numbers, len(late), first_end, stride
        launch(_late_kernel, grid, *args, BLOCK=CHUNK)
    return late
