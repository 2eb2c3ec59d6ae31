"""What the benchmarks write down, and the counters they compare with before they do."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cascade.structure.layout import Layout

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"


class RefusalError(RuntimeError):
    """A timing that must not be reported, and why."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the kernels of one or more layers count, all KV heads together.

    Args:
        pairs: Pairs of a query and a key scored.
        groups: Groups merged.
        dropped: Tokens dropped in merges.
    """

    pairs: int
    groups: int
    dropped: int

    def times(self, factor: int) -> Counts:
        """The same work done `factor` times."""
        return Counts(self.pairs * factor, self.groups * factor, self.dropped * factor)

    def check(self, counted: Sequence[int], what: str) -> None:
        """Compare with device counters.

        Raises:
            RefusalError: They differ.
        """
        if tuple(counted) != (self.pairs, self.groups, self.dropped):
            raise RefusalError(
                f"{what}: counted (pairs scored, groups merged, tokens dropped) {tuple(counted)}, "
                f"by the layout it is {(self.pairs, self.groups, self.dropped)}"
            )


def attended_pairs(layout: Layout, start: int, end: int) -> int:
    """Pairs of a query and a key that it sees, of one KV head, for some tokens of a request.

    Args:
        layout: The cascade's structure.
        start: First token.
        end: One past the last token.
    """
    pairs = 0
    for segment in layout.segments(start, end):
        first = layout.epochs[segment.epoch].place(segment.start)
        length = segment.end - segment.start
        # A query at place p sees p + 1 keys.
        pairs += length * (first + 1) + length * (length - 1) // 2
    return pairs


def predict(layout: Layout, spans: Iterable[tuple[int, int]], num_kv_heads: int) -> Counts:
    """What one layer counts for some runs of tokens, by the layout alone.

    Args:
        layout: The cascade's structure.
        spans: First token and last + 1 of each run; a run may be any part of a request.
        num_kv_heads: KV heads.
    """
    config = layout.config
    pairs = groups = 0
    for start, end in spans:
        if config.needs_scores:
            pairs += attended_pairs(layout, start, end)
        if config.chooses:
            segments = layout.segments(start, end)
            groups += sum(len(layout.epochs[s.epoch].groups) for s in segments if s.merges)
    dropped = groups * (config.group_tokens // 2)
    return Counts(pairs, groups, dropped).times(num_kv_heads)


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    found = os.environ.get("VLLM_CASCADE_COMMIT", "")
    if not found and (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        found = head.stdout.strip()[:12] + ("+changes" if changed.stdout.strip() else "")
    return found or "unknown"


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def conditions() -> dict[str, Any]:
    """What a timing depends on: date, commit, versions and GPU."""
    import torch
    import triton
    import vllm

    has_gpu = torch.cuda.is_available()
    return {
        "date": today(),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
    }


def in_words(stated: dict[str, Any]) -> str:
    """Conditions in one line."""
    return ", ".join(f"{name} {value}" for name, value in stated.items())


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    p20, p50, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return p20, p50, p80


def write_rows(path: Path, stated: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal columns as CSV, each with the conditions in front.

    Args:
        path: Where.
        stated: From `conditions`, and what else all rows have in common.
        rows: At least one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*stated, *rows[0]])
        writer.writeheader()
        writer.writerows(stated | row for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replace_rows(path: Path, rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> None:
    """Write rows in the place of those that a file has; at no time is it half written.

    Args:
        path: Where.
        rows: All that the file is to have.
        columns: In order.
    """
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
