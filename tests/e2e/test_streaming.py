"""The benchmark of perplexity along a text, short and on a CPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.support import ROOT, model_folder


@pytest.mark.model
def test_perplexity_of_a_stream(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text(), encoding="utf-8")
    output = tmp_path / "rows.csv"
    command = [sys.executable, str(ROOT / "benchmarks"), "quality.streaming_perplexity"]
    command += ["--model", model_folder(), "--text", str(text), "--output", str(output)]
    command += ["--tokens", "1200", "--cache-tokens", "256", "--stride", "128", "--bucket", "400"]
    command += ["--caches", "distinct", "--kv-bytes", str(1 << 28), "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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
    command = [sys.executable, str(ROOT / "benchmarks"), "quality.streaming_perplexity"]
    command += ["--model", model_folder(), "--text", str(text), "--tokens", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "do not exceed twice the budget" in done.stderr
