"""Block tables resolved on the device against plain Python, and against the layout itself."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from layers import config_of
from reference import block_tables as reference
from vllm_cascade.structure.layout import build_layout

OPTIONS = [
    {"policy": "paper"},
    {"policy": "blend", "selection_window": 64, "score_decay": 0.999},
    {"policy": "window", "num_sub_caches": 1},
]
WRITTEN = ("places", "rows", "slots", "tokens", "exponents")


def fresh(table, count):
    """Room for results, full of what must not be left behind."""
    from vllm_cascade.kernels.block_tables import Resolved

    out = Resolved.empty(table, count)
    for field in dataclasses.fields(out):
        getattr(out, field.name).fill_(-77)
    return out


def full_table(layout, device):
    """The layout's table, filled up to the longest request."""
    from vllm_cascade.attention.epoch_table import EpochTable

    table = EpochTable(layout, device)
    table.cover(layout.config.max_model_len)
    return table.table


def compare(found, expected, segments, per_request=None) -> None:
    """Everything that is written is equal; skipped segments say so and nothing else.

    `per_request` is how many tokens of each request are resolved one by one.
    """
    for name in ("num_keys", "num_groups"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    for s in segments:
        is_skipped = int(expected.places[s]) < 0
        names = ("places", "slots") if is_skipped else WRITTEN
        for name in names:
            assert getattr(found, name)[s].item() == getattr(expected, name)[s].item(), (name, s)
        if is_skipped:
            continue
        for name in ("carry", "weights"):
            got, want = getattr(found, name)[s].item(), getattr(expected, name)[s].item()
            # exp2 of a product against a power: a few roundings of float32.
            assert got == pytest.approx(want, rel=1e-5), (name, s)
        last = int(expected.places[s]) if per_request else int(expected.num_keys[s]) - 1
        blocks = last // 16 + 1
        assert torch.equal(found.block_table[s, :blocks].cpu(), expected.block_table[s, :blocks])
        if s % (per_request or 1):
            continue
        groups = int(expected.num_groups[s // (per_request or 1)])
        assert torch.equal(found.groups[s, :groups].cpu(), expected.groups[s, :groups])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["policy"])
def test_resolved_as_by_hand(device, options) -> None:
    from vllm_cascade.kernels import block_tables

    config = config_of(900, **options)
    layout = build_layout(config)
    table, plain = full_table(layout, device), full_table(layout, torch.device("cpu"))
    draw = random.Random(3)
    ends = [e.end for e in layout.epochs[:-1]]
    # Lengths on, before and after every boundary, the very first token and the very last.
    counts = [1, 2, 15, 16, 17, 900, *ends, *(e - 1 for e in ends), *(e + 1 for e in ends)]
    rows = torch.from_numpy(
        np.stack([np.random.default_rng(r).permutation(5000) for r in range(len(counts))])
    )[:, : layout.max_blocks].to(torch.int32)

    # Single tokens, with requests of no token and of several in between.
    lengths = [draw.choice([1, 1, 1, 0, 5]) if n > 5 else 1 for n in counts]
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(counts, dtype=torch.int32)
    found, expected = fresh(table, len(counts)), fresh(plain, len(counts))
    block_tables.resolve_decodes(
        found, table, starts.to(device), seq_lens.to(device), rows.to(device)
    )
    reference.resolve_decodes(expected, plain, starts, seq_lens, rows)
    compare(found, expected, range(len(counts)), 1)

    # Tokens with up to two drafts behind them, some of which are late, and longer chunks.
    lengths = [min(count, draw.choice([0, 1, 2, 3, 3, 3, 4])) for count in counts]
    assert {1, 2, 3} <= {*lengths}
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    found, expected = fresh(table, 3 * len(counts)), fresh(plain, 3 * len(counts))
    block_tables.resolve_decodes(
        found, table, starts.to(device), seq_lens.to(device), rows.to(device), 3
    )
    reference.resolve_decodes(expected, plain, starts, seq_lens, rows, 3)
    compare(found, expected, range(3 * len(counts)), 3)
    late = check_late(found, table, starts, seq_lens, device)
    for count, length, is_late in zip(counts, lengths, late, strict=True):
        # The end of the longest request is a boundary for the host alone.
        if 0 < length <= 3 and count < 900:
            num = layout.most_together(count - length, count - length)
            assert is_late == [n >= num for n in range(length)]
    assert any(map(any, late))

    # The segments of whole prompts, as the planner cuts them.
    cut = [
        (request, segment.end, segment.end - segment.start, draw.randrange(1000))
        for request, count in enumerate(counts)
        for segment in layout.segments(draw.randrange(count), count)
    ]
    segments = torch.tensor(cut, dtype=torch.int32).T.contiguous()
    found, expected = fresh(table, len(cut)), fresh(plain, len(cut))
    block_tables.resolve_segments(found, table, segments.to(device), rows.to(device))
    reference.resolve_segments(expected, plain, segments, rows)
    compare(found, expected, range(len(cut)))
    merging = [s for s in range(len(cut)) if int(expected.num_groups[s]) > 0]
    assert merging or options["policy"] == "window"


def check_late(found, table, starts, seq_lens, device) -> list[list[bool]]:
    """Drafts that are written nowhere are those to be rejected; returns them by request."""
    from vllm_cascade.kernels import block_tables

    lengths = starts.diff()
    numbers = torch.cat([torch.arange(n) for n in lengths.tolist()])
    positions = numbers + (seq_lens - lengths).repeat_interleave(lengths)
    # The logits of the rows in another order than the rows, which is any.
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    late = block_tables.find_late(
        positions.to(device),
        order.to(device),
        numbers[order].to(torch.int32).to(device),
        table.first_end,
        table.stride,
    )
    late = torch.zeros_like(numbers, dtype=torch.bool).index_put((order,), late.cpu())
    by_request = [each.tolist() for each in late.split(lengths.tolist())]
    for request, row in enumerate(by_request):
        if len(row) > 3:
            # A chunk, of which no token but the last has logits.
            by_request[request] = [False] * len(row)
            continue
        for number, is_late in enumerate(row):
            at = 3 * request + number
            assert found.places[at] >= 0
            assert (found.slots[at] == -1) == is_late
    return by_request


@pytest.mark.parametrize(
    ("part", "num_ahead", "most"), [("ALL_BUT_LAST", 0, 3), ("LAST", 1, 1), ("ALL", 3, 1)]
)
def test_what_a_drafter_is_given(device, part, num_ahead, most) -> None:
    """The model's tokens, then the sampled one, then drafts, which do not leave the epoch."""
    from vllm_cascade.kernels import block_tables

    config = config_of(900, policy="paper")
    layout = build_layout(config)
    table, plain = full_table(layout, device), full_table(layout, torch.device("cpu"))
    part = getattr(block_tables, part)
    ends = [e.end for e in layout.epochs[:-1]]
    counts = [5, 40, *(e + n for e in ends for n in range(-2, 5) if e + n <= 900)]
    lengths = [(1, 2, 4, 0, 6)[n % 5] if part != block_tables.ALL else 1 for n in counts]
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor(counts, dtype=torch.int32)
    rows = torch.arange(layout.max_blocks, dtype=torch.int32).repeat(len(counts), 1)
    found, expected = fresh(table, most * len(counts)), fresh(plain, most * len(counts))
    given = [each.to(device) for each in (starts, seq_lens, rows)]
    # Of a drafter's own drafts there is one.
    modes = most, part, num_ahead, 3 if part != block_tables.ALL else 1
    block_tables.resolve_decodes(found, table, *given, *modes)
    reference.resolve_decodes(expected, plain, starts, seq_lens, rows, *modes)
    compare(found, expected, range(most * len(counts)), most)
    written = found.tokens[found.places >= 0].tolist()
    assert written
    if part == block_tables.ALL_BUT_LAST:
        assert ((found.places >= 0) & (found.slots < 0)).any()
    elif part == block_tables.LAST:
        # Behind what the model computes now, not always at the end of what it was asked.
        chosen = [n for n in range(len(counts)) if lengths[n]]
        assert any(token < counts[n] - 1 for n, token in zip(chosen, written, strict=True))
    if num_ahead == 3:
        at_ends = [count for count in counts if count - 3 in ends]
        assert at_ends and all(layout.end_after(count - 3) > count for count in at_ends)
        assert written == [min(n, layout.end_after(n - 3)) - 1 for n in counts]


def test_epochs_are_filled_before_a_request_comes_to_them(device, monkeypatch) -> None:
    from vllm_cascade.attention import epoch_table

    monkeypatch.setattr(epoch_table, "EPOCHS_AT_ONCE", 1)
    layout = build_layout(config_of(900, policy="paper"))
    table, full = epoch_table.EpochTable(layout, device), full_table(layout, device)
    names = ("entries", "groups", "num_groups", "starts", "prefixes")
    for num_tokens in (1, layout.epochs[1].end - 1, layout.epochs[1].end, 700, 30, 900):
        table.cover(num_tokens)
        # The epoch of the last token and the one that follows.
        known = min(len(layout.epochs), layout.epoch_of(num_tokens) + 2)
        for name in names:
            filled, whole = getattr(table.table, name), getattr(full, name)
            assert torch.equal(filled[:known], whole[:known]), (name, num_tokens)
    assert all(torch.equal(getattr(table.table, name), getattr(full, name)) for name in names)


def test_too_many_segments_are_refused(device) -> None:
    from vllm_cascade.kernels import block_tables

    table = full_table(build_layout(config_of(300, policy="paper")), device)
    rows = torch.zeros(2, 30, dtype=torch.int32, device=device)
    counts = torch.ones(2, dtype=torch.int32, device=device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="2 segments, room for 1"):
        block_tables.resolve_decodes(fresh(table, 1), table, starts, counts, rows)
