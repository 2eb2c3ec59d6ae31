"""Writes docs/models.md's table: of each text architecture of vLLM, whether CASCADE serves it.

Each is built with a tiny config.json and random weights, through the checks that a server runs.

    python benchmarks report.models docs/models.md  # `make models`
    python benchmarks report.models ARCHITECTURE...
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report.absent import stood_in
from report.configs import ATTRIBUTES, OPTIONS, config_of

OUTCOMES = SERVED, REFUSED, NOT_BUILT = "served", "refused", "not built"


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of an architecture.

    Args:
        architecture: As in config.json.
        outcome: `SERVED`, `REFUSED`, or `NOT_BUILT` where it cannot be tried.
        why: What CASCADE serves of it, or why not.
    """

    architecture: str
    outcome: str
    why: str


def architectures() -> list[str]:
    """The text models of vLLM's registry, those without a class of vLLM's own at the end."""
    from vllm.model_executor.models import registry

    own = list(registry._TEXT_GENERATION_MODELS)
    others = registry._TRANSFORMERS_SUPPORTED_MODELS
    return own + [name for name, (_, kind) in others.items() if "MultiModal" not in kind]


def survey(names: list[str]) -> Iterator[Row]:
    """Build each architecture as a server would.

    Args:
        names: Architectures.

    Yields:
        A row of each.
    """
    from vllm.model_executor.models.registry import _VLLM_MODELS

    from vllm_cascade.plugin import register

    register()
    with _one_rank(), stood_in():
        for name in names:
            module, kind = _VLLM_MODELS[name]
            if not module.startswith("vllm."):
                module = f"vllm.model_executor.models.{module}"
            try:
                cls = getattr(importlib.import_module(module), kind)
            except ImportError as error:
                yield Row(name, NOT_BUILT, f"needs {error.name}")
                continue
            yield _tried(name, cls)


def _tried(name: str, cls: type) -> Row:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

    from vllm_cascade.support.rotation import RotationError
    from vllm_cascade.support.unsupported import UnsupportedError

    # vLLM asks another process for each that it does not know, which imports vLLM for that.
    known = ModelRegistry.models | {name: _RegisteredModel.from_model_cls(cls)}
    with (
        unittest.mock.patch.object(ModelRegistry, "models", known),
        tempfile.TemporaryDirectory() as folder,
    ):
        (Path(folder) / "config.json").write_text(json.dumps(config_of(name)))
        try:
            vllm_config = EngineArgs(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                attention_backend="CASCADE",
                enforce_eager=True,
                dtype="float32",
                max_model_len=2048,
                hf_overrides=ATTRIBUTES.get(name, {}),
                **OPTIONS.get(name, {}),
            ).create_engine_config()
            return Row(name, SERVED, _served(get_model(vllm_config=vllm_config)))
        except (UnsupportedError, RotationError) as error:
            return Row(name, REFUSED, _reason(str(error)))
        except Exception as error:
            if "not supported by backend CASCADE" in str(error):
                return Row(name, REFUSED, f"`{str(error).partition(' is not supported')[0]}`")
            absent = re.search(r"Config' object has no attribute '(\w+)'", str(error))
            why = f"needs `{absent[1]}` in config.json" if absent else "vLLM refuses it on a CPU"
            return Row(name, NOT_BUILT, why)


def _served(model: Any) -> str:
    """How many of the layers are CASCADE's, and what is particular of them."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = [each for each in model.modules() if isinstance(each, AttentionLayerBase)]
    ours = [each.impl for each in layers if each.get_attn_backend().get_name() == "CASCADE"]
    still = sum(not impl.worker.rotary.sin.any() for impl in ours)
    said = ["all layers" if len(ours) == len(layers) else "full-attention layers"]
    if still:
        said.append("none rotated" if still == len(ours) else "some not rotated")
    return ", ".join(said)


def _reason(message: str) -> str:
    """What stands in a refusal between "cannot serve" and what to do instead."""
    message = re.sub(r"^CASCADE cannot serve (this model: )?", "", message)
    if message.startswith("layer "):
        return re.sub(r"^layer \S+ ", "it ", message).split(". CASCADE")[0]
    asked, _, why = message.partition(": ")
    asks_nothing = asked.startswith(("this model", "attention layers"))
    return why.partition(". ")[0] if asks_nothing else asked


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Process groups of one rank, and what else a worker sets up before it builds a model."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.utils.network_utils import get_open_port

    replaced = unittest.mock.patch.object
    # Twice a model, each half a second after all that vLLM imports.
    with (
        replaced(gc, "collect", lambda *_: 0),
        replaced(torch.accelerator, "empty_cache", lambda: None),
    ):
        with set_current_vllm_config(VllmConfig()):
            address = f"tcp://127.0.0.1:{get_open_port()}"
            init_distributed_environment(1, 0, address, 0, "gloo")
            initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def table(rows: list[Row]) -> str:
    """Counts in one line, and a table in Markdown."""
    counts = [f"{sum(row.outcome == each for row in rows)} {each}" for each in OUTCOMES]
    lines = [f"{len(rows)} architectures: {', '.join(counts)}.", ""]
    lines += ["| architecture | | |", "| --- | --- | --- |"]
    lines += [f"| `{row.architecture}` | {row.outcome} | {row.why} |" for row in rows]
    return "\n".join(lines) + "\n"


def rewritten(text: str, rows: list[Row]) -> str:
    """A page with the table of `rows` between its markers, `<!-- models -->`."""
    pattern = r"(<!-- models -->\n).*(<!-- /models -->\n)"
    return re.sub(pattern, lambda found: found[1] + table(rows) + found[2], text, flags=re.S)


def main() -> int:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    path = Path(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].endswith(".md") else None
    rows = []
    for row in survey(architectures() if path else sys.argv[1:] or architectures()):
        print(f"{row.architecture:36} {row.outcome:10} {row.why}", flush=True)
        rows.append(row)
    if path:
        path.write_text(rewritten(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
