"""Finds alone: an architecture of vLLM's that is served or refused otherwise than is told."""

from __future__ import annotations

from e2e.support import ROOT
from report.models import SERVED, architectures, rewritten, survey


def test_the_table_of_models_is_what_building_them_gives() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = list(survey(architectures()))
    assert rewritten(page, rows) == page, "run `make models`"
    served = sum(row.outcome == SERVED for row in rows)
    assert f"[{served} text architectures](docs/models.md)" in (ROOT / "README.md").read_text()
