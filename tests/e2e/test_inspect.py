"""Finds alone: that `vllm-cascade inspect` shows something else than what a real model keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from e2e.support import ROOT, model_folder
from vllm_cascade import cli

pytestmark = pytest.mark.model

ENGINE_ARGS = '{"block_size": 32, "dtype": "float32"}'
BUDGET, SINKS, STRIDE = 256, 64, 64


def test_shows_what_the_engines_pages_hold(tmp_path: Path, capfd) -> None:
    prompt, output = tmp_path / "prompt.txt", tmp_path / "kept.html"
    # What would end a script, and a character of several tokens, in the part that is kept.
    text = (ROOT / "LICENSE").read_text()[:5000] + "\n</script> 🙂 is a face"
    prompt.write_text(text, encoding="utf-8")
    command = ["inspect", model_folder(), f"@{prompt}", f"--cache-tokens={BUDGET}"]
    command += [
        f"--options=stride={STRIDE},selection_window={STRIDE},num_sink_tokens={SINKS}"
        ",num_sub_caches=4",
        "--max-tokens=40",
    ]
    command += [f"--engine-args={ENGINE_ARGS}", f"--output={output}"]
    assert cli.main([*command, "--json"]) == 0
    kept = json.loads(capfd.readouterr().out)

    num_tokens, num_prompt = len(kept["token_ids"]), kept["num_prompt_tokens"]
    assert num_prompt > 3.5 * BUDGET and num_tokens == num_prompt + 40 - 1
    assert "".join(kept["pieces"][:num_prompt]) == text
    assert kept["cascade"]["stride"] == STRIDE and kept["cascade"]["policy"] == "distinct"
    held = sum(kept["parts"].values())
    assert SINKS + BUDGET <= held < SINKS + BUDGET + 2 * STRIDE
    heads = [head for heads in kept["layers"].values() for head in heads]
    assert len(kept["layers"]) == 30 and len(heads) == 90
    newest = kept["parts"]["sub-cache 0"]
    for head in heads:
        assert len(head) == held == len(set(head)) and head == sorted(head)
        assert head[:SINKS] == list(range(SINKS))
        assert head[-newest:] == list(range(num_tokens - newest, num_tokens))
    # Each head keeps tokens of its own, from all over the text.
    assert len({tuple(head) for head in heads}) == 90
    assert 0.8 < np.mean(np.bincount(np.concatenate(heads), minlength=num_tokens) > 0) < 1

    page = output.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["pieces"] == kept["pieces"] and data["answer"] == kept["answer"] != ""
    bits = [head["bits"] for layer in data["layers"] for head in layer["heads"]]
    assert len(set(bits)) == 90
