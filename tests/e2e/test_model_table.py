"""Finds alone: an architecture of vLLM's that is served or refused otherwise than is told."""

from __future__ import annotations

from e2e.support import ROOT
from report.models import architectures, rewritten, survey


def test_the_table_of_models_is_what_building_them_gives() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert rewritten(page, list(survey(architectures()))) == page, "run `make models`"
