"""Draws the README's plots from the committed rows.

    pip install '.[plots]' && python benchmarks/plots.py

Each plot carries a digest of the rows it was drawn from, which a test compares with the rows.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# Name of a cache to label and colour (Okabe and Ito's, told apart by colour-blind readers too).
CACHES = {
    "full": ("full attention", "#D55E00"),
    "blend_auto": ("blend, 11 sub-caches", "#0072B2"),
    "paper": ("paper, 4 sub-caches", "#009E73"),
    "window": ("window", "#777777"),
}


def digest(name: str) -> str:
    """Of a result file, whatever its line ends."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def streaming_perplexity(source: str, target: Path) -> None:
    """Perplexity along one text, past the length that the model was trained for.

    Args:
        source: Name of the result file.
        target: Where the SVG goes.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same bytes each time; text stays text.
    pyplot.rcParams.update({"svg.hashsalt": "cascade", "svg.fonttype": "none", "font.size": 11})
    with (RESULTS / source).open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
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
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None, "Description": f"rows {digest(source)}"})
    pyplot.close(figure)


def main() -> int:
    target = RESULTS / "streaming_perplexity.svg"
    streaming_perplexity("streaming_perplexity.csv", target)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
