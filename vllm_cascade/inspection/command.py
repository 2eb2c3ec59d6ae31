"""The command `vllm-cascade inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_cascade.commands.arguments import json_object, positive_int, tokens
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation.caches import Cache, parse_caches, parse_options
from vllm_cascade.evaluation.command import FAILED, INVALID, load_tokenizer
from vllm_cascade.inspection.kept import Kept, layers_of, pieces_of
from vllm_cascade.inspection.page import page
from vllm_cascade.structure import accounting
from vllm_cascade.structure.config import CascadeConfig, ConfigError
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve
from vllm_cascade.support.names import BACKEND_NAME

CACHE_TOKENS = "cache_tokens"


def add_command(commands: Any) -> None:
    """Add the command to argparse's `commands`; the parsed namespace's `run` runs the command."""
    command = commands.add_parser(
        "inspect",
        help="show which tokens of a text each layer and KV head kept, as a page for a browser",
        description="Run one prompt, and show which of its tokens each layer and KV head kept.",
    )
    command.add_argument("model", metavar="MODEL", help="model folder or name, as for vLLM")
    command.add_argument("prompt", metavar="PROMPT", help="text, @FILE, or - for standard input")
    command.add_argument(
        "--cache",
        default="distinct",
        metavar="CACHE[:NAME=VALUE,...]",
        help="distinct (default), blend, paper or window; options as in additional_config",
    )
    command.add_argument("--cache-tokens", type=tokens, metavar="TOKENS", help="the budget")
    command.add_argument(
        "--options", default="", metavar="NAME=VALUE,...", help="more of the cascade's options"
    )
    command.add_argument(
        "--max-tokens", type=positive_int, default=16, metavar="TOKENS", help="tokens to generate"
    )
    command.add_argument(
        "--max-model-len",
        type=tokens,
        metavar="TOKENS",
        help="the longest request; just long enough unless given",
    )
    command.add_argument(
        "--chat", action="store_true", help="put the prompt in the model's chat template"
    )
    command.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON", help="more for vllm.LLM"
    )
    command.add_argument(
        "--find", metavar="TEXT", help="say how much was kept of each place where it stands"
    )
    command.add_argument("--output", type=Path, default=Path("kept.html"), metavar="FILE")
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    from vllm_cascade.evaluation.engine import EngineError

    try:
        kept = _inspect(given)
        given.output.write_text(page(kept), encoding="utf-8")
    except (CommandError, EngineError, OSError) as error:
        print(f"vllm-cascade inspect: {error}", file=sys.stderr)
        return INVALID if isinstance(error, CommandError) else FAILED
    except KeyboardInterrupt:
        return FAILED
    found = kept.find(given.find) if given.find else []
    if given.json:
        print(json.dumps(kept.as_json() | {"found": [asdict(passage) for passage in found]}))
        return 0
    print(kept.as_text())
    for passage in found:
        print(
            f"{passage.text!r}, tokens {passage.first:,} to {passage.last:,}: kept by "
            f"{passage.share:.1%} of the heads; {passage.whole} kept it whole"
        )
    print(given.output)
    return 0


def _inspect(given: argparse.Namespace) -> Kept:
    if not given.output.parent.is_dir() or given.output.is_dir():
        raise CommandError(f"cannot write --output {given.output}: give a file in a folder")
    cache = _cache(given)
    text = _read(given.prompt)
    if given.find and given.find not in text:
        raise CommandError(f"{given.find!r}, to --find, is not in the prompt")
    tokenizer = load_tokenizer(given.model)
    prompt = _tokens(tokenizer, text, given.chat)
    options, config = _settle(given, cache, len(prompt))
    return _keep(given, options, config, tokenizer, prompt)


def _cache(given: argparse.Namespace) -> Cache:
    shared = parse_options(given.options)
    if given.cache_tokens is not None:
        if CACHE_TOKENS in shared:
            raise CommandError("--options sets cache_tokens, and so does --cache-tokens")
        shared[CACHE_TOKENS] = given.cache_tokens
    (cache,) = parse_caches([given.cache], shared, {})
    if cache.cascade is None:
        raise CommandError("full attention forgets nothing: choose another --cache")
    return cache


def _read(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.read()
        return Path(prompt[1:]).read_text(encoding="utf-8") if prompt.startswith("@") else prompt
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read the prompt {prompt}: {error}") from error


def _tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise CommandError("the model has no chat template: leave --chat out")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = list(tokenizer.encode(text, add_special_tokens=not chat))
    if not found:
        raise CommandError("the prompt is empty")
    return found


def _settle(
    given: argparse.Namespace, cache: Cache, num_prompt_tokens: int
) -> tuple[dict[str, Any], CascadeConfig]:
    """Keyword arguments for `vllm.LLM`, and the configuration of the cascade in them.

    Raises:
        CommandError: The cascade cannot run, or would forget no token.
    """
    from vllm_cascade.evaluation.engine import resolve
    from vllm_cascade.evaluation.runner import OWN_ARGUMENTS

    for name in (*OWN_ARGUMENTS, "worker_extension_cls"):
        if name in given.engine_args:
            raise CommandError(f"--engine-args sets {name}, which inspect sets itself")
    longest = num_prompt_tokens + given.max_tokens
    if given.max_model_len is not None and given.max_model_len < longest:
        raise CommandError(
            f"the prompt and its answer take {longest:,} tokens, more than --max-model-len "
            f"{given.max_model_len:,}"
        )
    cascade = {**(cache.cascade or {}), "trace_tokens": True}
    options = {
        "enforce_eager": True,
        "max_num_seqs": 1,
        **given.engine_args,
        "max_model_len": given.max_model_len or longest,
        "attention_backend": BACKEND_NAME,
        "additional_config": {"cascade": cascade},
    }
    limit, config = resolve(given.model, options)
    computed = accounting.computed_tokens(num_prompt_tokens, given.max_tokens)
    if not accounting.tokens_evicted(config, computed):
        budget = _smaller_budget(cascade, config, limit, computed)
        raise CommandError(
            f"nothing is forgotten of {computed:,} tokens in a budget of "
            f"{config.cache_tokens:,} tokens with {config.num_sink_tokens} sinks and a stride of "
            f"{config.stride:,}: give "
            + (f"--cache-tokens {budget}, or " if budget else "")
            + "a longer prompt"
        )
    options["worker_extension_cls"] = "vllm_cascade.trace.WorkerExtension"
    return options, config


def _smaller_budget(
    cascade: dict[str, Any], config: CascadeConfig, limit: int, num_tokens: int
) -> int | None:
    """A valid budget that evicts tokens: the present one, halved as often as it takes; or None."""
    block = config.block_size
    budget = min(num_tokens, config.cache_tokens)
    while budget := budget // 2 // block * block:
        try:
            found = resolve(
                CascadeOptions.parse({**cascade, CACHE_TOKENS: budget}),
                block_size=block,
                max_model_len=config.max_model_len,
                position_limit=limit,
            )
        except ConfigError:
            return None
        if accounting.tokens_evicted(found, num_tokens):
            return budget
    return None


def _keep(
    given: argparse.Namespace,
    options: dict[str, Any],
    config: CascadeConfig,
    tokenizer: Any,
    prompt: list[int],
) -> Kept:
    """Run the prompt, and read the engine's pages before anything else is written to them."""
    from tqdm import tqdm

    from vllm_cascade.evaluation.engine import Engine, EngineError, Request
    from vllm_cascade.evaluation.runner import answer_text

    with tqdm(total=len(prompt), unit="tok", desc="starting the engine", leave=False) as bar:
        with Engine(given.model, **options) as engine:
            bar.set_description(given.cache)
            (done,) = engine.run(
                [Request(prompt, given.max_tokens)],
                lambda computed, _: bar.update(computed - bar.n),
            )
            # The finished request's blocks are free, but nobody has written to them since.
            ranks = [found[-1:] for found in engine.kept_tokens()]
    tokens = [*prompt, *done.token_ids][:-1]
    if any(not found or found[0]["num_tokens"] != len(tokens) for found in ranks):
        raise EngineError(f"the pages do not hold the request of {len(tokens):,} tokens any more")
    return Kept(
        model=given.model,
        config=config,
        token_ids=tokens,
        pieces=pieces_of(tokenizer, tokens),
        num_prompt_tokens=len(prompt),
        answer=answer_text(tokenizer, done.token_ids),
        layers=layers_of([found["layers"] for (found,) in ranks]),
    )
