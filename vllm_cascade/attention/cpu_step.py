"""What one engine step does in every cascade layer on a CPU: waves of segments, for all layers.

A chunk that crosses boundaries is worked through in waves. In each wave a request has at most one
segment. The layer writes the segment's keys and values, attends, scores the keys where scores are
kept, and merges groups if the segment ends at a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_cascade.kernels.cpu.attention import DecodeBatch, PrefillSegment
from vllm_cascade.kernels.cpu.merge import MergeBatch
from vllm_cascade.structure.layout import Layout, Segment

Ints = npt.NDArray[np.int64]

# Most keys gathered at once for segments of one token; more segments go in further batches.
DECODE_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True)
class Wave:
    """One segment of each of several requests.

    Args:
        rows: [num_tokens] int64 row in the batch of each token of the wave.
        block_ids: [num_tokens] int64 block that takes each token's key and value.
        offsets: [num_tokens] int64 slot in that block.
        tokens: [num_tokens] int32 index of each token in its request.
        prefills: Segments of several tokens.
        decodes: Segments of one token, in batches.
        merge: Groups to merge once all segments have attended, or None.
    """

    rows: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    tokens: torch.Tensor
    prefills: list[PrefillSegment]
    decodes: list[DecodeBatch]
    merge: MergeBatch | None


@dataclass(frozen=True, slots=True)
class CascadeMetadata:
    """One step on a CPU.

    Args:
        waves: The step's waves, in the order in which they run.
    """

    waves: list[Wave]


@dataclass(slots=True)
class _Draft:
    """A wave being collected, in numpy."""

    rows: list[Ints] = field(default_factory=list)
    block_ids: list[Ints] = field(default_factory=list)
    offsets: list[Ints] = field(default_factory=list)
    tokens: list[Ints] = field(default_factory=list)
    prefills: list[PrefillSegment] = field(default_factory=list)
    # of each segment of one token: row in the batch, place, blocks, carry, weight
    singles: list[tuple[int, int, Ints, float, float]] = field(default_factory=list)
    groups: list[Ints] = field(default_factory=list)
    held: list[Ints] = field(default_factory=list)

    def add(
        self, layout: Layout, segment: Segment, first_row: int, row_blocks: Ints, merges: bool
    ) -> None:
        """Add one request's segment; its tokens have the rows of the batch from `first_row` on."""
        config, epoch = layout.config, layout.epochs[segment.epoch]
        tokens = np.arange(segment.start, segment.end)
        places = epoch.prefix_tokens + tokens - epoch.start
        blocks = row_blocks[epoch.table[: -(-(int(places[-1]) + 1) // config.block_size)]]
        self.rows.append(np.arange(first_row, first_row + len(tokens)))
        self.block_ids.append(blocks[places // config.block_size])
        self.offsets.append(places % config.block_size)
        self.tokens.append(tokens)
        # A score decays with every token. Pages keep scores as of the last grid point passed, so
        # only a segment that passes a grid point has to decay older scores (`carry`).
        passed = layout.boundaries_before(segment.end)
        exponent = passed * config.stride - (tokens - config.num_sink_tokens) - 1.0
        weights = config.score_decay**exponent
        carry = config.score_decay ** (
            config.stride * (passed - layout.boundaries_before(segment.start))
        )
        if len(tokens) == 1:
            self.singles.append((first_row, int(places[0]), blocks, carry, float(weights[0])))
        else:
            self.prefills.append(
                PrefillSegment(
                    start=first_row,
                    end=first_row + len(tokens),
                    block_ids=torch.from_numpy(blocks),
                    first_place=int(places[0]),
                    carry=carry,
                    weights=torch.from_numpy(weights.astype(np.float32)),
                )
            )
        if merges and len(epoch.groups):
            self.groups.append(row_blocks[epoch.groups])
            self.held.append(blocks)

    def wave(self, block_size: int) -> Wave:
        """Turn the draft into a wave of tensors.

        Args:
            block_size: Tokens in a KV block.

        Returns:
            The wave.
        """
        merge = None
        if self.groups:
            counts = [len(groups) for groups in self.groups]
            merge = MergeBatch(
                groups=torch.from_numpy(np.concatenate(self.groups)),
                group_request=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
                held=[torch.from_numpy(blocks) for blocks in self.held],
            )
        return Wave(
            rows=torch.from_numpy(np.concatenate(self.rows)),
            block_ids=torch.from_numpy(np.concatenate(self.block_ids)),
            offsets=torch.from_numpy(np.concatenate(self.offsets)),
            tokens=torch.from_numpy(np.concatenate(self.tokens).astype(np.int32)),
            prefills=self.prefills,
            decodes=_decode_batches(self.singles, block_size),
            merge=merge,
        )


def plan_step(
    layout: Layout,
    query_start_loc: Ints,
    seq_lens: Ints,
    block_table: npt.NDArray[np.int32],
    num_ahead: int = 0,
) -> CascadeMetadata:
    """Cut one step's batch into waves.

    Args:
        layout: The cascade's structure.
        query_start_loc: [num_requests + 1] integers, first row of each request in the batch.
        seq_lens: [num_requests] integers, tokens of each request once the step is done.
        block_table: [num_requests, width] int32 block ids of each request's block-table row.
        num_ahead: Last tokens of each request that a drafter computes ahead of the model. They are
            computed again, and merge nothing until then.

    Returns:
        The step; without waves if the batch has no tokens.
    """
    drafts: list[_Draft] = []
    for index, end in enumerate(seq_lens.tolist()):
        first_row = int(query_start_loc[index])
        length = int(query_start_loc[index + 1]) - first_row
        if length == 0:
            continue
        row_blocks = block_table[index].astype(np.int64)
        for number, segment in enumerate(layout.segments(end - length, end)):
            if number == len(drafts):
                drafts.append(_Draft())
            row = first_row + segment.start - (end - length)
            merges = segment.merges and segment.end <= end - num_ahead
            drafts[number].add(layout, segment, row, row_blocks, merges)
    return CascadeMetadata([draft.wave(layout.config.block_size) for draft in drafts])


def _decode_batches(
    singles: list[tuple[int, int, Ints, float, float]], block_size: int
) -> list[DecodeBatch]:
    batches, first = [], 0
    while first < len(singles):
        last, tokens = first, 0
        while last < len(singles) and (
            last == first or tokens + len(singles[last][2]) * block_size <= DECODE_TOKENS
        ):
            tokens += len(singles[last][2]) * block_size
            last += 1
        rows, places, blocks, carry, weights = zip(*singles[first:last], strict=True)
        counts = [len(ids) for ids in blocks]
        batches.append(
            DecodeBatch(
                rows=torch.tensor(rows),
                places=torch.tensor(places),
                block_ids=torch.from_numpy(np.concatenate(blocks)),
                block_row=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
                block_place=torch.from_numpy(np.concatenate([np.arange(n) for n in counts])),
                carry=torch.tensor(carry, dtype=torch.float32),
                weights=torch.tensor(weights, dtype=torch.float32),
            )
        )
        first = last
    return batches
