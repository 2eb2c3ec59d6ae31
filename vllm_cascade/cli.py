"""The command `vllm-cascade`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from vllm_cascade.commands.arguments import positive, positive_int, tokens
from vllm_cascade.evaluation.command import add_commands
from vllm_cascade.inspection.command import add_command
from vllm_cascade.structure.config import ELASTIC, FIXED
from vllm_cascade.structure.options import PRESETS, CascadeOptions

INVALID = 2  # argparse's own exit code for a bad command line


def _whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


# Option -> how argparse reads it; an option that is not here is a whole number.
READERS: dict[str, dict[str, Any]] = {
    "cache_tokens": {"type": tokens, "metavar": "TOKENS"},
    "policy": {"choices": tuple(PRESETS)},
    "structure": {"choices": (FIXED, ELASTIC)},
    "num_sub_caches": {"type": _whole_or_auto, "metavar": "NUMBER|auto"},
    "score_weight": {"type": float},
    "key_weight": {"type": float},
    "value_weight": {"type": float},
    "score_power": {"type": float},
    "newest_share": {"type": float},
    "score_decay": {"type": float},
    "score_reduction": {"choices": ("max", "mean")},
    "trace_tokens": {"action": "store_true", "default": None},
}


def run() -> int:
    """Run `main` as the console script, with vLLM's log lines turned off."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # For lines that vLLM logs before it reads its own settings.
    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name; None for the process's own.

    Returns:
        The exit code: 2 if the model cannot be served or measured as asked, 1 if an engine failed,
        0 otherwise.
    """
    given = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = given.run
    return run(given)


def _plan(given: argparse.Namespace) -> int:
    from vllm_cascade.commands.errors import CommandError
    from vllm_cascade.commands.plan import make_plan

    options = {f.name: getattr(given, f.name) for f in fields(CascadeOptions)}
    try:
        plan = make_plan(
            given.model,
            {name: value for name, value in options.items() if value is not None},
            max_model_len=given.max_model_len,
            block_size=given.block_size,
            dtype=given.dtype,
            kv_cache_dtype=given.kv_cache_dtype,
            tensor_parallel_size=given.tensor_parallel_size,
            kv_memory_gib=given.gpu_memory,
        )
    except CommandError as error:
        if given.json:
            print(json.dumps({"valid": False, "error": str(error)}))
        print(f"vllm-cascade plan: {error}", file=sys.stderr)
        return INVALID
    print(json.dumps(plan.as_json(), indent=2) if given.json else plan.as_text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-cascade", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="check a configuration, and print its memory and reach, without loading weights",
    )
    plan.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    cascade = plan.add_argument_group("cascade", "As in --additional-config of vLLM.")
    for field in fields(CascadeOptions):
        reader = READERS.get(field.name, {"type": int})
        cascade.add_argument(_flag(field.name), dest=field.name, **reader)
    engine = plan.add_argument_group("engine", "As of vLLM.")
    engine.add_argument("--max-model-len", type=tokens, metavar="TOKENS")
    engine.add_argument("--block-size", type=positive_int, metavar="TOKENS")
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--kv-cache-dtype", default="auto")
    engine.add_argument("--tensor-parallel-size", type=positive_int, default=1, metavar="RANKS")
    plan.add_argument(
        "--gpu-memory", type=positive, metavar="GIB", help="memory for KV on each GPU"
    )
    plan.add_argument("--json", action="store_true", help="print a JSON object")
    plan.set_defaults(run=_plan)
    add_commands(commands)
    add_command(commands)
    return parser


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
