"""The benchmark of a million tokens, at a size for a CPU: its checks hold there too."""

from __future__ import annotations

import subprocess
import sys

from e2e.support import ROOT

PLANNED = "a request holds at most R"


def test_memory_is_what_the_plan_predicts() -> None:
    """The program refuses a row whose blocks, bytes or preemptions are not the plan's."""
    command = [sys.executable, str(ROOT / "benchmarks"), "engine.million", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    (planned,) = (words[7] for words in lines if " ".join(words[:6]) == PLANNED)
    held = [words[1] for words in lines if words[:1] == ["blocks_per_request"]]
    assert held == [planned, planned]
