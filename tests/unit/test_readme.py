"""The figures of README and of docs/results.md are those of the committed rows."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def rows(name: str, **chosen: str) -> list[dict[str, str]]:
    """Rows of a result file with these values, in order."""
    with (RESULTS / name).open(newline="") as file:
        found = [
            row
            for row in csv.DictReader(file)
            if all(row[column] == value for column, value in chosen.items())
        ]
    assert found, (name, chosen)
    return found


def cells(label: str) -> list[list[str]]:
    """Cells of the table rows whose first cell starts with `label`."""
    pages = (ROOT / "README.md", ROOT / "docs" / "results.md")
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    tables = ([c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|")
    found = [row for row in tables if row[0].startswith(label)]
    assert found, label
    return found


def agrees(cell: str, value: float, which: int = 0) -> bool:
    """Whether a number in a cell is `value`, rounded to as many digits as are shown."""
    shown = NUMBER.findall(cell)[which].replace(",", "")
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5001 * 10.0**-digits


def layer_rows() -> Iterator[tuple[list[str], str, float]]:
    """README's cells, the name in the CSV, and milliseconds in the cells' unit."""
    prefill = cells("prefill of 1,048,576 tokens")[0]
    same = cells("the same")
    yield prefill, "prefill_1m_fa3", 1e3
    yield same[0], "prefill_1m_wide_fa3", 1e3
    yield cells("prefill of 16,384 tokens")[0], "prefill_16k_fa3", 1.0
    yield cells("decode, 64 requests")[0], "decode_fa3", 1.0


def test_layer() -> None:
    for shown, name, unit in layer_rows():
        theirs, ours = rows("gpu_layer.csv", row=name)
        assert agrees(shown[2], float(theirs["ms_p50"]) / unit), name
        assert agrees(shown[3], float(ours["ms_p50"]) / unit), name
        assert agrees(shown[4], float(ours["ratio"])), name
    assert len({row["commit"] for row in rows("gpu_layer.csv")}) == 1, "README says: of one run"


def test_first_screen() -> None:
    """The four rows that stand first say what the rows of results say."""
    (shown,) = cells("one layer's prefill of 1,048,576")
    assert agrees(shown[2], float(rows("gpu_layer.csv", row="prefill_1m_fa3")[1]["ratio"]))
    for label, name in (
        ("an engine's first token of a prompt of 120,000", "first_token_120k"),
        ("an engine's throughput, 64 requests", "throughput"),
    ):
        (shown,) = cells(label)
        assert agrees(shown[2], float(rows("gpu_serving.csv", row=name)[1]["ratio"])), name
    (shown,) = cells("functions found in source code of 8 times")
    where = {"study": "tasks", "task": "constant", "length": str(8 * 2048)}
    found = {row["cache"]: row["exact"] for row in rows("quality.csv", **where)}
    numbers = [number.strip(",") for number in (*NUMBER.findall(shown[1]), shown[2])]
    assert numbers == [found[cache] for cache in ("window", "paper", "full", "distinct")]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("first token of a 120,000-token", "first_token_120k"),
        ("first token of a 500,000-token", "first_token_500k"),
        ("64 requests of 1,000 tokens in", "throughput"),
    ],
)
def test_serving(label: str, name: str) -> None:
    (shown,) = cells(label)
    theirs, ours = rows("gpu_serving.csv", row=name)
    assert (theirs["side"], ours["side"]) == ("FLASH_ATTN", "CASCADE")
    assert agrees(shown[1], float(theirs["s_p50"]))
    assert agrees(shown[2], float(ours["s_p50"]))
    assert agrees(shown[3], float(ours["ratio"]))


@pytest.mark.parametrize(
    ("label", "name"),
    [("one request of 1,000,000", "million"), ("24 requests of 24,000", "24_full_caches")],
)
def test_memory(label: str, name: str) -> None:
    (shown,) = cells(label)
    (row,) = rows("gpu_million.csv", row=name)
    assert row["kv_mib_predicted"] == row["kv_mib_measured"]
    assert agrees(shown[1], float(row["blocks_per_request"]), -1)
    assert agrees(shown[2], float(row["kv_mib_measured"]) / 1024)
    assert agrees(shown[3], float(row["kv_mib_full_attention"]) / 1024)
    assert agrees(shown[4], float(row["first_token_s"]))
    assert row["preemptions"] == "0"


@pytest.mark.parametrize("first", [1, 8193, 57345, 122881, 188417])
def test_perplexity(first: int) -> None:
    (shown,) = cells(f"{first:,} - ")
    caches = ["full", "window", "paper", "blend_auto", "distinct_auto", "distinct_elastic"]
    for cell, cache in zip(shown[1:], caches, strict=True):
        (row,) = rows("streaming_perplexity.csv", cache=cache, first_token=str(first))
        assert agrees(cell, float(row["perplexity"])), cache
        assert agrees(shown[0], float(row["last_token"]), 1)


def test_plot_is_drawn_from_the_rows() -> None:
    text = (RESULTS / "streaming_perplexity.csv").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    plot = (ROOT / "docs" / "plots" / "streaming_perplexity.svg").read_text(encoding="utf-8")
    assert f"rows {digest}" in plot, "run python benchmarks report.plots"


def test_soak() -> None:
    (row,) = rows("soak.csv")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    said = page.partition("## Under load")[2].partition("\n#")[0]
    shown = [number.rstrip(".") for number in NUMBER.findall(said)]
    grown = float(row["engine_grew_mib"]) + float(row["front_end_grew_mib"])
    counts = ("continued", "aborted_in_prefill", "aborted_in_decode", "preemptions", "mixed_steps")
    expected = [f"{int(row['requests']):,}", f"{float(row['seconds']):.0f}"]
    expected += [f"{int(row[name]):,}" for name in counts]
    expected += [f"{float(row['device_grew_mib']):.0f}", f"{grown:.0f}"]
    expected += [row["compared"]] * 2
    # In this order, with other numbers between.
    found = iter(shown)
    assert all(number in found for number in expected), (expected, shown)
    assert row["wrong"] == "0" and row["async_scheduling"] == "True"
