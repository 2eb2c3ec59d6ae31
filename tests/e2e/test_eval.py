"""Finds alone: that `vllm-cascade eval` measures a real model in two caches, and goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from e2e import forks
from e2e.support import ROOT, model_folder
from vllm_cascade import cli
from vllm_cascade.evaluation import engine

pytestmark = pytest.mark.model

LENGTH, BUDGET, STRIDE = 500, 256, 128


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def vllm_is_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines' processes are forks of one that has; test_inspect.py starts one as users do."""
    forked = SimpleNamespace(get_context=lambda _: forks.Context())
    monkeypatch.setattr(engine, "multiprocessing", forked)


@pytest.mark.usefixtures("vllm_is_imported_once")
def test_measures_two_caches_and_goes_on_where_it_stopped(tmp_path: Path, capfd) -> None:
    texts, output = tmp_path / "texts", tmp_path / "output"
    texts.mkdir()
    (texts / "book.txt").write_text((ROOT / "LICENSE").read_text())
    (texts / "code.txt").write_text((ROOT / "vllm_cascade" / "structure" / "config.py").read_text())
    command = ["eval", model_folder(), f"--output={output}", f"--texts={texts}"]
    command += ["--tasks", "passkey", "perplexity", "--fillers", "sentences", "code", "--no-chat"]
    command += ["--caches", "full", f"blend:cache_tokens={BUDGET},stride={STRIDE}"]
    command += [f"--lengths={LENGTH}", "--count=1", "--perplexity-count=1"]
    command += ["--engine-args", '{"dtype": "float32", "block_size": 32}']
    assert cli.main(command) == 0
    rows = read(output)
    assert [(row["cache"].partition(":")[0], row["task"], row["filler"]) for row in rows] == [
        (cache, task, filler)
        for cache in ("full", "blend")
        for task, filler in (("passkey", "sentences"), ("passkey", "code"), ("perplexity", "code"))
    ]
    full, _, full_code, blend, _, blend_code = rows
    # The model answers where it has all of so short a text.
    assert full["expected"] in full["answer"] and full["exact"] == "1"
    assert full["tokens_evicted"] == "0" < blend["tokens_evicted"]
    assert int(full["kv_blocks"]) == -(-(LENGTH + 7) // 32)
    # Sinks, budget and a stride, where all is aligned; a group waits where it is not.
    budget_blocks = (64 + BUDGET + STRIDE) // 32
    assert budget_blocks - 2 <= int(blend["kv_blocks"]) < int(full["kv_blocks"])
    assert 0 < float(full_code["nats"]) != float(blend_code["nats"])
    assert float(blend_code["nats"]) == pytest.approx(float(full_code["nats"]), rel=0.2)
    assert json.loads(blend["options"])["cache_tokens"] == BUDGET
    said = capfd.readouterr()
    assert "passkey, filler sentences: right answers" in said.out and "1 of 1" in said.out
    assert f"{LENGTH} tokens, 3 of 3 answered" in said.err

    file = output / "results.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    assert cli.main(command) == 0
    assert read(output) == rows
    said = capfd.readouterr()
    assert "5 rows there already" in said.out
    assert "full: starting the engine" not in said.err and "blend" in said.err

    assert cli.main([*command, "--seed=1"]) == 2
    assert "seed was 0, is 1" in capfd.readouterr().err
