"""Gathers results of `vllm-cascade eval` into benchmarks/results/quality.csv: a row for each cell.

    python benchmarks quality.gather --gpu GPU --commit HASH --lengths FOLDER... --knobs FOLDER...
    python benchmarks quality.gather --gpu GPU --commit HASH --tasks FOLDER...

The folders are those that the evaluation wrote to; NOTES.md has its commands. A cache may be spread
over several. A cell's rows replace those that the file has of it in that study; others stay.
Answers are scored anew. Rows of the study "lengths" count the first 20 prompts of a cell, so that
all caches answered the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from records import RESULTS
from vllm_cascade.evaluation.report import PERPLEXITY, summarise
from vllm_cascade.evaluation.results import KEY
from vllm_cascade.evaluation.scoring import parts_right
from vllm_cascade.evaluation.tasks import TASKS
from vllm_cascade.structure.options import PRESETS, CascadeOptions

OUTPUT = RESULTS / "quality.csv"
SMALL, LARGE = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct"
# Options that make a name; the others are columns.
NAMED = ("newest_share", "selection_window", "score_weight", "key_weight", "value_weight")
NAMED += ("score_power", "score_reduction", "score_decay")
COLUMNS = ("num_sub_caches", "newest_share", "stride", "cache_tokens", "block_size")


@dataclass(frozen=True, slots=True)
class Study:
    """What is asked of one model.

    Attributes:
        model: Its name.
        stride: Of the caches that do not name theirs.
        prompts: The first so many of a cell count; None for all.
        about: For the help text.
    """

    model: str
    stride: int
    prompts: int | None
    about: str


STUDIES = {
    "lengths": Study(SMALL, 128, 20, "passkeys and perplexity over the length"),
    "knobs": Study(SMALL, 128, None, "one option after the other"),
    "tasks": Study(LARGE, 512, None, "tasks that full attention can do"),
}


def name_of(label: str, options: dict[str, Any], stride: int) -> str:
    """A cache's name: its policy, and what differs from today's defaults.

    Args:
        label: As on the command line.
        options: The resolved configuration; empty for full attention. It may lack an option that
            was not there when it was written.
        stride: Tokens; a cache of another stride names it.
    """
    if not options:
        return label
    policy = options["policy"]
    defaults = {**asdict(CascadeOptions()), **PRESETS[policy]}
    said = [
        f"{name}={value if isinstance(value, str) else f'{value:g}'}"
        for name in NAMED
        if (value := options.get(name, defaults[name])) != defaults[name]
    ]
    if "num_sub_caches" in label:
        said.insert(0, f"num_sub_caches={options['num_sub_caches']}")
    if options["stride"] != stride:
        said.append(f"stride={options['stride']}")
    return f"{policy}:{','.join(said)}" if said else policy


def read(folders: Sequence[Path], study: Study) -> list[dict[str, str]]:
    """Rows under their caches' names, of those prompts of a cell that count.

    Args:
        folders: Where a prompt is in several, the first one's row counts.
        study: What the folders are of.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for folder in folders:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            options = json.loads(row["options"] or "{}")
            row["cache"] = name_of(row["cache"], options, study.stride)
            if row["task"] == PERPLEXITY:
                # Results of the time when perplexity was of books only do not say so.
                row["filler"] = row["filler"] or "book"
            else:
                names = TASKS[row["task"]].names
                right, parts = parts_right(row["answer"], row["expected"].split(), names)
                row |= {"parts_right": str(right), "exact": str(int(right == parts))}
            if study.prompts is None or int(row["index"]) < study.prompts:
                place = (*(row[name] for name in KEY), row["first_position"])
                found.setdefault(place, row)
    return list(found.values())


def cells(rows: list[dict[str, str]]) -> Iterable[dict[str, Any]]:
    """A row for each task, filler, length and cache, and for each part of the texts."""
    summary = summarise(rows)
    for entry in (*summary["answers"], *summary["perplexity"]):
        options = json.loads(entry["options"] or "{}")
        yield {
            "cache": entry["cache"],
            **{name: options.get(name, "") for name in COLUMNS},
            "task": entry.get("task", PERPLEXITY),
            "filler": entry["filler"],
            "length": entry["length"],
            "prompts": entry.get("prompts", ""),
            "exact": entry.get("exact", ""),
            "first_position": entry.get("first_position", ""),
            "end_position": entry.get("end_position", ""),
            "perplexity": f"{entry['perplexity']:.4f}" if "perplexity" in entry else "",
            "kv_mib": f"{entry['kv_bytes'] / 2**20:.1f}",
        }


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, each study's caches together; new ones in the place of those of their cell."""

    def kind(row: dict[str, Any]) -> tuple[str, ...]:
        names = ("study", "cache", "task", "filler", "length")
        return tuple(str(row[name]) for name in names)

    newer = {kind(row) for row in new}
    rows = [*(row for row in rows if kind(row) not in newer), *new]
    caches = list(dict.fromkeys((row["study"], row["cache"]) for row in rows))
    tasks = list(TASKS)
    return sorted(
        rows,
        key=lambda row: (
            caches.index((row["study"], row["cache"])),
            tasks.index(row["task"]),
            int(row["length"]),
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--commit", required=True, help="of the package that was evaluated")
    for name, study in STUDIES.items():
        help_text = f"{study.about}, {study.model}"
        parser.add_argument(
            f"--{name}", type=Path, nargs="+", default=[], metavar="FOLDER", help=help_text
        )
    given = parser.parse_args()
    with OUTPUT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, study in STUDIES.items():
        if folders := getattr(given, name):
            said = json.loads((folders[0] / "summary.json").read_text(encoding="utf-8"))
            common = {
                "study": name,
                "commit": given.commit,
                "gpu": given.gpu,
                "torch": said["versions"]["torch"],
                "vllm": said["versions"]["vllm"],
                "model": study.model,
            }
            rows = merged(rows, [{**common, **cell} for cell in cells(read(folders, study))])
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {OUTPUT}, {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
