"""Finds alone: that the benchmark of a million tokens does not run, or holds more than planned."""

from __future__ import annotations

from pathlib import Path

from e2e.forks import run_benchmark

PLANNED = "a request holds at most R"


def test_memory_is_what_the_plan_predicts(tmp_path: Path) -> None:
    """The program refuses a row whose blocks, bytes or preemptions are not the plan's."""
    code, said = run_benchmark(tmp_path / "log", "engine.million", "--tiny")
    assert code == 0, said[-3000:]
    lines = [line.split() for line in said.splitlines()]
    (planned,) = (words[7] for words in lines if " ".join(words[:6]) == PLANNED)
    held = [words[1] for words in lines if words[:1] == ["blocks_per_request"]]
    assert held == [planned, planned]
