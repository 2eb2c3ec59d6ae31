"""Gathers results of `vllm-cascade eval` into benchmarks/results/quality.csv: a row for each cell.

    python benchmarks/quality.py --gpu GPU --commit HASH --lengths FOLDER... --knobs FOLDER...

The folders are those that the evaluation wrote to; NOTES.md has its commands. A cache may be spread
over several. Its rows replace those that the file has of the cache in that study; others stay. Rows
of the study "lengths" count the first 20 prompts of a cell, so that all caches answered the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_cascade.config import PRESETS, CascadeOptions
from vllm_cascade.evaluation.report import summarise
from vllm_cascade.evaluation.results import KEY

OUTPUT = Path(__file__).resolve().parent / "results" / "quality.csv"
PROMPTS = 20
# Options that make a name; the others are columns.
NAMED = ("newest_share", "selection_window", "score_power", "key_weight")
NAMED += ("score_reduction", "score_decay")
COLUMNS = ("num_sub_caches", "newest_share", "stride", "cache_tokens", "block_size")


def name_of(label: str, options: dict[str, Any]) -> str:
    """A cache's name: its policy, and what differs from today's defaults.

    Args:
        label: As on the command line.
        options: The resolved configuration; empty for full attention.
    """
    if not options:
        return label
    policy = options["policy"]
    defaults = {**asdict(CascadeOptions()), **PRESETS[policy]}
    said = [f"{name}={options[name]:g}" for name in NAMED[:4] if options[name] != defaults[name]]
    said += [f"{name}={options[name]}" for name in NAMED[4:] if options[name] != defaults[name]]
    if "num_sub_caches" in label:
        said.insert(0, f"num_sub_caches={options['num_sub_caches']}")
    if options["stride"] != 128:
        said.append(f"stride={options['stride']}")
    return f"{policy}:{','.join(said)}" if said else policy


def read(folders: Sequence[Path], prompts: int | None) -> list[dict[str, str]]:
    """Rows under their caches' names, of the first `prompts` prompts of a cell.

    Args:
        folders: Where a prompt is in several, the first one's row counts.
        prompts: None for all.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for folder in folders:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["cache"] = name_of(row["cache"], json.loads(row["options"] or "{}"))
            if prompts is None or int(row["index"]) < prompts:
                place = (*(row[name] for name in KEY), row["first_position"])
                found.setdefault(place, row)
    return list(found.values())


def cells(rows: list[dict[str, str]]) -> Iterable[dict[str, Any]]:
    """A row for each task, filler, length and cache, and for each part of the books."""
    summary = summarise(rows)
    for entry in (*summary["answers"], *summary["perplexity"]):
        options = json.loads(entry["options"] or "{}")
        yield {
            "cache": entry["cache"],
            **{name: options.get(name, "") for name in COLUMNS},
            "task": entry.get("task", "perplexity"),
            "filler": entry.get("filler", ""),
            "length": entry["length"],
            "prompts": entry.get("prompts", ""),
            "exact": entry.get("exact", ""),
            "first_position": entry.get("first_position", ""),
            "end_position": entry.get("end_position", ""),
            "perplexity": f"{entry['perplexity']:.4f}" if "perplexity" in entry else "",
            "kv_mib": f"{entry['kv_bytes'] / 2**20:.1f}",
        }


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, the new ones in the place of those of the same study and cache, or at the end."""
    kinds = dict.fromkeys((row["study"], row["cache"]) for row in [*rows, *new])
    newer = {(row["study"], row["cache"]) for row in new}
    return [
        row
        for kind in kinds
        for row in (new if kind in newer else rows)
        if (row["study"], row["cache"]) == kind
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--commit", required=True, help="of the package that was evaluated")
    parser.add_argument("--lengths", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--knobs", type=Path, nargs="+", default=[], metavar="FOLDER")
    given = parser.parse_args()
    with OUTPUT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for study, folders, prompts in (
        ("lengths", given.lengths, PROMPTS),
        ("knobs", given.knobs, None),
    ):
        if folders:
            said = json.loads((folders[0] / "summary.json").read_text(encoding="utf-8"))
            common = {
                "study": study,
                "commit": given.commit,
                "gpu": given.gpu,
                "torch": said["versions"]["torch"],
                "vllm": said["versions"]["vllm"],
                "model": given.model,
            }
            rows = merged(rows, [{**common, **cell} for cell in cells(read(folders, prompts))])
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {OUTPUT}, {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
