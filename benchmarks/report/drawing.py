"""Draws the cascade over a request's blocks, as `layout` moves them.

    python benchmarks report.drawing

Three rows: the text, the blocks that hold it as a boundary is reached, and the same blocks once it
has run. A ribbon is a block's way; it narrows where tokens are evicted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from records import ROOT
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import Epoch, Layout, build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

TARGET = ROOT / "docs" / "plots" / "cascade.svg"
OPTIONS = {
    "cache_tokens": 256,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 32,
}
# A stride more than at a boundary at which three levels are left.
BLOCK_SIZE, NUM_TOKENS = 16, 912
WIDTH, HEIGHT, MARGIN, BLOCK = 1060, 570, 30, 38  # in pixels, as all that follows
TEXT_Y, BEFORE_Y, AFTER_Y = 96, 236, 408
TEXT_HEIGHT, BLOCK_HEIGHT = 22, 34
STYLE = """
  svg { --page: #ffffff; --text: #16181d; --muted: #5a5f69; --line: #c3c8d0; --gone: #e4e6ea;
    --sinks: #f5b878; --c3: #d3eeb3; --c2: #8fd3b6; --c1: #4fb3c8; --c0: #2272ae;
    --on: #16181d; --on0: #ffffff; --free: #b3261e; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #14161a; --text: #e8eaee; --muted: #a2a7b1; --line: #4a505a; --gone: #30343b;
      --sinks: #c9762b; --c3: #31437f; --c2: #2b6283; --c1: #207858; --c0: #8fc94a;
      --on: #f4f5f7; --on0: #14161a; --free: #ff8a80; }
  }
  text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }
  .title { font-size: 17px; font-weight: 600; }
  .note { fill: var(--muted); }
  .number { font-size: 12px; text-anchor: middle; fill: var(--on); }
  .number.c0 { fill: var(--on0); }
  .number.sinks { fill: #16181d; }
  .middle { text-anchor: middle; }
  .way { opacity: .3; }
  .merged { opacity: .75; }
  rect.sinks, path.sinks { fill: var(--sinks); }
  rect.c0, path.c0 { fill: var(--c0); }
  rect.c1, path.c1 { fill: var(--c1); }
  rect.c2, path.c2 { fill: var(--c2); }
  rect.c3, path.c3 { fill: var(--c3); }
  rect.gone { fill: var(--gone); }
  rect.empty { fill: none; stroke: var(--free); stroke-dasharray: 4 3; }
  .edge { fill: none; stroke: var(--page); stroke-width: 1.5; }
  .group { fill: none; stroke: var(--text); stroke-width: 2; }
  .freed { fill: none; stroke: var(--free); stroke-width: 1.3; stroke-dasharray: 4 3; }
  text.free { fill: var(--free); }
"""


@dataclass(frozen=True)
class Row:
    """A request's blocks in logical order.

    Attributes:
        entries: The row entry of each.
        parts: The part of the cache that each is in: "sinks", "c3" .. "c0"; "empty" for the
            blocks that the next stride will fill.
    """

    entries: list[int]
    parts: list[str]

    def part(self, entry: int) -> str | None:
        """The part that an entry is in."""
        return dict(zip(self.entries, self.parts, strict=True)).get(entry)


def main() -> int:
    TARGET.write_text(drawing(), encoding="utf-8", newline="\n")
    print(f"wrote {TARGET}")
    return 0


def configuration() -> CascadeConfig:
    """A small cascade, of which every block can be drawn."""
    options = CascadeOptions.parse(OPTIONS)
    return resolve(
        options, block_size=BLOCK_SIZE, max_model_len=NUM_TOKENS, position_limit=NUM_TOKENS
    )


def busiest(layout: Layout) -> int:
    """The last epoch at whose end as many blocks come free as at any other's."""
    freed = [freed_count(layout, index) for index in range(len(layout.epochs))]
    return max(range(len(freed)), key=lambda index: (freed[index], index))


def freed_count(layout: Layout, index: int) -> int:
    """Blocks that the boundary at an epoch's end frees."""
    if index + 1 == len(layout.epochs):
        return 0
    later = layout.epochs[index + 1]
    return len(layout.epochs[index].table) - later.prefix_tokens // layout.config.block_size


def row_of(config: CascadeConfig, epoch: Epoch, filled: bool) -> Row:
    """The blocks at an epoch's end, or at its start if it is not `filled`."""
    sinks = ["sinks"] * (config.num_sink_tokens // config.block_size)
    sizes = [size // config.block_size for size in epoch.sub_caches]
    parts = [f"c{i}" for i in reversed(range(len(sizes))) for _ in range(sizes[i])]
    own = len(epoch.table) - len(sinks) - len(parts)
    return Row(epoch.table.tolist(), [*sinks, *parts, *(["c0" if filled else "empty"] * own)])


def spans_of(layout: Layout, index: int) -> dict[int, tuple[int, int]]:
    """Row entry to the span of tokens that its block's tokens are from, at the end of an epoch."""
    block, spans = layout.config.block_size, {}
    for epoch in layout.epochs[: index + 1]:
        own = epoch.table[epoch.prefix_tokens // block :].tolist()
        for number, entry in enumerate(own):
            first = epoch.start + number * block
            spans[entry] = (first, min(first + block, epoch.end))
        if epoch is not layout.epochs[index]:
            for group in epoch.groups.tolist():
                half, held = len(group) // 2, [spans[entry] for entry in group]
                for number, entry in enumerate(group[:half]):
                    spans[entry] = (held[2 * number][0], held[2 * number + 1][1])
    return {entry: spans[entry] for entry in layout.epochs[index].table.tolist()}


def drawing() -> str:
    """The picture as SVG."""
    config = configuration()
    layout = build_layout(config)
    index = busiest(layout)
    epoch, later = layout.epochs[index : index + 2]
    before, after = row_of(config, epoch, True), row_of(config, later, False)
    groups = epoch.groups.tolist()
    drawn = [
        *text_row(epoch.end, before, spans_of(layout, index)),
        *moves(before, after, groups),
        *blocks(before, BEFORE_Y),
        *blocks(after, AFTER_Y),
    ]
    for group in groups:
        first, end = edges(before, group)
        drawn.append(rect(first + 1, BEFORE_Y + 1, end - first - 2, BLOCK_HEIGHT - 2, "group"))
    drawn += captions(config, epoch.end, before, after)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">\n'
        f"<title>A cascade over the blocks of a request</title>\n<style>{STYLE}</style>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" style="fill: var(--page)"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def text_row(num_tokens: int, row: Row, spans: dict[int, tuple[int, int]]) -> list[str]:
    """The text, and the way of what each block holds of it."""
    scale = (WIDTH - 2 * MARGIN) / num_tokens

    def label(first: int, end: int, text: str) -> str:
        return write(MARGIN + (first + end) / 2 * scale, TEXT_Y - 9, text, "middle")

    drawn = [rect(MARGIN, TEXT_Y, WIDTH - 2 * MARGIN, TEXT_HEIGHT, "gone")]
    for place, (entry, part) in enumerate(zip(row.entries, row.parts, strict=True)):
        first, end = (MARGIN + token * scale for token in spans[entry])
        x = block_x(place)
        drawn += [
            ribbon((first, end, TEXT_Y + TEXT_HEIGHT), (x, x + BLOCK, BEFORE_Y), f"way {part}"),
            rect(first, TEXT_Y, end - first, TEXT_HEIGHT, part),
            rect(first, TEXT_Y, end - first, TEXT_HEIGHT, "edge"),
        ]
    reached = num_tokens
    for part in dict.fromkeys(reversed(row.parts[1:])):
        found = [spans[entry] for entry in row.entries if row.part(entry) == part]
        kept = 1 << int(part[1:])
        drawn.append(label(found[0][0], reached, f"1 token in {kept}" if kept > 1 else "all"))
        reached = found[0][0]
    return drawn


def moves(before: Row, after: Row, groups: list[list[int]]) -> list[str]:
    """What the boundary does: a group narrows to its first half, what is freed is dashed."""
    top, drawn, merging = BEFORE_Y + BLOCK_HEIGHT, [], {e for group in groups for e in group}
    for entry, part in zip(before.entries, before.parts, strict=True):
        if entry not in merging and after.part(entry) not in ("empty", None):
            ways = (*edges(before, [entry]), top), (*edges(after, [entry]), AFTER_Y)
            drawn.append(ribbon(*ways, f"way {part}"))
    for group in groups:
        half = group[: len(group) // 2]
        ways = (*edges(before, group), top), (*edges(after, half), AFTER_Y)
        drawn.append(ribbon(*ways, f"merged {after.part(half[0])}"))
    for entry in before.entries:
        x = sum(edges(before, [entry])) / 2
        if after.part(entry) is None:
            drawn.append(f'<path class="freed" d="M{x:g} {top:g} V{top + 26:g}"/>')
            drawn.append(write(x, top + 40, "free", "middle free"))
        elif after.part(entry) == "empty":
            to = sum(edges(after, [entry])) / 2
            drawn.append(f'<path class="freed" d="{bend(x, top, to, AFTER_Y)}"/>')
    return drawn


def blocks(row: Row, y: float) -> list[str]:
    """The blocks of a row with their row entries."""
    drawn = []
    for place, (entry, part) in enumerate(zip(row.entries, row.parts, strict=True)):
        x = block_x(place)
        middle = f'x="{x + BLOCK / 2:g}" y="{y + BLOCK_HEIGHT / 2 + 4:g}"'
        drawn += [
            rect(x, y, BLOCK, BLOCK_HEIGHT, part, inset=2 if part == "empty" else 0),
            rect(x, y, BLOCK, BLOCK_HEIGHT, "edge"),
            f'<text class="number {part}" {middle}>{entry}</text>',
        ]
    return drawn


def captions(config: CascadeConfig, num_tokens: int, before: Row, after: Row) -> list[str]:
    """All that is written beside the blocks, but for the text's own."""
    blocks_of_group = config.group_tokens // config.block_size
    drawn = [
        write(MARGIN, 34, "Levels over the blocks of a request", "title"),
        write(
            MARGIN,
            56,
            f"{num_tokens:,} tokens of text in {len(before.entries)} blocks of "
            f"{config.block_size} tokens. The numbers are entries of the request's row in vLLM's "
            "block table.",
            "note",
        ),
    ]
    for row, y in ((before, BEFORE_Y), (after, AFTER_Y)):
        for part in dict.fromkeys(row.parts):
            first, end = edges(row, [e for e in row.entries if row.part(e) == part])
            name = {"sinks": "sinks", "empty": "next stride"}.get(part, f"level {part[1:]}")
            below = y + BLOCK_HEIGHT + 18 if row is after else y - 10
            drawn.append(write((first + end) / 2, below, name, "middle"))
        said = ("as a boundary", "is reached") if row is before else ("once it", "has run")
        for line, text in enumerate(said):
            drawn.append(write(block_x(len(row.entries)) + 14, y + 14 + 17 * line, text, "note"))
    for line, text in enumerate(
        (
            f"More than the budget is held, so groups of {blocks_of_group} blocks merge, of the "
            "lowest level first. Half of a group's tokens",
            "survive, chosen in each layer and head, and are written to its first half. That half "
            "is now the newest of the next level.",
            "The other half is free: the next stride is written there (dashed). No other block is "
            "touched. The row has stopped growing.",
        )
    ):
        drawn.append(write(MARGIN, AFTER_Y + BLOCK_HEIGHT + 56 + 22 * line, text, ""))
    return drawn


def block_x(place: int) -> float:
    """The left edge of a block."""
    return MARGIN + place * BLOCK


def edges(row: Row, entries: list[int]) -> tuple[float, float]:
    """Left and right of neighbouring blocks."""
    places = [row.entries.index(entry) for entry in entries]
    return block_x(min(places)), block_x(max(places) + 1)


def rect(x: float, y: float, width: float, height: float, name: str, inset: float = 0) -> str:
    """A rectangle of a class."""
    x, y, width, height = x + inset, y + inset, width - 2 * inset, height - 2 * inset
    return f'<rect class="{name}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def ribbon(top: tuple[float, float, float], bottom: tuple[float, float, float], name: str) -> str:
    """A band from (left, right, y) to (left, right, y)."""
    (left, right, y), (to_left, to_right, to_y) = top, bottom
    path = f"{bend(left, y, to_left, to_y)} L{to_right:g} {to_y:g} "
    path += bend(to_right, to_y, right, y).replace("M", "L", 1)
    return f'<path class="{name}" d="{path} Z"/>'


def bend(x: float, y: float, to_x: float, to_y: float) -> str:
    """A curve that leaves and arrives upright."""
    middle = (y + to_y) / 2
    return f"M{x:g} {y:g} C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"


def write(x: float, y: float, text: str, name: str) -> str:
    """A line of text."""
    return f'<text class="{name}" x="{x:g}" y="{y:g}">{text}</text>'


if __name__ == "__main__":
    sys.exit(main())
