"""Writes tables of result files, each between its markers, `<!-- NAME -->` and `<!-- /NAME -->`.

The first command writes the sections that are there (`make readme`), the second prints all tables.

    python benchmarks report.tables docs/results.md
    python benchmarks report.tables
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from records import RESULTS
from report.studies import Row, file_of, rows_of
from vllm_cascade.evaluation.scoring import wilson

QUALITY_FROM = 2000  # tokens; shorter prompts lose too little
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


def quality(rows: list[Row]) -> list[str]:
    """Right answers of each task over the lengths, a line for each cache."""
    rows = _of_books(rows)
    answers = [row for row in rows if row["exact"]]
    lengths = sorted({int(row["length"]) for row in answers})
    lengths = [length for length in lengths if length >= QUALITY_FROM]
    kinds = list(dict.fromkeys((row["task"], row["filler"]) for row in answers))
    longest = max(int(row["length"]) for row in rows if row["perplexity"])
    places = list(
        dict.fromkeys(
            row["end_position"]
            for row in rows
            if row["perplexity"] and int(row["length"]) == longest
        )
    )
    heading = ["cache"] + [", ".join(filter(None, kind)) for kind in kinds]
    heading += [f"perplexity, tokens up to {int(end):,}" for end in places[-2:]]
    lines = [heading]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == cache]
        right = {(r["task"], r["filler"], int(r["length"])): r["exact"] for r in own if r["exact"]}
        line = [f"`{cache}`"]
        for kind in kinds:
            line.append(" ".join(right.get((*kind, length), "-") for length in lengths))
        nats = {
            row["end_position"]: row["perplexity"]
            for row in own
            if row["perplexity"] and int(row["length"]) == longest
        }
        lines.append(line + [_number(nats.get(end, ""), 2) for end in places[-2:]])
    return _table(lines)


def quality_tasks(rows: list[Row]) -> list[str]:
    """Right answers of each task over the lengths, and perplexity where the texts end."""
    texts = [{**row, "filler": row["filler"] or "book"} for row in rows if row["perplexity"]]
    ends = {
        text: max(int(row["end_position"]) for row in texts if row["filler"] == text)
        for text in dict.fromkeys(row["filler"] for row in texts)
    }
    found = {
        (row["cache"], row["filler"]): row["perplexity"]
        for row in texts
        if int(row["end_position"]) == ends[row["filler"]]
    }
    heading, lines = _tasks(rows, "right", lambda row: row["exact"])
    heading += [f"perplexity, {text}, tokens up to {end:,}" for text, end in ends.items()]
    caches = dict.fromkeys(row["cache"] for row in rows)
    for cache, line in zip(caches, lines, strict=True):
        line += [_number(found.get((cache, text), ""), 2) for text in ends]
    return _table([heading, *lines])


def quality_intervals(rows: list[Row]) -> list[str]:
    """The 95% Wilson interval of each share in `quality_tasks`, in percent."""

    def interval(row: Row) -> str:
        low, high = wilson(int(row["exact"]), int(row["prompts"]))
        return f"{100 * low:.0f}-{100 * high:.0f}"

    heading, lines = _tasks(rows, "95% interval of the share in percent,", interval)
    return _table([heading, *lines])


def _tasks(
    rows: list[Row], what: str, show: Callable[[Row], str]
) -> tuple[list[str], list[list[str]]]:
    """A heading and a line for each cache: a cell for each task, of its lengths side by side."""
    answers = [row for row in rows if row["exact"]]
    lengths = sorted({int(row["length"]) for row in answers})
    kinds = list(dict.fromkeys((row["task"], row["filler"]) for row in answers))
    asked = ", ".join(dict.fromkeys(row["prompts"] for row in answers))
    shown = ", ".join(f"{length:,}" for length in lengths)
    heading = [f"{what} of {asked} at {shown} tokens", *(", ".join(filter(None, k)) for k in kinds)]
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = {
            (r["task"], r["filler"], int(r["length"])): r for r in answers if r["cache"] == cache
        }
        line = [f"`{cache}`"]
        for kind in kinds:
            cells = (own.get((*kind, length)) for length in lengths)
            line.append(" ".join("-" if row is None else show(row) for row in cells))
        lines.append(line)
    return heading, lines


def quality_knobs(rows: list[Row]) -> list[str]:
    """All right answers of each length, and perplexity, a line for each setting."""
    rows = _of_books(rows)
    answers = [row for row in rows if row["exact"]]
    lengths = sorted({int(row["length"]) for row in answers})
    end = max(int(row["end_position"]) for row in rows if row["end_position"])
    asked = sum(
        int(row["prompts"])
        for row in answers
        if row["cache"] == answers[0]["cache"] and int(row["length"]) == lengths[0]
    )
    heading = ["cache", "sub-caches"]
    heading += [f"right of {asked} at {length:,} tokens" for length in lengths]
    lines = [[*heading, f"perplexity, last part of {end:,} tokens"]]
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == cache]
        line = [f"`{cache}`", own[0]["num_sub_caches"]]
        for length in lengths:
            of_length = [row for row in own if row["exact"] and int(row["length"]) == length]
            line.append(str(sum(int(row["exact"]) for row in of_length)))
        last = [row for row in own if row["end_position"] == str(end)]
        lines.append([*line, _number(last[0]["perplexity"], 2)])
    return _table(lines)


def long_answers(rows: list[Row]) -> list[str]:
    """How often long answers repeat themselves, a line for each cache."""
    heading = ["cache", "answers", "tokens of each", "finished", "tokens repeated, median and mean"]
    return _table(
        [
            [*heading, "answers that loop"],
            *(
                [
                    f"`{row['cache']}`",
                    row["answers"],
                    f"{int(row['tokens']):,}",
                    row["finished"],
                    f"{float(row['repeated_median']):.0%}, {float(row['repeated_mean']):.0%}",
                    row["loops"],
                ]
                for row in rows
            ),
        ]
    )


# What rows of several engines have in common, and what is not said of them.
OF_A_ROW = {"shape": "8b", "backend": "CASCADE"}


def gpu_scaling(rows: list[Row]) -> list[str]:
    """Times of each way to spread an engine, and rates over those of the single GPU above it."""
    first = single = rows[0]
    heading = ["engine", "GPUs", f"first token of {int(first['prompt_tokens']):,}, s"]
    long = next((row["long_tokens"] for row in rows if row.get("long_ttft_s")), None)
    heading += [] if long is None else [f"of {int(long):,}, s"]
    same = {row["decode_requests"] for row in rows} == {first["decode_requests"]}
    requests = f"{first['decode_requests']} requests" + ("" if same else " of each replica")
    heading += ["prefill, tokens/s", f"decode of {requests}, tokens/s"]
    lines = []
    for row in rows:
        kind = [row.get(name) or default for name, default in OF_A_ROW.items()]
        if row["gpus"] == "1" or kind != [single.get(n) or d for n, d in OF_A_ROW.items()]:
            # Where a model does not fit one GPU, the first row of its kind is the measure.
            single = row
        spread = [
            f"{name} parallel {row[column]}"
            for name, column in (("tensor", "tensor"), ("pipeline", "pipeline"))
            if row[column] != "1"
        ]
        if row["replicas"] != "1":
            spread.append(f"{row['replicas']} replicas")
        spread += ["through Ray"] if row["executor"] == "ray" else []
        spread += [each for each in kind if each not in OF_A_ROW.values()]
        rates = [
            f"{_number(row[column], 0)} ({float(row[column]) / float(single[column]):.2f}x)"
            for column in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        if row["gpus"] == "1":
            spread.insert(0, "one GPU")
        cells = [", ".join(spread), row["gpus"], _number(row["ttft_s"], 2)]
        if long is not None:
            cells.append(_number(row["long_ttft_s"], 2) if row["long_ttft_s"] else "-")
        lines.append([*cells, *rates])
    return _table([heading, *lines])


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    table.__name__: table
    for table in (
        gpu_context,
        gpu_paper_protocol,
        gpu_scaling,
        quality,
        quality_knobs,
        quality_tasks,
        quality_intervals,
        long_answers,
    )
}
# The default policy at two contexts, on another GPU than gpu_context.csv's.
TABLES["gpu_context_h100"] = gpu_context
# The default budget and policy, beside vLLM's own attention.
TABLES["gpu_scaling_16k"] = gpu_scaling


def section(name: str, results: Path = RESULTS) -> str:
    """What stands between the markers of a table: the table, and of which run it is."""
    rows = rows_of(name, results)
    said = {
        column: ", ".join(dict.fromkeys(row[column] for row in rows))
        for column in ("gpu", "vllm", "torch", "commit")
    }
    source = (
        f"[Rows](../benchmarks/results/{file_of(name, results).name}): {said['gpu']}, vLLM "
        f"{said['vllm']}, PyTorch {said['torch']}, commit {said['commit']}."
    )
    return "\n".join([*TABLES[name](rows), "", source, ""])


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A Markdown text with the sections of all tables that have rows."""
    for name in TABLES:
        if rows_of(name, results):
            between = re.compile(rf"(?<=^<!-- {name} -->\n).*?(?=^<!-- /{name} -->$)", re.M | re.S)
            text = between.sub(lambda _, name=name: section(name, results), text)
    return text


def _of_books(rows: list[Row]) -> list[Row]:
    """Without perplexity of code, which has no column in a table that says "perplexity"."""
    return [row for row in rows if not row["perplexity"] or row["filler"] != "code"]


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
            if rows_of(name, RESULTS):
                print(f"<!-- {name} -->\n{section(name)}<!-- /{name} -->\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
