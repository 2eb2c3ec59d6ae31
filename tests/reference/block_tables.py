"""The cascade table applied to block-table rows, one segment at a time, in plain Python."""

from __future__ import annotations

from typing import Any


def resolve_segments(out: Any, table: Any, segments: Any, block_table: Any) -> None:
    """See `vllm_cascade.kernels.block_tables.resolve_segments`."""
    for s, (request, end, length, row) in enumerate(segments.T.tolist()):
        _resolve(out, table, s, block_table[request].tolist(), end, length, row, s)


def resolve_decodes(
    out: Any,
    table: Any,
    query_start_loc: Any,
    seq_lens: Any,
    block_table: Any,
    most: int = 1,
    part: int = 0,
    num_ahead: int = 0,
    drafted: int | None = None,
) -> None:
    """See `vllm_cascade.kernels.block_tables.resolve_decodes`."""
    starts = query_start_loc.tolist()
    epochs = table.starts.tolist()
    for r, end in enumerate(seq_lens.tolist()):
        rows = [*range(starts[r], starts[r + 1])]
        first, asked = end - len(rows), len(rows) - (part > 0)
        # A boundary's token is computed alone, all others before one together.
        ends = range(table.first_end, max(first, 0) + table.first_end + table.stride, table.stride)
        boundary = min(end for end in ends if end > first) - 1
        num = min(asked, 1 if first == boundary else boundary - first)
        if asked > (most if drafted is None else drafted):
            num = asked
        for i in range(most):
            token, is_late = (0, 0, starts[r]), False
            if part == 2 and i < len(rows) and end > 0:
                token = first + num + 1, 1, rows[num]
            elif part < 2 and i < asked <= most and end > 0:
                is_late = i >= num
                token = first + min(i, num - 1) + 1, 1, rows[i]
            if num_ahead:
                following = [start for start in epochs if start > token[0] - num_ahead]
                token = min([*following[:1], token[0]]), *token[1:]
            owner = None if i else r
            _resolve(out, table, most * r + i, block_table[r].tolist(), *token, owner)
            if is_late:
                out.slots[most * r + i] = -1


def _resolve(
    out: Any,
    table: Any,
    s: int,
    blocks: list[int],
    end: int,
    length: int,
    row: int,
    owner: int | None,
) -> None:
    """What merges is written for `owner`, if anything is."""
    out.rows[s] = row
    if length == 0:
        out.places[s] = out.slots[s] = -1
        if owner is not None:
            out.num_groups[owner] = out.num_keys[owner] = 0
        return
    start, sinks, stride, size = end - length, table.num_sink_tokens, table.stride, table.block_size
    epochs = table.starts.tolist()
    epoch = max(e for e, first in enumerate(epochs) if first <= start)
    place = int(table.prefixes[epoch]) + start - epochs[epoch]
    last = place + length - 1
    out.places[s], out.tokens[s] = place, end - 1
    entries = table.entries[epoch].tolist()
    for j in range(last // size + 1):
        out.block_table[s, j] = blocks[entries[j]]
    out.slots[s] = blocks[entries[last // size]] * size + last % size
    # Grid points lie at sinks + k * stride, k = 1, 2, ...
    grid = range(sinks + stride, end + 1, stride)
    between = sum(start < point for point in grid)
    out.carry[s] = table.decay ** (stride * between)
    out.exponents[s] = len(grid) * stride - (start - sinks) - 1
    out.weights[s] = table.decay ** float(out.exponents[s])
    if owner is None:
        return
    out.num_keys[owner] = last + 1
    following = epochs[epoch + 1] if epoch + 1 < len(epochs) else None
    out.num_groups[owner] = int(table.num_groups[epoch]) if end == following else 0
    for g in range(int(out.num_groups[owner])):
        for b, entry in enumerate(table.groups[epoch, g].tolist()):
            out.groups[s, g, b] = blocks[entry]
