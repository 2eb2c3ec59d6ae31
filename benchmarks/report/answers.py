"""Prints how far CASCADE's answers under the budget are from vLLM's own, for tiny random models.

    python benchmarks report.answers ARCHITECTURE...

Architectures are those of docs/models.md. Printed are the largest distance between
log-probabilities, their spread, and which attention layers are CASCADE's (C) or with a window (w).
On a CPU; some ten seconds an architecture.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from report.absent import stood_in
from report.configs import ATTRIBUTES, config_of

CASCADE = {
    "cache_tokens": 384,
    "num_sub_caches": 2,
    "num_sink_tokens": 64,
    "stride": 128,
    "selection_window": 64,
}
ENGINE = {
    "load_format": "dummy",
    "block_size": 64,
    "max_model_len": 1024,
    "max_num_batched_tokens": 200,
    "skip_tokenizer_init": True,
    # An image would need a tokenizer.
    "language_model_only": True,
    # The rotary operator of vLLM 0.32's CPU build rotates LFM2's queries wrongly.
    "compilation_config": {"custom_ops": ["none"]},
}


def fill(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
    """Draw weights: outputs as large as inputs, and norms that do not commute with rotations."""
    generator = torch.Generator().manual_seed(0)
    # Gemma's norms add one.
    around = 0 if "gemma" in type(model).__module__ else 1
    for name, weights in sorted(model.named_parameters()):
        drawn = torch.randn(weights.shape, generator=generator)
        if weights.dim() > 1:
            drawn *= weights.shape[-1] ** -0.5
        elif "norm" in name or "ln" in name:
            drawn = around + 0.3 * drawn
        if name.endswith(".A"):
            # What is left of a state-space layer's state after a token is exp(A dt).
            drawn = -drawn.exp()
        weights.data.copy_(drawn)


def compare(name: str) -> str:
    """Answer three prompts by both backends."""
    from e2e.support import engine, impls_of
    from e2e.test_hybrid import generate
    from e2e.tiny import random_prompt

    prompts = [random_prompt(num_tokens, seed=num_tokens) for num_tokens in (5, 63, 240)]
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(name)))
        for cascade in (None, CASCADE):
            options = {**ENGINE, "hf_overrides": ATTRIBUTES.get(name, {})}
            with engine(cascade, folder, **options) as llm:
                kinds = [type(impl).__name__ for impl in impls_of(llm)]
                sides.append(generate(llm, prompts))
    pairs = list(zip(*sides, strict=True))
    assert all(ours.tokens == theirs.tokens for theirs, ours in pairs), "other tokens"
    distance = max((ours.logprobs - theirs.logprobs).abs().max() for theirs, ours in pairs)
    layers = "".join("C" if kind == "CascadeImpl" else "w" for kind in kinds)
    return f"{distance:.1e} of {sides[0][-1].logprobs.std():.2f} {layers}"


def main() -> int:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.models import registry

    failed, replaced = 0, unittest.mock.patch.object
    with (
        replaced(DummyModelLoader, "load_weights", fill),
        # Another process has no stand-ins.
        replaced(registry, "_run_in_subprocess", lambda ask: ask()),
        stood_in(),
    ):
        for name in sys.argv[1:]:
            try:
                said = compare(name)
            except Exception as error:
                said, failed = f"{type(error).__name__}: {error}", failed + 1
            print(f"{name:36} {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
