"""Writes README's tables of result files, each between its markers, `<!-- NAME -->` and
`<!-- /NAME -->`.

    python benchmarks/tables.py README.md       writes the sections that are there (`make readme`)
    python benchmarks/tables.py                 prints all tables
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, str]
BACKENDS = ("FLASH_ATTN", "CASCADE")


def gpu_context(rows: list[Row]) -> list[str]:
    """Both backends side by side, a line for each context length."""
    columns: dict[str, Callable[[Row], str]] = {
        # Said once; in every heading it would be wider than the figures.
        f"first token, s: {' / '.join(BACKENDS)}": lambda row: _number(row["ttft_s"], 2),
        "a token, ms": lambda row: _number(row["tpot_ms"], 2),
        "KV of a request, GiB": lambda row: _number(row["kv_mib_per_request"], 2, 1024),
        "requests that fit": lambda row: _number(row["requests_fit"], 0),
        "tokens/s (requests at once)": lambda row: (
            f"{_number(row['tokens_per_s'], 0)} ({row['requests_at_once']})"
            if row["tokens_per_s"]
            else "-"
        ),
    }
    found = {(row["backend"], int(row["context"])): row for row in rows}
    lines = [["context, tokens", *columns]]
    for context in sorted({length for _, length in found}):
        pair = [found.get((backend, context)) for backend in BACKENDS]
        cells = [
            " / ".join("-" if r is None else show(r) for r in pair) for show in columns.values()
        ]
        lines.append([f"{context:,}", *cells])
    return _table(lines)


def gpu_paper_protocol(rows: list[Row]) -> list[str]:
    """Milliseconds of a layer, a line for each length, and how much less than FlashAttention-2."""
    sides = {(row["policy"], int(row["stride"])): None for row in rows if row["policy"]}
    heading = ["tokens", "FlashAttention-2", "FlashAttention-3"]
    heading += [f"`{policy}`, stride {stride:,}" for policy, stride in sides]
    first = next(iter(sides))
    heading.append(f"FlashAttention-2 / `{first[0]}`, stride {first[1]:,}")
    lines = []
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        of_length = [row for row in rows if int(row["tokens"]) == tokens]
        theirs = {row["side"]: row for row in of_length if not row["policy"]}
        ours = {(r["policy"], int(r["stride"])): r for r in of_length if r["policy"]}
        shown = [theirs.get(side) for side in heading[1:3]] + [ours.get(side) for side in sides]
        ratio = ours[first]["fa2_over_ours"] if first in ours else ""
        cells = [_digits(row["ms_p50"]) if row else "-" for row in shown]
        lines.append([f"{tokens:,}", *cells, f"{_number(ratio, 2)}x" if ratio else "-"])
    return _table([heading, *lines])


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    table.__name__: table for table in (gpu_context, gpu_paper_protocol)
}


def section(name: str, results: Path = RESULTS) -> str:
    """What stands between the markers of a table: the table, and of which run it is."""
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    said = {
        column: ", ".join(dict.fromkeys(row[column] for row in rows))
        for column in ("gpu", "vllm", "torch", "commit")
    }
    source = (
        f"[Rows](benchmarks/results/{name}.csv): {said['gpu']}, vLLM {said['vllm']}, "
        f"PyTorch {said['torch']}, commit {said['commit']}."
    )
    return "\n".join([*TABLES[name](rows), "", source, ""])


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A Markdown text with the sections of all tables that have rows."""
    for name in TABLES:
        if (results / f"{name}.csv").exists():
            between = re.compile(rf"(?<=^<!-- {name} -->\n).*?(?=^<!-- /{name} -->$)", re.M | re.S)
            text = between.sub(lambda _, name=name: section(name, results), text)
    return text


def _number(text: str, digits: int, unit: float = 1.0) -> str:
    return f"{float(text) / unit:,.{digits}f}" if text else "-"


def _digits(text: str) -> str:
    """Three of them."""
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(lines: list[list[str]]) -> list[str]:
    heading, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    return [heading, "|" + " --- |" * len(lines[0]), *rest]


def main() -> int:
    for name in sys.argv[1:]:
        path = Path(name)
        text = rewritten(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    if not sys.argv[1:]:
        for name in TABLES:
            if (RESULTS / f"{name}.csv").exists():
                print(f"<!-- {name} -->\n{section(name)}<!-- /{name} -->\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
