"""Finds alone: a whole real model that attends to noise, long past its budget."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from e2e.forks import run_benchmark
from e2e.support import ROOT, model_folder


@pytest.mark.model
def test_perplexity_of_a_stream(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text(), encoding="utf-8")
    output = tmp_path / "rows.csv"
    arguments = [f"--model={model_folder()}", f"--text={text}", f"--output={output}"]
    arguments += ["--tokens=1200", "--cache-tokens=256", "--stride=128", "--bucket=400"]
    arguments += ["--caches=distinct", f"--kv-bytes={1 << 28}", "--dtype=float32"]
    code, said = run_benchmark(tmp_path / "log", "quality.streaming_perplexity", *arguments)
    assert code == 0, said[-3000:]
    rows = list(csv.DictReader(output.open()))
    assert [(row["first_token"], row["last_token"]) for row in rows] == [
        ("1", "400"),
        ("401", "800"),
        ("801", "1199"),
    ]
    # A license is easy to foretell; a model that attends to noise is in the thousands.
    assert all(1 < float(row["perplexity"]) < 30 for row in rows)


def test_a_text_within_the_budget_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 200, encoding="utf-8")
    arguments = [f"--model={model_folder()}", f"--text={text}", "--tokens=500"]
    code, said = run_benchmark(tmp_path / "log", "quality.streaming_perplexity", *arguments)
    assert code != 0
    assert "do not exceed twice the budget" in said
