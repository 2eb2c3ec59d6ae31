"""What one engine step does in every cascade layer on a GPU, prepared once for all layers.

Single tokens are resolved on the device, from token counts that are there already. Nothing is
copied, waited for or allocated, so a step of single tokens replays as one CUDA graph. So does a
step of tokens with drafts behind them, each of which is resolved as a single token. Longer chunks
are cut into waves on the host, which knows their lengths before the device does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_cascade.attention.epoch_table import shared_epochs
from vllm_cascade.kernels.block_tables import (
    ALL,
    ALL_BUT_LAST,
    LAST,
    Resolved,
    resolve_decodes,
    resolve_segments,
)
from vllm_cascade.kernels.launch import Recording
from vllm_cascade.kernels.segments import KEY_PADDING, DecodeRows, Merges, Segments
from vllm_cascade.structure.layout import Layout, Segment

Ints = npt.NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The single tokens of a batch, and those with drafts; other requests are marked as skipped.

    Args:
        rows: The tokens that attend: room for `Planner.most_tokens` of each request.
        slots: [num_rows] int64 slot that takes each token's key and value, -1 for none.
        tokens: [num_rows] int32 index of each token in its request.
        merges: Groups that merge once all tokens have attended; None if no request ever chooses
            between tokens.
    """

    rows: DecodeRows
    slots: torch.Tensor
    tokens: torch.Tensor
    merges: Merges | None


@dataclass(frozen=True, slots=True)
class Launch:
    """Segments of one wave that are prepared in one launch.

    Args:
        segments: The segments, resolved on the device; their spans are in the round's workspace.
        merges: Groups that merge once the segments are prepared and, where scores are kept, have
            attended; or None.
    """

    segments: Segments
    merges: Merges | None


@dataclass(frozen=True, slots=True)
class Round:
    """Launches that fit the workspace together, and attend at once.

    Without scores a boundary needs no attention, only what the wave before it has written. So the
    waves of a chunk are prepared and merge one after the other, each in rows of the workspace of
    its own, and attend at once: a single wave of few heads leaves a part of the device idle, and
    the host has a call of attention to make for it. With scores a round has one launch.

    Args:
        launches: One or more, in the order in which they run.
        segments: The segments of all of them.
        rows: [num_queries] int32 row in the batch of each packed query.
        span: First and last + 1 of `rows` if they follow one another; otherwise None.
        tokens: [num_queries] int32 index of each query's token in its request.
    """

    launches: tuple[Launch, ...]
    segments: Segments
    rows: torch.Tensor
    span: tuple[int, int] | None
    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a workspace that a round takes; made once a step, because slices cost host time.

    Args:
        query: [num_queries, num_heads, head_size] rotated queries.
        key: [num_rows, num_kv_heads, head_size] rotated keys, `KEY_PADDING` rows after each
            segment's.
        value: [num_rows, num_kv_heads, head_size] values, padded as `key`.
        packed: [num_queries, num_heads, head_size] outputs, used if the round's rows of the batch
            do not follow one another.
        query_starts: [2 * num_segments] int32, the flattened spans of queries. FlashAttention
            reads them as starts: every second segment is the gap between two, without queries.
        key_starts: [2 * num_segments] int32, the flattened spans of keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    packed: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor


@dataclass(slots=True)
class GpuMetadata:
    """One step on a GPU.

    Args:
        decode: The step's tokens that are resolved one by one, or None.
        rounds: The step's longer chunks, in the order in which they run.
        sampled: Each request's last token, which a drafter computes ahead of the model, after all
            others; mostly None.
        batch: Where the step's counts and block tables are: `query_start_loc`, `seq_lens` and
            `block_table` of `Planner.plan`.
        num_drafts: Drafts of each request that have been computed one after the other.
        recordings: Kind of layer -> part of the step -> what the first layer of this kind launched
            in this part. Later layers of the kind repeat the recording.
        rows: Workspace and number of a round -> the rows of the workspace that the round takes,
            from the first layer that has asked for them.
    """

    decode: DecodeStep | None
    rounds: list[Round]
    sampled: DecodeStep | None = None
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    num_drafts: int = 0
    recordings: dict[Hashable, dict[Hashable, Recording]] = field(default_factory=dict)
    rows: dict[Hashable, Rows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A segment and where it lies.

    Args:
        request: Number of the request in the step, which is its row's number in the block table.
        row: Row in the batch of the segment's first token.
        segment: The segment.
        place: Logical place of the segment's first token.
    """

    request: int
    row: int
    segment: Segment
    place: int

    @property
    def length(self) -> int:
        return self.segment.end - self.segment.start

    @property
    def num_keys(self) -> int:
        return self.place + self.length


class Planner:
    """Turns a step's token counts into what the kernels are told.

    Args:
        layout: The cascade's structure.
        device: Where the engine's tensors are.
        max_num_seqs: Most requests of a step.
        max_keys: Rows of keys in the workspace; at least enough for one request.
        most_tokens: Most tokens of a request that are resolved one by one, on the device: a token
            and its drafts. Of such a row those that are late are computed for nothing
            (`resolve_decodes`); what is no draft must not be late.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        max_num_seqs: int,
        max_keys: int,
        most_tokens: int = 1,
    ) -> None:
        self.layout, self.most_tokens = layout, most_tokens
        self.max_keys = max(max_keys, _most_keys(layout) + KEY_PADDING)
        self.epochs = shared_epochs(layout, device)
        self.table = self.epochs.table
        self.decodes = Resolved.empty(self.table, max_num_seqs * most_tokens)
        self._max_num_seqs = max_num_seqs

    def plan(
        self,
        query_start_loc: torch.Tensor,
        query_start_loc_cpu: npt.NDArray[np.int32],
        seq_lens: torch.Tensor,
        seq_lens_cpu: npt.NDArray[np.int32],
        block_table: torch.Tensor,
        with_sampled: bool = False,
    ) -> GpuMetadata:
        """Prepare one step.

        Args:
            query_start_loc: [num_requests + 1] int32 on the device, first row in the batch of each
                request.
            query_start_loc_cpu: The same on the host.
            seq_lens: [num_requests] int32 on the device, tokens of each request once the step is
                done.
            seq_lens_cpu: The same on the host; exact for requests with more tokens in the step than
                are resolved one by one, an upper bound for the others.
            block_table: [num_requests or more, width] int32 on the device, block ids of each
                request's block-table row.
            with_sampled: Whether each request has one more token, in the batch and on the device,
                not in `seq_lens_cpu`: the sampled one, which a drafter computes ahead of the model.

        Returns:
            The step. The next call overwrites the tensors of single tokens.
        """
        most, lengths = self.most_tokens, np.diff(query_start_loc_cpu) - with_sampled
        batch = query_start_loc, seq_lens, block_table
        self.epochs.cover(min(int(seq_lens_cpu.max(initial=1)), self.layout.config.max_model_len))
        decode = None
        if ((lengths > 0) & (lengths <= most)).any():
            part = ALL_BUT_LAST if with_sampled else ALL
            decode = self._decode(self.decodes, batch, most, part, merges=True)
        waves: dict[int, list[_Cut]] = defaultdict(list)
        for request in np.flatnonzero(lengths > most).tolist():
            end, row = int(seq_lens_cpu[request]), int(query_start_loc_cpu[request])
            start = end - int(lengths[request])
            for number, segment in enumerate(self.layout.segments(start, end)):
                place = self.layout.epochs[segment.epoch].place(segment.start)
                cut = _Cut(request, row + segment.start - start, segment, place)
                waves[number].append(cut)
        rounds = self._rounds(list(waves.values()), block_table) if waves else []
        sampled = None
        if with_sampled:
            sampled = self._decode(self._sampled, batch, 1, LAST, num_ahead=1, drafted=most)
        return GpuMetadata(decode, rounds, sampled, batch)

    def plan_draft(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        num_ahead: int,
    ) -> GpuMetadata:
        """Prepare a drafter's step of one token of each request, on the device alone.

        Args:
            query_start_loc: As for `plan`; so are `seq_lens` and `block_table`.
            seq_lens: See there.
            block_table: See there.
            num_ahead: Tokens of each request, the step's included, that the drafter computes ahead
                of the model.

        Returns:
            The step, which merges nothing. The next call overwrites its tensors.
        """
        batch = query_start_loc, seq_lens, block_table
        return GpuMetadata(
            self._decode(self.decodes, batch, 1, num_ahead=num_ahead), [], None, batch
        )

    def update_draft(self, step: GpuMetadata) -> None:
        """Turn a drafter's step into its next one; the first time into its first one.

        A CUDA graph that has recorded this reads the counts as they are when it replays.

        Args:
            step: From `plan` or `plan_draft`; changed in place.
        """
        assert step.batch is not None and not step.rounds
        step.num_drafts += 1
        step.decode = self._decode(self.decodes, step.batch, 1, num_ahead=step.num_drafts)
        step.recordings.clear()

    def last_written(self, query_start_loc: Ints, seq_lens: Ints) -> Ints:
        """Count each request's tokens that are written once a step is done, late drafts left out.

        Args:
            query_start_loc: [num_requests + 1] int32 on the host, as for `plan`.
            seq_lens: [num_requests] int32 on the host, exact.

        Returns:
            [num_requests] int32.
        """
        ends = seq_lens.copy()
        for request, length in enumerate(np.diff(query_start_loc).tolist()):
            if 1 < length <= self.most_tokens:
                first = int(seq_lens[request]) - length
                ends[request] = first + min(length, self.layout.most_together(first, first))
        return ends

    @cached_property
    def _sampled(self) -> Resolved:
        """Room for a token of each request."""
        return Resolved.empty(self.table, self._max_num_seqs)

    def _decode(
        self,
        out: Resolved,
        batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        most: int,
        part: int = ALL,
        *,
        num_ahead: int = 0,
        drafted: int | None = None,
        merges: bool = False,
    ) -> DecodeStep:
        """Resolve tokens one by one, into `out`."""
        query_start_loc, seq_lens, block_table = batch
        resolve_decodes(
            out, self.table, query_start_loc, seq_lens, block_table, most, part, num_ahead, drafted
        )
        num_rows = most * len(seq_lens)
        return DecodeStep(
            rows=out.decode_rows(0, num_rows, most),
            slots=out.slots[:num_rows],
            tokens=out.tokens[:num_rows],
            merges=out.merges(0, num_rows, most) if merges and self.layout.config.chooses else None,
        )

    def _rounds(self, waves: list[list[_Cut]], block_table: torch.Tensor) -> list[Round]:
        """Cut waves where the workspace is full, and resolve all their segments in one launch."""
        parts = [
            part
            for wave in waves
            for part in _packed(wave, lambda cut: _num_rows([cut]), self.max_keys)
        ]
        # With scores a boundary needs the attention of the wave before it.
        room = 0 if self.layout.config.needs_scores else self.max_keys
        rounds = _packed(parts, _num_rows, room)
        cuts = [cut for parts in rounds for part in parts for cut in part]
        num_segments, num_rows = len(cuts), sum(cut.length for cut in cuts)

        # One copy to the device for all arrays; the tensors below are views of the copy.
        lengths = [[cut.length for part in parts for cut in part] for parts in rounds]
        keys = [[cut.num_keys for part in parts for cut in part] for parts in rounds]
        query_spans = np.concatenate([_spans(each) for each in lengths])
        key_spans = np.concatenate([_spans(each, KEY_PADDING) for each in keys])
        owner = np.repeat(np.arange(num_segments), [cut.length for cut in cuts])
        within = np.concatenate([np.arange(cut.length) for cut in cuts])
        columns = [
            np.array([cut.request for cut in cuts]),
            np.array([cut.segment.end for cut in cuts]),
            np.array([cut.length for cut in cuts]),
            np.array([cut.row for cut in cuts]),
            within + np.array([cut.row for cut in cuts])[owner],
            within + np.array([cut.segment.start for cut in cuts])[owner],
            query_spans.ravel(),
            key_spans.ravel(),
        ]
        sent = _send(np.concatenate(columns).astype(np.int32), block_table.device)
        segments = sent[: 4 * num_segments].view(4, num_segments)
        rows, tokens = sent[4 * num_segments : 4 * num_segments + 2 * num_rows].view(2, num_rows)
        spans = sent[4 * num_segments + 2 * num_rows :].view(2, num_segments, 2)

        resolved = Resolved.empty(self.table, num_segments)
        resolve_segments(resolved, self.table, segments, block_table)

        def view(first: int, part: list[_Cut]) -> Segments:
            """Some segments, the first of which is number `first` of all."""
            chosen, last = slice(first, first + len(part)), first + len(part) - 1
            return Segments(
                query_spans=spans[0, chosen],
                key_spans=spans[1, chosen],
                block_table=resolved.block_table[chosen],
                carry=resolved.carry[chosen],
                exponents=resolved.exponents[chosen],
                num_groups=resolved.num_groups[chosen],
                num_queries=int(query_spans[last, 1]),
                num_rows=int(key_spans[last, 1]) + KEY_PADDING,
                max_query_len=max(cut.length for cut in part),
                max_key_len=max(cut.num_keys for cut in part),
                max_prefix_len=max(cut.place for cut in part),
            )

        made, segment, row = [], 0, 0
        for parts in rounds:
            first, together = segment, [cut for part in parts for cut in part]
            launches = []
            for part in parts:
                merges = any(
                    cut.segment.merges and len(self.layout.epochs[cut.segment.epoch].groups)
                    for cut in part
                )
                last = segment + len(part)
                launches.append(
                    Launch(
                        segments=view(segment, part),
                        merges=resolved.merges(segment, last) if merges else None,
                    )
                )
                segment = last
            all_segments = view(first, together)
            some = slice(row, row + all_segments.num_queries)
            made.append(
                Round(tuple(launches), all_segments, rows[some], _span(together), tokens[some])
            )
            row += all_segments.num_queries
        return made


def _packed(items: list[T], num_rows: Callable[[T], int], room: int) -> list[list[T]]:
    """Put items that follow one another together, as many as there is room for, at least one."""
    found: list[list[T]] = []
    left = 0
    for item in items:
        taken = num_rows(item)
        if taken > left:
            found.append([])
            left = room
        found[-1].append(item)
        left -= taken
    return found


def _num_rows(cuts: list[_Cut]) -> int:
    """Rows of the workspace that some segments' keys take."""
    return sum(cut.num_keys + KEY_PADDING for cut in cuts)


def _most_keys(layout: Layout) -> int:
    return layout.max_blocks * layout.config.block_size


def _spans(lengths: list[int], padding: int = 0) -> npt.NDArray[np.int64]:
    """[len(lengths), 2] first and last + 1 of runs that follow one another, `padding` apart."""
    starts = np.cumsum([0, *lengths[:-1]]) + padding * np.arange(len(lengths))
    return np.stack([starts, starts + lengths], axis=1)


def _span(cuts: list[_Cut]) -> tuple[int, int] | None:
    """First and last + 1 of segments' rows in the batch if they follow one another, or None."""
    row = cuts[0].row
    for cut in cuts:
        if cut.row != row:
            return None
        row += cut.length
    return cuts[0].row, row


def _send(values: Ints, device: torch.device) -> torch.Tensor:
    """Copy `values` to the device without waiting for the device."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
