"""The files of an evaluation: the command, the rows so far, and the summary."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation.prompts import Prompt

COMMAND, RESULTS, SUMMARY = "command.json", "results.csv", "summary.json"
# The columns that together identify a cache and a prompt within a command.
KEY = ("cache", "task", "filler", "length", "index")
COLUMNS = (
    *KEY,
    "seed",
    "depth",
    "expected",
    "answer",
    "parts_right",
    "parts",
    "exact",
    "first_position",
    "end_position",
    "nats",
    "tokens_evicted",
    "kv_blocks",
    "kv_bytes",
    "options",
)

Row: TypeAlias = dict[str, str]


class Results:
    """An output folder, in which a run that was cut off goes on where it stopped.

    Args:
        folder: The folder; it is made if it is missing.
        command: All that the results depend on, in types that JSON has.

    Raises:
        CommandError: The folder holds another command's results.
    """

    def __init__(self, folder: Path, command: Mapping[str, Any]) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.command = json.loads(json.dumps(command))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / COMMAND
        if file.exists():
            self._check(json.loads(file.read_text()))
        elif (folder / RESULTS).exists():
            raise CommandError(f"{folder} has a {RESULTS} but no {COMMAND}: give another folder")
        else:
            _replace(file, json.dumps(self.command, indent=2) + "\n")
        if (folder / RESULTS).exists():
            with (folder / RESULTS).open(newline="") as lines:
                self.rows = list(csv.DictReader(lines))
        self._done = {_key(row) for row in self.rows}

    def has(self, cache: str, prompt: Prompt) -> bool:
        """Whether the folder has the rows of a prompt.

        Args:
            cache: The cache's label.
            prompt: The prompt.
        """
        asked = (cache, prompt.task, prompt.filler, str(prompt.length), str(prompt.index))
        return asked in self._done

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append `rows` to the file; a run that is cut off leaves all of them there, or none."""
        new = [{name: str(row.get(name, "")) for name in COLUMNS} for row in rows]
        self.rows += new
        self._done |= {_key(row) for row in new}
        partial = self.folder / f"{RESULTS}.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.folder / RESULTS)

    def summarise(self, summary: Mapping[str, Any]) -> Path:
        """Write `summary` beside the rows, and return the summary's path."""
        _replace(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return self.folder / SUMMARY

    def _check(self, there: Mapping[str, Any]) -> None:
        names = [n for n in {**there, **self.command} if there.get(n) != self.command.get(n)]
        if names:
            changes = "; ".join(
                f"{name} was {there.get(name)!r}, is {self.command.get(name)!r}" for name in names
            )
            raise CommandError(
                f"{self.folder} holds the results of another command ({changes}): give another "
                "--output, or the same command to go on with it"
            )


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    os.replace(partial, file)
