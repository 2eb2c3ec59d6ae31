"""The front door of the benchmarks, and the commands that documents give."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROGRAMS: dict[str, str] = runpy.run_path(str(BENCHMARKS / "__main__.py"))["programs"]()
COMMAND = re.compile(r"python benchmarks ([a-z_.]+)")
PAGES = [
    ROOT / "Makefile",
    *(page for page in ROOT.glob("*.md") if page.stem != "CHANGELOG"),
    *(ROOT / "docs").glob("*.md"),
    *BENCHMARKS.rglob("*.md"),
    *BENCHMARKS.rglob("*.py"),
    *(ROOT / "tests").rglob("*.py"),
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_commands_name_programs() -> None:
    named = {page: COMMAND.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    assert not {page: found for page, found in named.items() if set(found) - set(PROGRAMS)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gives_its_command(program: str) -> None:
    path = BENCHMARKS / f"{program.replace('.', '/')}.py"
    assert program in COMMAND.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arguments", [[], ["report.nothing"], ["records"]])
def test_what_is_no_program_lists_them(tmp_path: Path, arguments: list[str]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    for program, said in PROGRAMS.items():
        assert said and re.search(rf"^  {program} +{re.escape(said)}$", done.stdout, re.M)


def test_a_program_gets_its_options_in_any_folder(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu_context -->\nold\n<!-- /gpu_context -->\n", encoding="utf-8")
    done = run(tmp_path, "report.tables", page.name)
    assert done.returncode == 0, done.stderr
    assert "old" not in page.read_text(encoding="utf-8")


def test_no_name_hides_another() -> None:
    """Rooms and modules are top-level names, beside those of tests and examples."""
    names = {path.stem for path in BENCHMARKS.iterdir()} - {"__main__", "__pycache__"}
    others = {path.stem for folder in ("tests", "examples") for path in (ROOT / folder).iterdir()}
    assert not names & (others - {"__pycache__"})
    assert not names & set(packages_distributions()) and not names & set(sys.stdlib_module_names)
