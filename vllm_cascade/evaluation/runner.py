"""Asks all prompts of one cache after the other, and writes down the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation.caches import Cache
from vllm_cascade.evaluation.engine import Completion, Engine, Request, resolve
from vllm_cascade.evaluation.prompts import Prompt
from vllm_cascade.evaluation.results import Results
from vllm_cascade.evaluation.scoring import parts_right, position_buckets
from vllm_cascade.evaluation.tasks import TASKS
from vllm_cascade.structure import accounting
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.support.names import BACKEND_NAME

MAX_NUM_SEQS = 64
# Engine arguments that the evaluation sets itself.
OWN_ARGUMENTS = (
    "model",
    "attention_backend",
    "attention_config",
    "additional_config",
    "max_model_len",
    "enable_prefix_caching",
    "skip_tokenizer_init",
)
# CUDA graphs as they suit long prompts: a graph for each batch size in decode, and no compilation.
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
    },
}


@dataclass(frozen=True, slots=True)
class Run:
    """A cache, and all that its engine is started with.

    Attributes:
        cache: The cache.
        options: Keyword arguments for `vllm.LLM`.
        config: The resolved configuration of the cascade; None for full attention.
    """

    cache: Cache
    options: dict[str, Any]
    config: CascadeConfig | None


def plan_runs(
    model: str,
    caches: Sequence[Cache],
    prompts: Sequence[Prompt],
    engine_args: dict[str, Any],
    allow_under_budget: bool,
) -> list[Run]:
    """Check every cache before the first engine starts.

    Args:
        model: As for `vllm.LLM`.
        caches: The caches to run.
        prompts: The prompts that every cache is asked.
        engine_args: More arguments for `vllm.LLM`; those in `OWN_ARGUMENTS` are refused.
        allow_under_budget: Whether a cascade may run that evicts no token of a prompt.

    Returns:
        A run for each cache.

    Raises:
        CommandError: A cache cannot run as asked, or would evict no token.
    """
    for name in OWN_ARGUMENTS:
        if name in engine_args:
            raise CommandError(f"--engine-args sets {name}, which the evaluation sets itself")
    lengths = sorted({prompt.length for prompt in prompts})
    longest = max(prompt.length + prompt.max_tokens for prompt in prompts)
    runs = []
    for cache in caches:
        options: dict[str, Any] = {
            "max_num_seqs": min(MAX_NUM_SEQS, len(prompts)),
            **engine_args,
            "max_model_len": longest,
        }
        checked = options
        if cache.cascade is None:
            # Left out here and checked below: vLLM would tell the user to set an environment
            # variable for a length beyond the model's.
            checked = {name: value for name, value in options.items() if name != "max_model_len"}
        else:
            options["attention_backend"] = BACKEND_NAME
            options["additional_config"] = {"cascade": cache.cascade}
        try:
            limit, config = resolve(model, checked)
        except CommandError as error:
            raise CommandError(f"cache {cache.label!r}: {error}") from error
        if config is None and longest > limit:
            raise CommandError(
                f"cache {cache.label!r}: the longest prompt and its answer take {longest:,} "
                f"tokens, the model was made for {limit:,}: give smaller --lengths, or leave "
                f"{cache.label!r} out"
            )
        if config is not None and not allow_under_budget:
            _check_budget(cache.label, config, lengths)
        runs.append(Run(cache, options, config))
    return runs


def _check_budget(label: str, config: CascadeConfig, lengths: Sequence[int]) -> None:
    kept = [length for length in lengths if not accounting.tokens_evicted(config, length)]
    if kept:
        raise CommandError(
            f"cache {label!r}: prompts of {kept[-1]:,} tokens lose no token in a budget of "
            f"{config.cache_tokens:,} tokens with a stride of {config.stride:,}, so there is "
            "nothing to measure: give a smaller cache_tokens, larger --lengths, or "
            "--allow-under-budget"
        )


def evaluate(
    model: str, runs: Sequence[Run], prompts: Sequence[Prompt], results: Results, tokenizer: Any
) -> None:
    """Ask every cache all prompts that `results` does not have yet.

    Args:
        model: As for `vllm.LLM`.
        runs: From `plan_runs`.
        prompts: The prompts. An engine gets one length after the other; all prompts of a length
            are one batch.
        results: Gets the rows of a batch as soon as the batch is done.
        tokenizer: Decodes the answers.
    """
    left = [
        (run, [prompt for prompt in prompts if not results.has(run.cache.label, prompt)])
        for run in runs
    ]
    total = sum(prompt.length for _, asked in left for prompt in asked)
    with tqdm(total=total, unit="tok", unit_scale=True, dynamic_ncols=True) as bar:
        for run, asked in left:
            if not asked:
                continue
            bar.set_description(f"{run.cache.label}: starting the engine")
            with Engine(model, **run.options) as engine:
                for length in sorted({prompt.length for prompt in asked}):
                    batch = [prompt for prompt in asked if prompt.length == length]
                    completions = _ask(engine, run, batch, bar)
                    results.add(
                        row
                        for prompt, completion in zip(batch, completions, strict=True)
                        for row in _rows(run, prompt, completion, tokenizer)
                    )


def _ask(engine: Engine, run: Run, batch: list[Prompt], bar: Any) -> list[Completion]:
    before = bar.n
    length = batch[0].length

    def progress(computed: int, finished: int) -> None:
        bar.set_description(
            f"{run.cache.label}, {length:,} tokens, {finished} of {len(batch)} answered",
            refresh=False,
        )
        bar.update(before + computed - bar.n)

    progress(0, 0)
    requests = [Request(p.token_ids, p.max_tokens, logprobs=not p.expected) for p in batch]
    return engine.run(requests, progress)


def _rows(run: Run, prompt: Prompt, completion: Completion, tokenizer: Any) -> list[dict[str, Any]]:
    """A prompt's rows: one row, or for perplexity a row for each part of the text."""
    evicted, options = 0, ""
    if run.config is not None:
        computed = accounting.computed_tokens(prompt.length, len(completion.token_ids))
        evicted = accounting.tokens_evicted(run.config, computed)
        options = json.dumps(asdict(run.config))
    common = {
        "cache": run.cache.label,
        "task": prompt.task,
        "filler": prompt.filler,
        "length": prompt.length,
        "index": prompt.index,
        "seed": prompt.seed,
        "tokens_evicted": evicted,
        "kv_blocks": completion.num_blocks,
        "kv_bytes": completion.kv_bytes,
        "options": options,
    }
    if not prompt.expected:
        return [
            {**common, "first_position": first, "end_position": end, "nats": nats}
            for first, end, _, nats in position_buckets(completion.logprobs)
        ]
    answer = answer_text(tokenizer, completion.token_ids)
    right, parts = parts_right(answer, prompt.expected, TASKS[prompt.task].names)
    return [
        {
            **common,
            "depth": "" if prompt.depth is None else round(prompt.depth, 4),
            "expected": " ".join(prompt.expected),
            "answer": " ".join(answer.split()),
            "parts_right": right,
            "parts": parts,
            "exact": int(right == parts),
        }
    ]


def answer_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode an answer up to its first special token, at which the engine did not stop.

    Args:
        tokenizer: A tokenizer of the transformers library.
        token_ids: The generated tokens.

    Returns:
        The answer's text.
    """
    special = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(token_ids) if token in special), len(token_ids))
    return str(tokenizer.decode(list(token_ids[:end])))
