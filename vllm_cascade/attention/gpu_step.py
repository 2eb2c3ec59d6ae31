"""What one engine step does in every cascade layer on a GPU, prepared once for all layers.

Single tokens are resolved on the device from token counts that are already there: nothing is
copied, waited for or allocated, so a step of them replays as one CUDA graph. Chunks of several
tokens are cut into waves on the host, which knows their lengths before the device does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_cascade.attention.epoch_table import EpochTable
from vllm_cascade.kernels.block_tables import (
    Resolved,
    resolve_decodes,
    resolve_segments,
)
from vllm_cascade.kernels.launch import Recording
from vllm_cascade.kernels.segments import KEY_PADDING, DecodeRows, Merges, Segments
from vllm_cascade.structure.layout import Layout, Segment

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The single tokens of a batch; rows of other requests are marked as skipped.

    Args:
        rows: What attends.
        slots: [num_requests] int64 slot that takes each token's key and value, -1 for none.
        tokens: [num_requests] int32 index of each token in its request.
        merges: What merges afterwards, or None where nothing ever chooses between tokens.
    """

    rows: DecodeRows
    slots: torch.Tensor
    tokens: torch.Tensor
    merges: Merges | None


@dataclass(frozen=True, slots=True)
class Launch:
    """Segments of one wave that fit the workspace together.

    Args:
        segments: The segments.
        rows: [num_queries] int32 row of each packed query in the batch.
        span: First and last + 1 of `rows` where they follow one another, or None.
        tokens: [num_queries] int32 index of its token in the request.
        merges: What merges afterwards, or None.
    """

    segments: Segments
    rows: torch.Tensor
    span: tuple[int, int] | None
    tokens: torch.Tensor
    merges: Merges | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a workspace that a launch takes; made once a step, for slices cost host time.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_rows, num_kv_heads, head_size].
        value: As `key`.
        packed: As `query`, for outputs of rows that do not follow one another.
        query_starts: [2 * num_segments] int32. Flattened, the spans read as starts: every other
            segment is padding and has no queries.
        key_starts: As `query_starts`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    packed: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class GpuMetadata:
    """One step.

    Args:
        decode: Its single tokens, or None.
        launches: Its chunks, in the order in which they run.
        recordings: What the first layer of each kind launched in each part, for those that follow.
        rows: The rows of each workspace that each launch takes, once a layer has asked for them.
    """

    decode: DecodeStep | None
    launches: list[Launch]
    recordings: dict[Hashable, dict[Hashable, Recording]] = field(default_factory=dict)
    rows: dict[Hashable, Rows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A segment and where it lies.

    Args:
        request: Its request's row in the block table.
        row: Row of its first token in the batch.
        segment: The segment.
        place: Logical place of its first token.
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
    """Turns token counts into what the kernels are told.

    Args:
        layout: The cascade's structure.
        device: Where the engine's tensors are.
        max_num_seqs: Most requests of a step.
        max_keys: Rows of keys that the workspace has, at least enough for one request.
    """

    def __init__(
        self, layout: Layout, device: torch.device, max_num_seqs: int, max_keys: int
    ) -> None:
        self.layout = layout
        self.max_keys = max(max_keys, _most_keys(layout) + KEY_PADDING)
        self.epochs = EpochTable(layout, device)
        self.table = self.epochs.table
        self.decodes = Resolved.empty(self.table, max_num_seqs)

    def plan(
        self,
        query_start_loc: torch.Tensor,
        query_start_loc_cpu: npt.NDArray[np.int32],
        seq_lens: torch.Tensor,
        seq_lens_cpu: npt.NDArray[np.int32],
        block_table: torch.Tensor,
    ) -> GpuMetadata:
        """Prepare one step.

        Args:
            query_start_loc: [num_requests + 1] int32 on the device, first row of each request.
            query_start_loc_cpu: The same on the host.
            seq_lens: [num_requests] int32 on the device, tokens once the step is done.
            seq_lens_cpu: The same on the host; exact for requests with several tokens, of others
                not less.
            block_table: [num_requests or more, width] int32 on the device.

        Returns:
            The step. What it says of single tokens is overwritten by the next call.
        """
        num_requests = len(seq_lens)
        lengths = np.diff(query_start_loc_cpu)
        self.epochs.cover(min(int(seq_lens_cpu.max(initial=1)), self.layout.config.max_model_len))
        decode = None
        if (lengths == 1).any():
            resolve_decodes(self.decodes, self.table, query_start_loc, seq_lens, block_table)
            chooses = self.layout.config.chooses
            decode = DecodeStep(
                rows=self.decodes.decode_rows(0, num_requests),
                slots=self.decodes.slots[:num_requests],
                tokens=self.decodes.tokens[:num_requests],
                merges=self.decodes.merges(0, num_requests) if chooses else None,
            )
        waves: dict[int, list[_Cut]] = defaultdict(list)
        for request in np.flatnonzero(lengths > 1).tolist():
            end, row = int(seq_lens_cpu[request]), int(query_start_loc_cpu[request])
            start = end - int(lengths[request])
            for number, segment in enumerate(self.layout.segments(start, end)):
                place = self.layout.epochs[segment.epoch].place(segment.start)
                cut = _Cut(request, row + segment.start - start, segment, place)
                waves[number].append(cut)
        if not waves:
            return GpuMetadata(decode, [])
        return GpuMetadata(decode, self._launches(list(waves.values()), block_table))

    def _launches(self, waves: list[list[_Cut]], block_table: torch.Tensor) -> list[Launch]:
        """Waves, cut where the workspace is full; all of them resolved in one launch."""
        parts: list[list[_Cut]] = []
        for wave in waves:
            parts.append([])
            held = 0
            for cut in wave:
                taken = cut.num_keys + KEY_PADDING
                if parts[-1] and held + taken > self.max_keys:
                    parts.append([])
                    held = 0
                parts[-1].append(cut)
                held += taken
        cuts = [cut for part in parts for cut in part]
        num_segments, num_rows = len(cuts), sum(cut.length for cut in cuts)

        # One copy to the device for everything; its parts are views.
        query_spans = [_spans([cut.length for cut in part]) for part in parts]
        key_spans = [_spans([cut.num_keys for cut in part], KEY_PADDING) for part in parts]
        owner = np.repeat(np.arange(num_segments), [cut.length for cut in cuts])
        within = np.concatenate([np.arange(cut.length) for cut in cuts])
        columns = [
            np.array([cut.request for cut in cuts]),
            np.array([cut.segment.end for cut in cuts]),
            np.array([cut.length for cut in cuts]),
            np.array([cut.row for cut in cuts]),
            within + np.array([cut.row for cut in cuts])[owner],
            within + np.array([cut.segment.start for cut in cuts])[owner],
            *(spans.ravel() for spans in query_spans + key_spans),
        ]
        sent = _send(np.concatenate(columns).astype(np.int32), block_table.device)
        segments = sent[: 4 * num_segments].view(4, num_segments)
        rows, tokens = sent[4 * num_segments : 4 * num_segments + 2 * num_rows].view(2, num_rows)
        spans = sent[4 * num_segments + 2 * num_rows :].view(2, num_segments, 2)

        resolved = Resolved.empty(self.table, num_segments)
        resolve_segments(resolved, self.table, segments, block_table)

        launches, segment, row = [], 0, 0
        for index, part in enumerate(parts):
            last_segment, last_row = segment + len(part), row + int(query_spans[index][-1, 1])
            chosen, some = slice(segment, last_segment), slice(row, last_row)
            merges = any(
                cut.segment.merges and len(self.layout.epochs[cut.segment.epoch].groups)
                for cut in part
            )
            launches.append(
                Launch(
                    segments=Segments(
                        query_spans=spans[0, chosen],
                        key_spans=spans[1, chosen],
                        block_table=resolved.block_table[chosen],
                        carry=resolved.carry[chosen],
                        exponents=resolved.exponents[chosen],
                        num_groups=resolved.num_groups[chosen],
                        num_queries=last_row - row,
                        num_rows=int(key_spans[index][-1, 1]) + KEY_PADDING,
                        max_query_len=max(cut.length for cut in part),
                        max_key_len=max(cut.num_keys for cut in part),
                        max_prefix_len=max(cut.place for cut in part),
                    ),
                    rows=rows[some],
                    span=_span(part),
                    tokens=tokens[some],
                    merges=resolved.merges(segment, last_segment) if merges else None,
                )
            )
            segment, row = last_segment, last_row
        return launches


def _most_keys(layout: Layout) -> int:
    return layout.max_blocks * layout.config.block_size


def _spans(lengths: list[int], padding: int = 0) -> npt.NDArray[np.int64]:
    """[len(lengths), 2] first and last + 1 of several runs, with `padding` after each."""
    starts = np.cumsum([0, *lengths[:-1]]) + padding * np.arange(len(lengths))
    return np.stack([starts, starts + lengths], axis=1)


def _span(part: list[_Cut]) -> tuple[int, int] | None:
    """The rows of some segments, if each starts where the one before ends."""
    row = part[0].row
    for cut in part:
        if cut.row != row:
            return None
        row += cut.length
    return part[0].row, row


def _send(values: Ints, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
