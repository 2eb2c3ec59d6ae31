"""Which rows a table or a plot is of: those of a result file, or of one study in it."""

from __future__ import annotations

from pathlib import Path

from records import RESULTS, read_rows

Row = dict[str, str]
# Tables and plots of one file, quality.csv, each of a study in it.
STUDIES = {
    "quality": "lengths",
    "quality_knobs": "knobs",
    "quality_tasks": "tasks",
    "quality_intervals": "tasks",
}


def file_of(name: str, results: Path = RESULTS) -> Path:
    """The result file of a table or a plot."""
    return results / ("quality.csv" if name in STUDIES else f"{name}.csv")


def rows_of(name: str, results: Path = RESULTS) -> list[Row]:
    """The rows of a table or a plot; none where there is no file or its study is not in it."""
    study = STUDIES.get(name)
    return [row for row in read_rows(file_of(name, results)) if row.get("study") == study]
