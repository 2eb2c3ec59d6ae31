"""The drawing of the cascade is the script's own, and shows what the layout does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from report import drawing
from vllm_cascade.structure.layout import build_layout

ROOT = Path(__file__).parents[2]


def test_the_committed_drawing_is_the_scripts() -> None:
    committed = (ROOT / "docs" / "plots" / "cascade.svg").read_text(encoding="utf-8")
    assert committed == drawing.drawing(), "run python benchmarks report.drawing"
    ElementTree.fromstring(committed)


def test_it_shows_a_boundary_at_which_three_levels_are_left() -> None:
    config = drawing.configuration()
    layout = build_layout(config)
    index = drawing.busiest(layout)
    epoch, later = layout.epochs[index : index + 2]
    before = drawing.row_of(config, epoch, filled=True)
    after = drawing.row_of(config, later, filled=False)
    merged = [[before.part(entry) for entry in group] for group in epoch.groups.tolist()]
    assert {part for group in merged for part in group} == {"c0", "c1", "c2"}
    assert all(len(set(group)) == 1 for group in merged)
    for group, (part, *_) in zip(epoch.groups.tolist(), merged, strict=True):
        half = len(group) // 2
        assert {after.part(entry) for entry in group[:half]} == {f"c{int(part[1:]) + 1}"}
        assert {after.part(entry) for entry in group[half:]} == {"empty"}


def test_spans_are_halved_by_each_merge() -> None:
    config = drawing.configuration()
    layout = build_layout(config)
    index = drawing.busiest(layout)
    row = drawing.row_of(config, layout.epochs[index], filled=True)
    spans = drawing.spans_of(layout, index)
    lengths = {"sinks": 16, "c3": 128, "c2": 64, "c1": 32, "c0": 16}
    for entry, part in zip(row.entries, row.parts, strict=True):
        first, end = spans[entry]
        assert end - first == lengths[part]
    held = [spans[entry] for entry in row.entries[1:]]
    assert all(a[1] == b[0] for a, b in pairwise(held)), "what is held has no gap"
    assert held[0][0] == config.num_sink_tokens, "nothing is out of reach"
    assert held[-1][1] == layout.epochs[index].end
