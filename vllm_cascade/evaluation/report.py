"""An evaluation's rows, summed up as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

from vllm_cascade.evaluation.results import Row
from vllm_cascade.evaluation.scoring import wilson
from vllm_cascade.evaluation.tasks import DEPTH_BANDS

PERPLEXITY = "perplexity"


def summarise(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Sum up `rows`: an entry for each cache, task, filler and length.

    Perplexity has an entry for each cache, filler, length and part of the text.
    """
    answers = [row for row in rows if row["task"] != PERPLEXITY]
    texts = [row for row in rows if row["task"] == PERPLEXITY]
    return {
        "answers": [
            _answers(cell, group)
            for cell, group in _groups(answers, "task", "filler", "length", "cache")
        ],
        "perplexity": [
            _perplexity(cell, group)
            for cell, group in _groups(
                texts, "cache", "filler", "length", "first_position", "end_position"
            )
        ],
    }


def _answers(cell: dict[str, str], rows: list[Row]) -> dict[str, Any]:
    right = sum(int(row["exact"]) for row in rows)
    low, high = wilson(right, len(rows))
    bands: dict[int, list[int]] = {}
    for row in rows:
        if row["depth"]:
            band = min(int(float(row["depth"]) * DEPTH_BANDS), DEPTH_BANDS - 1)
            bands.setdefault(band, []).append(int(row["exact"]))
    parts = sum(int(row["parts"]) for row in rows)
    return {
        **cell,
        "length": int(cell["length"]),
        "prompts": len(rows),
        "exact": right,
        "share": right / len(rows),
        "interval": [low, high],
        "parts_share": sum(int(row["parts_right"]) for row in rows) / parts,
        "share_by_depth": {
            f"{band / DEPTH_BANDS:g}-{(band + 1) / DEPTH_BANDS:g}": sum(exact) / len(exact)
            for band, exact in sorted(bands.items())
        },
        **_memory(rows),
    }


def _perplexity(cell: dict[str, str], rows: list[Row]) -> dict[str, Any]:
    first, end = int(cell["first_position"]), int(cell["end_position"])
    tokens = len(rows) * (end - first)
    return {
        "cache": cell["cache"],
        "filler": cell["filler"],
        "length": int(cell["length"]),
        "first_position": first,
        "end_position": end,
        "tokens": tokens,
        "perplexity": exp(sum(float(row["nats"]) for row in rows) / tokens),
        **_memory(rows),
    }


def _memory(rows: list[Row]) -> dict[str, Any]:
    return {
        "tokens_evicted": max(int(row["tokens_evicted"]) for row in rows),
        "kv_blocks": max(int(row["kv_blocks"]) for row in rows),
        "kv_bytes": max(int(row["kv_bytes"]) for row in rows),
        "options": rows[0]["options"],
    }


def tables(summary: dict[str, list[dict[str, Any]]]) -> str:
    """Write `summary`, as `summarise` gives it, as tables with a row for each cache."""
    text = []
    answers = summary["answers"]
    for cell, group in _groups(answers, "task", "filler"):
        filler = f", filler {cell['filler']}" if cell["filler"] else ""
        lengths = sorted({entry["length"] for entry in group})
        title = (
            f"{cell['task']}{filler}: right answers, their share with its 95% Wilson interval, "
            "and the share of right parts"
        )
        rows = [["cache", *(f"{length:,} tokens" for length in lengths), "KV MiB"]]
        for cache, found in _by_cache(group, "length"):
            shown = [_cell(found[length]) if length in found else "-" for length in lengths]
            rows.append([cache, *shown, _mebibytes(found.values())])
        text.append(_table(title, rows))
    for cell, group in _groups(summary["perplexity"], "filler", "length"):
        spans = sorted({(entry["first_position"], entry["end_position"]) for entry in group})
        title = f"perplexity of {cell['length']:,} tokens of {cell['filler']}, by position"
        rows = [["cache", *(f"{first:,}-{end - 1:,}" for first, end in spans), "KV MiB"]]
        for cache, found in _by_cache(group, "first_position"):
            shown = [f"{found[f]['perplexity']:.3f}" if f in found else "-" for f, _ in spans]
            rows.append([cache, *shown, _mebibytes(found.values())])
        text.append(_table(title, rows))
    return "\n\n".join(text)


def _cell(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    count = f"{entry['exact']} of {entry['prompts']}"
    return f"{count}, {entry['share']:.2f} [{low:.2f}, {high:.2f}], {entry['parts_share']:.2f}"


def _mebibytes(entries: Any) -> str:
    return f"{max(entry['kv_bytes'] for entry in entries) / 2**20:.1f}"


def _by_cache(entries: list[Any], name: str) -> list[tuple[str, dict[Any, Any]]]:
    return [
        (cell["cache"], {entry[name]: entry for entry in group})
        for cell, group in _groups(entries, "cache")
    ]


def _groups(entries: Sequence[Any], *names: str) -> list[tuple[dict[str, Any], list[Any]]]:
    """Groups of entries that agree in `names`, in the order of each group's first entry."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[name] for name in names), []).append(entry)
    return [(dict(zip(names, values, strict=True)), found) for values, found in groups.items()]


def _table(title: str, rows: list[list[str]]) -> str:
    """A title, and rows with the heading first; a column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading, *rest = rows
    lines = [heading, ["-" * width for width in widths], *rest]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([title, *shown])
