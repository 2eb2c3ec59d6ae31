"""Finds alone: an architecture of vLLM's that is served or refused otherwise than is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from e2e.forks import run_benchmark
from e2e.support import ROOT


def test_the_table_of_models_is_what_building_them_gives(tmp_path: Path) -> None:
    told, built = ROOT / "docs" / "models.md", tmp_path / "models.md"
    shutil.copy(told, built)
    # In a process of its own: it builds 137 models, beside whatever other tests have left behind.
    code, printed = run_benchmark(tmp_path / "log", "report.models", str(built))
    assert code == 0, printed[-3000:]
    page = built.read_text(encoding="utf-8")
    assert page == told.read_text(encoding="utf-8"), "run `make models`"
    served = re.search(r"^\d+ architectures: (\d+) served", page, re.MULTILINE)[1]
    assert f"[{served} text architectures](docs/models.md)" in (ROOT / "README.md").read_text()
