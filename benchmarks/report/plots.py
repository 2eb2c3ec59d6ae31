"""Draws the committed result files: docs/plots/NAME.svg of NAME.csv, or of a study in it.

    pip install '.[plots]' && python benchmarks report.plots

Each plot carries a digest of the rows and of this script, which a test compares with both; where
the pinned Matplotlib is installed it compares every byte. Without rows there is no plot.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from records import RESULTS, ROOT
from report.studies import Row, file_of, rows_of
from vllm_cascade.evaluation.scoring import wilson

DRAWN = ROOT / "docs" / "plots"
# Okabe and Ito's colours, told apart by colour-blind readers too.
RED, BLUE, GREEN, ORANGE, PINK, SKY, GREY = (
    "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#777777",
)  # fmt: skip
CACHES = {
    "full": ("full attention", RED),
    "distinct_elastic": ("distinct", PINK),
    "distinct_auto": ("distinct, fixed sub-caches", SKY),
    "blend_auto": ("blend, 11 sub-caches", BLUE),
    "paper": ("paper, 4 sub-caches", GREEN),
    "window": ("window", GREY),
}
BACKENDS = {"FLASH_ATTN": RED, "CASCADE": BLUE}
FLASH = {"FlashAttention-2": RED, "FlashAttention-3": ORANGE}
POLICIES = {"distinct": PINK, "paper": GREEN, "blend": BLUE, "window": GREY, "full": RED}
# How much less time than FlashAttention-2 at 1M tokens (arXiv 2406.17808, abstract).
PUBLISHED, PUBLISHED_TOKENS = 6.8, 1 << 20


def streaming_perplexity(rows: list[Row], figure: Any) -> None:
    """Perplexity along one text, past the length that the model was trained for."""
    figure.set_size_inches(8, 3.8)
    axes = figure.subplots()
    for cache, (label, colour) in CACHES.items():
        found = [row for row in rows if row["cache"] == cache]
        middle = [(int(r["first_token"]) + int(r["last_token"])) / 2000 for r in found]
        values = [float(row["perplexity"]) for row in found]
        axes.plot(middle, values, "o-", color=colour, label=label, markersize=3.5, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_ylim(4, 60_000)
    axes.set_xlim(0, 200)
    axes.axvline(8.192, color="black", linewidth=0.8, linestyle=":")
    axes.text(9.5, 40_000, "the model's own limit, 8,192 tokens", fontsize=9, va="center")
    axes.set_xlabel("position in the text, thousands of tokens")
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M, King James Bible, a budget of 2,048 tokens", fontsize=11)
    axes.legend(loc="center right", frameon=False)


def gpu_context(rows: list[Row], figure: Any) -> None:
    """What users of a server see against context length."""
    panels = {
        "ttft_s": "time to first token, s",
        "tpot_ms": "time per output token, ms",
        "requests_fit": "requests that fit at once",
        "tokens_per_s": "tokens/s, as many at once as fit, at most 64",
    }
    figure.set_size_inches(9, 6.4)
    lengths = sorted({int(row["context"]) for row in rows})
    for (column, title), axes in zip(panels.items(), figure.subplots(2, 2).flat, strict=True):
        for backend, colour in BACKENDS.items():
            found = [row for row in rows if row["backend"] == backend and row[column]]
            _line(axes, found, "context", column, colour, backend)
            for row in found:
                if float(row[column]) == 0:
                    axes.annotate(
                        "none", (int(row["context"]), 0), (0, 6), color=colour, ha="center",
                        xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                        fontsize=9,
                    )  # fmt: skip
        _logarithmic(axes, lengths)
        if column == "tpot_ms":
            axes.set_yscale("linear")
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("context, tokens")
    _legend(figure, figure.axes[0], 2)
    figure.suptitle(f"Llama-3.1-8B's shape, {rows[0]['gpu']}, vLLM {rows[0]['vllm']}", fontsize=11)


def gpu_paper_protocol(rows: list[Row], figure: Any) -> None:
    """One layer's latency against tokens, and how much less than FlashAttention-2's by stride."""
    figure.set_size_inches(10, 4.2)
    left, right = figure.subplots(1, 2)
    tokens = sorted({int(row["tokens"]) for row in rows})
    for side, colour in FLASH.items():
        _line(left, [r for r in rows if r["side"] == side], "tokens", "ms_p50", colour, side)
    ours = [row for row in rows if row["policy"]]
    strides = sorted({int(row["stride"]) for row in ours})
    for policy in dict.fromkeys(row["policy"] for row in ours):
        colour = POLICIES[policy]
        for stride in strides:
            # The longer the stride, the fuller the line.
            shade = 1.0 - 0.17 * (len(strides) - 1 - strides.index(stride))
            found = [r for r in ours if (r["policy"], r["stride"]) == (policy, str(stride))]
            label = f"CASCADE {policy}, stride {stride:,}"
            _line(left, found, "tokens", "ms_p50", colour, label, alpha=shade)
        longest = [r for r in ours if r["policy"] == policy and int(r["tokens"]) == tokens[-1]]
        _line(right, longest, "stride", "fa2_over_ours", colour, f"CASCADE {policy}")
    _logarithmic(left, tokens)
    left.set_xlabel("tokens")
    left.set_title("one attention layer, ms", fontsize=11)
    _legend(figure, left, 3)
    if tokens[-1] == PUBLISHED_TOKENS:
        right.axhline(PUBLISHED, color="black", linewidth=0.8, linestyle=":")
        right.text(
            strides[-1], PUBLISHED * 1.03, f"the paper, on its GPU: {PUBLISHED:g}",
            fontsize=9, ha="right", va="bottom",
        )  # fmt: skip
    right.set_xscale("log", base=2)
    _ticks(right, strides)
    right.set_ylim(bottom=0)
    right.set_xlabel("stride, tokens")
    title = f"times less than FlashAttention-2, {_short(tokens[-1])} tokens"
    right.set_title(title, fontsize=11)
    right.legend(frameon=False)
    cache = _short(int(ours[0]["cache_tokens"]))
    title = f"Random hidden states, batch 1, a cache of {cache} tokens, {rows[0]['gpu']}"
    figure.suptitle(title, fontsize=11)


def quality(rows: list[Row], figure: Any) -> None:
    """Share of right answers by length for each task, and perplexity by position, by cache."""
    panels: list[tuple[str, bool, list[dict[str, Any]]]] = []
    answers = [row for row in rows if row["exact"]]
    for task, filler in dict.fromkeys((row["task"], row["filler"]) for row in answers):
        found = [row for row in answers if (row["task"], row["filler"]) == (task, filler)]
        name = ", ".join(filter(None, [task, filler]))
        panels.append((f"{name}: share of right answers", True, [_share(row) for row in found]))
    books = [row for row in rows if row["perplexity"] and row["filler"] != "code"]
    for length in dict.fromkeys(row["length"] for row in books):
        found = [row for row in books if row["length"] == length]
        entries = [
            {
                **row,
                "end_position": int(row["end_position"]),
                "perplexity": float(row["perplexity"]),
            }
            for row in found
        ]
        panels.append((f"{int(length):,} tokens of books: perplexity by position", False, entries))
    height = -(-len(panels) // 2)
    figure.set_size_inches(10, 3.4 * height)
    grid = list(figure.subplots(height, 2, squeeze=False).flat)
    caches = _colours(dict.fromkeys(row["cache"] for row in rows))
    for (title, is_share, entries), axes in zip(panels, grid, strict=False):
        at = "length" if is_share else "end_position"
        for cache, colour in caches.items():
            found = [entry for entry in entries if entry["cache"] == cache]
            if is_share and found:
                _shares(axes, found, cache, colour)
            elif found:
                _line(axes, found, at, "perplexity", colour, cache)
        axes.set_xscale("log", base=2)
        _ticks(axes, sorted({entry[at] for entry in entries}))
        if is_share:
            axes.set_ylim(-0.03, 1.03)
        elif max(e["perplexity"] for e in entries) > 10 * min(e["perplexity"] for e in entries):
            axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=11)
    for axes in grid[len(panels) :]:
        axes.remove()
    _legend(figure, grid[0], 3)


def quality_tasks(rows: list[Row], figure: Any) -> None:
    """Share of right answers of each task, against how many times the budget a prompt is."""
    answers = [row for row in rows if row["exact"]]
    kinds = list(dict.fromkeys((row["task"], row["filler"]) for row in answers))
    budget = int(next(row["cache_tokens"] for row in answers if row["cache_tokens"]))
    caches = _colours(dict.fromkeys(row["cache"] for row in rows))
    height = -(-len(kinds) // 3)
    figure.set_size_inches(10, 3.1 * height + 0.6)
    grid = list(figure.subplots(height, 3, squeeze=False, sharey=True).flat)
    for kind, axes in zip(kinds, grid, strict=False):
        own = [row for row in answers if (row["task"], row["filler"]) == kind]
        for number, (cache, colour) in enumerate(caches.items()):
            # Side by side, or one interval would hide another.
            shift = 2 ** (0.06 * (number - (len(caches) - 1) / 2))
            found = [_share(row, shift / budget) for row in own if row["cache"] == cache]
            if found:
                _shares(axes, found, cache, colour)
        axes.set_xscale("log", base=2)
        times = sorted({int(row["length"]) / budget for row in own})
        axes.set_xticks(times, [f"{value:.2g}x" for value in times], fontsize=9)
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("prompt, times the budget")
        axes.set_title(", ".join(filter(None, kind)), fontsize=11)
    for axes in grid[len(kinds) :]:
        axes.remove()
    _legend(figure, grid[0], len(caches))
    title = f"Share of right answers and its 95% interval, {rows[0]['model']}"
    figure.suptitle(f"{title}, a budget of {budget:,} tokens", fontsize=11)


def _share(row: Row, scale: float = 1) -> dict[str, Any]:
    right, prompts = int(row["exact"]), int(row["prompts"])
    return {
        "cache": row["cache"],
        "length": int(row["length"]) * scale,
        "share": right / prompts,
        "interval": wilson(right, prompts),
    }


def _shares(axes: Any, entries: list[dict[str, Any]], label: str, colour: str) -> None:
    """A line with the 95% Wilson interval of each point."""
    shares = [entry["share"] for entry in entries]
    low, high = zip(*(entry["interval"] for entry in entries), strict=True)
    # What is sure to be right or wrong lies on the end of its interval, but for rounding.
    below = [max(0.0, share - end) for share, end in zip(shares, low, strict=True)]
    above = [max(0.0, end - share) for share, end in zip(shares, high, strict=True)]
    axes.errorbar(
        [entry["length"] for entry in entries], shares, [below, above], fmt="o-", color=colour,
        label=label, markersize=3.5, linewidth=1.5, capsize=2, elinewidth=0.8,
    )  # fmt: skip


def _colours(caches: Iterable[str]) -> dict[str, str]:
    """A colour for each cache: its policy's, or a spare one where that is taken."""
    spare, found = [SKY, ORANGE, PINK, "#000000", "#F0E442"], {}
    for cache in caches:
        own = POLICIES.get(cache.partition(":")[0])
        if own is None or own in found.values():
            own = spare.pop(0) if spare else GREY
        found[cache] = own
    return found


def _line(
    axes: Any, rows: Sequence[dict[str, Any]], x: str, y: str, colour: str, label: str, **more: Any
) -> None:
    """A line through what is above zero, if there is anything."""
    points = sorted((int(row[x]), float(row[y])) for row in rows if row[y] and float(row[y]) > 0)
    if points:
        style = {"color": colour, "label": label, "markersize": 3.5, "linewidth": 1.5}
        axes.plot(*zip(*points, strict=True), "o-", **style, **more)


def _logarithmic(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    _ticks(axes, lengths)


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=9)


def _ticks(axes: Any, values: list[int]) -> None:
    axes.set_xticks(values, [_short(value) for value in values], fontsize=9)
    axes.minorticks_off()


def _short(tokens: int) -> str:
    if tokens % 1000 == 0:
        return f"{tokens:,}"
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return str(tokens)


PLOTS: dict[str, Callable[[list[Row], Any], None]] = {
    draw.__name__: draw
    for draw in (streaming_perplexity, gpu_context, gpu_paper_protocol, quality, quality_tasks)
}


def digests(source: Path) -> str:
    """Of a result file and of this script, whatever their line ends."""
    found = {"rows": source, "script": Path(__file__)}
    return ", ".join(f"{name} {_digest(path)}" for name, path in found.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()[:16]


def draw(name: str, target: Path, results: Path = RESULTS) -> None:
    """Draw a plot.

    Args:
        name: Of `PLOTS`; it has rows.
        target: Where the SVG goes.
        results: Folder of the result files.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same bytes each time; text stays text.
    style = {"svg.hashsalt": "cascade", "svg.fonttype": "none", "font.size": 11}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = pyplot.figure(layout="constrained")
        PLOTS[name](rows_of(name, results), figure)
        said = {"Date": None, "Description": digests(file_of(name, results))}
        figure.savefig(target, metadata=said)
        pyplot.close(figure)


def main() -> int:
    for name in PLOTS:
        if rows_of(name):
            target = DRAWN / f"{name}.svg"
            draw(name, target)
            print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
