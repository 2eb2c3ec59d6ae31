"""Finds alone: that the benchmark by context length does not run, or counts blocks wrongly."""

from __future__ import annotations

import csv
from pathlib import Path

from e2e.forks import run_benchmark


def test_contexts_are_prefilled_and_assumed(tmp_path: Path) -> None:
    """Many requests hold as many blocks as their contexts, prefilled or not, and none beyond R."""
    output = tmp_path / "rows.csv"
    arguments = ["--tiny", f"--output={output}", f"--logs={tmp_path}"]
    code, said = run_benchmark(tmp_path / "log", "engine.context", *arguments)
    assert code == 0, said[-3000:]
    with output.open(newline="") as file:
        rows = {(row["backend"], int(row["context"])): row for row in csv.DictReader(file)}
    ours = [rows["CASCADE", context] for context in (128, 1024, 2048)]
    theirs = [rows["CPU_ATTN", context] for context in (128, 1024, 2048)]
    for row in (*ours, *theirs[:2]):
        assert not row["note"] and row["requests_at_once"] == str(min(3, int(row["requests_fit"])))
        assert float(row["ttft_s"]) > 0 and float(row["tpot_ms"]) > 0
        # Both are rounded to a tenth of a MiB.
        each, together = float(row["kv_mib_per_request"]), float(row["kv_mib_at_once"])
        assert abs(together - int(row["requests_at_once"]) * each) <= 0.2
    assert ours[0]["kv_mib_per_request"] < ours[1]["kv_mib_per_request"]
    assert ours[1]["kv_mib_per_request"] == ours[2]["kv_mib_per_request"], "a full cache grows"
    assert [row["requests_fit"] for row in theirs] == ["15", "1", "0"]
    assert not theirs[2]["tpot_ms"] and "not run" in theirs[2]["note"]
