"""What the GPU kernels are told about a step: device tensors, resolved to physical blocks.

The cascade table has been applied: a `block_table` here lists physical blocks in logical order. So
the key at logical place j is in slot ``j % block_size`` of entry ``j // block_size`` of its row of
the block table, and j is the key's rotary position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Workspace rows after each segment's keys whose values are zero. FlashAttention-3 multiplies whole
# tiles of at most this many values. It gives values past a segment's end the weight zero, but zero
# times NaN is NaN, and another request may have left NaN there.
KEY_PADDING = 192


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of several tokens: of one wave, at most one per request; or of a round's waves.

    Args:
        query_spans: [num_segments, 2] int32 first and last + 1 of each segment's queries, packed.
        key_spans: [num_segments, 2] int32 first and last + 1 of each segment's keys in the
            workspace: all keys held at the segment's end, the keys of its own tokens last.
            `KEY_PADDING` rows follow each segment's keys.
        block_table: [num_segments, max_blocks] int32; entries past the last key are arbitrary.
        carry: [num_segments] float32 factor on the scores kept so far.
        exponents: [num_segments] float32; query i of a segment weighs ``decay ** (exponent - i)``.
        num_groups: [num_segments] int32 groups that merge at the segment's end.
        num_queries: ``query_spans[-1, 1]``.
        num_rows: Rows of the workspace, padding included.
        max_query_len: Most queries of a segment.
        max_key_len: Most keys of a segment.
        max_prefix_len: Most keys that a segment finds in the pages.
    """

    query_spans: torch.Tensor
    key_spans: torch.Tensor
    block_table: torch.Tensor
    carry: torch.Tensor
    exponents: torch.Tensor
    num_groups: torch.Tensor
    num_queries: int
    num_rows: int
    max_query_len: int
    max_key_len: int
    max_prefix_len: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Tokens that attend one by one: those of several requests, and the drafts behind them.

    Args:
        rows: [num_rows] int32 row of each token in the batch.
        places: [num_rows] int32 logical place of the token, which is the number of keys before it;
            -1 where there is nothing to do (padding, or a request with a longer chunk in this
            step). In a request's rows they follow one another, with -1 after the last.
        block_table: [num_rows, max_blocks] int32; entries past the token's block are arbitrary.
        carry: [num_rows] float32 factor on the scores kept so far.
        weights: [num_rows] float32 weight of the query in the scores.
        per_request: Rows of each request. They hold the same blocks, but for the last row's own.
    """

    rows: torch.Tensor
    places: torch.Tensor
    block_table: torch.Tensor
    carry: torch.Tensor
    weights: torch.Tensor
    per_request: int = 1

    def part(self, start: int, end: int) -> DecodeRows:
        """View rows ``start .. end - 1``, all rows of some requests."""
        tensors = (self.rows, self.places, self.block_table, self.carry, self.weights)
        return DecodeRows(*(each[start:end] for each in tensors), self.per_request)


@dataclass(frozen=True, slots=True)
class Merges:
    """The merge groups of the boundaries that run after a wave.

    Args:
        groups: [num_rows, max_groups, blocks_per_group] int32 physical blocks, oldest first.
        num_groups: [num_rows] int32 groups of each row that merge now; mostly 0.
        block_table: [num_rows, max_blocks] int32 all blocks that a row holds, in logical order.
        num_keys: [num_rows] int32 keys that a row holds at the boundary.
    """

    groups: torch.Tensor
    num_groups: torch.Tensor
    block_table: torch.Tensor
    num_keys: torch.Tensor
