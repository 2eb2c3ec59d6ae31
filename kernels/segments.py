"""What the GPU kernels are told about a step, all of it on the device and resolved to blocks.

The cascade table has been applied: a `block_table` here lists physical blocks in logical order, so
the key at logical place j is in slot ``j % block_size`` of block ``j // block_size`` of its row,
and j is its rotary position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Segments:
    """The several-token segments of one wave, at most one per request.

    Args:
        query_starts: [num_segments + 1] int32 where each segment's queries start, packed.
        key_starts: [num_segments + 1] int32 where its keys start in the workspace: all keys held
            at the segment's end, its own queries' the last.
        block_table: [num_segments, max_blocks] int32; entries past the last key are arbitrary.
        carry: [num_segments] float32 factor on the scores kept so far.
        exponents: [num_segments] float32; query i of a segment weighs ``decay ** (exponent - i)``.
        num_queries: ``query_starts[-1]``.
        num_keys: ``key_starts[-1]``.
        max_query_len: Most queries of a segment.
        max_key_len: Most keys of a segment.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    block_table: torch.Tensor
    carry: torch.Tensor
    exponents: torch.Tensor
    num_queries: int
    num_keys: int
    max_query_len: int
    max_key_len: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One token of each of several requests.

    Args:
        rows: [num_rows] int32 row of each token in the batch.
        places: [num_rows] int32 logical place of the token, as many keys precede it; -1 where
            there is nothing to do (padding, or a request with several tokens in this step).
        block_table: [num_rows, max_blocks] int32; entries past the token's block are arbitrary.
        carry: [num_rows] float32 factor on the scores kept so far.
        weights: [num_rows] float32 weight of the query in the scores.
    """

    rows: torch.Tensor
    places: torch.Tensor
    block_table: torch.Tensor
    carry: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Merges:
    """The merge groups of the boundaries that run after a wave.

    Args:
        groups: [num_rows, max_groups, blocks_per_group] int32 physical blocks, oldest first.
        num_groups: [num_rows] int32 groups of each row that merge now; mostly 0.
        block_table: [num_rows, max_blocks] int32 all blocks a row holds, in logical order.
        num_keys: [num_rows] int32 keys a row holds at the boundary.
    """

    groups: torch.Tensor
    num_groups: torch.Tensor
    block_table: torch.Tensor
    num_keys: torch.Tensor
