"""Gathers results of `vllm-cascade eval` into benchmarks/results/quality.csv: a row for each cell.

    python benchmarks/quality.py --gpu GPU --commit HASH --lengths FOLDER... --knobs FOLDER...

The folders are those that the evaluation wrote to; NOTES.md has its commands. Rows of the study
"lengths" count the first 20 prompts of a cell, so that all caches answered the same ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_cascade.config import PRESETS, CascadeOptions
from vllm_cascade.evaluation.report import summarise

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


def read(folder: Path, prompts: int | None) -> list[dict[str, str]]:
    """A folder's rows under their caches' names, of the first `prompts` prompts of a cell."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["cache"] = name_of(row["cache"], json.loads(row["options"] or "{}"))
    return [row for row in rows if prompts is None or int(row["index"]) < prompts]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--commit", required=True, help="of the package that was evaluated")
    parser.add_argument("--lengths", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--knobs", type=Path, nargs="+", default=[], metavar="FOLDER")
    given = parser.parse_args()
    rows = []
    for study, folders, prompts in (
        ("lengths", given.lengths, PROMPTS),
        ("knobs", given.knobs, None),
    ):
        found: list[dict[str, str]] = []
        for folder in folders:
            known = {row["cache"] for row in found}
            # A cache that several folders have is the first one's.
            found += [row for row in read(folder, prompts) if row["cache"] not in known]
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
            rows += [{**common, **cell} for cell in cells(found)]
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {OUTPUT}, {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
