"""Perplexity by position over one long text, far past the length that a model was trained for.

One request streams the King James Bible through an engine of each cache, one after the other; the
log-probability of every token comes back with the prompt's. Full attention gets a rotary table that
is long enough, as users give it, and shows what that does past the model's own limit.

    python benchmarks quality.streaming_perplexity --tokens 200000
        writes benchmarks/results/streaming_perplexity.csv
    python benchmarks quality.streaming_perplexity --tokens 6000 --caches window --output x.csv

A row is not reported if a layer of the engine is not what the cache's name says.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import processes
from records import RESULTS, ROOT, RefusalError, conditions, write_rows

OUTPUT = RESULTS / "streaming_perplexity.csv"
# Sub-caches of a small budget are a few blocks; a CPU takes multiples of 32.
BLOCK_SIZE = 32
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
# Full attention, and what the cascade's options are beside those that all have in common.
CACHES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "window": {"policy": "window"},
    "paper": {"policy": "paper", "num_sub_caches": 4},
    "blend": {"policy": "blend", "num_sub_caches": 4},
    "blend_auto": {"policy": "blend"},
    "distinct": {"policy": "distinct", "num_sub_caches": 4},
    "distinct_auto": {"policy": "distinct", "structure": "fixed"},
    "distinct_elastic": {"policy": "distinct"},
}


def stream(arguments: argparse.Namespace) -> None:
    """In a process of its own: stream the text through one cache, write log-probabilities."""
    from vllm import LLM, SamplingParams

    tokens = json.loads(arguments.text.read_text())
    options: dict[str, Any] = {"attention_backend": "CASCADE"}
    if CACHES[arguments.cache] is None:
        # vLLM reads past the end of a rotary table that is too short.
        options = {"hf_overrides": {"max_position_embeddings": len(tokens) + 16}}
    else:
        common = {"cache_tokens": arguments.cache_tokens, "stride": arguments.stride}
        options["additional_config"] = {"cascade": {**common, **CACHES[arguments.cache]}}
    llm = LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        max_model_len=len(tokens) + 16,
        max_num_seqs=1,
        max_num_batched_tokens=arguments.chunk,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=0,
        gpu_memory_utilization=0.5,
        kv_cache_memory_bytes=arguments.kv_bytes,
        **options,
    )
    (names,) = llm.collective_rpc(attention_of)
    if (CACHES[arguments.cache] is not None) != (names == ["CascadeImpl"]):
        raise RefusalError(f"{arguments.cache}: the layers attend with {names}")
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    begin = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    steps = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    found = [step[token].logprob for token, step in steps]
    arguments.result.write_text(json.dumps({"seconds": seconds, "logprobs": found}))
    llm.llm_engine.engine_core.shutdown()


def attention_of(worker: Any) -> list[str]:
    """Names of the classes that attend in a worker's layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")})


def rows_of(cache: str, logprobs: list[float], bucket: int) -> list[dict[str, Any]]:
    """Perplexity of each `bucket` tokens that follow one another.

    Args:
        cache: Name of the cache.
        logprobs: Of all tokens but the first.
        bucket: Tokens.
    """
    rows = []
    for start in range(0, len(logprobs), bucket):
        part = logprobs[start : start + bucket]
        if len(part) < bucket // 2:
            break
        mean = math.fsum(part) / len(part)
        rows.append(
            {
                "cache": cache,
                "first_token": start + 1,
                "last_token": start + len(part),
                "perplexity": round(math.exp(-mean), 2),
            }
        )
    return rows


def tokens_of(arguments: argparse.Namespace) -> list[int]:
    """The first tokens of the text.

    Raises:
        RefusalError: The text is shorter than that, or does not exceed the budget.
    """
    from transformers import AutoTokenizer

    if arguments.text is None:
        from texts import king_james

        text = king_james()
    else:
        text = arguments.text.read_text(encoding="utf-8")
    # Far more characters than tokens are wanted need not be read.
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = tokenizer(text[: 12 * arguments.tokens])["input_ids"][: arguments.tokens]
    if len(tokens) < arguments.tokens:
        raise RefusalError(f"the text has {len(tokens)} tokens, --tokens asks for more")
    if len(tokens) <= 2 * arguments.cache_tokens:
        raise RefusalError(f"{len(tokens)} tokens do not exceed twice the budget: nothing to see")
    return tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--caches", default=",".join(CACHES), help="default: %(default)s")
    parser.add_argument("--cache-tokens", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--bucket", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of an engine step")
    parser.add_argument("--kv-bytes", type=int, default=8 << 30, help="full attention needs 5 GB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, help="a text file; the King James Bible if not given")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a cache may take")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    # Of a cache's own process.
    for name, kind in (("--cache", str), ("--result", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not set(arguments.caches.split(",")) <= set(CACHES):
        parser.error(f"caches are {', '.join(CACHES)}")
    return arguments


def main() -> int:
    arguments = parse()
    sys.stdout.reconfigure(line_buffering=True)
    if arguments.cache:
        stream(arguments)
        return 0
    rows: list[dict[str, Any]] = []
    refused = 0
    # The engine runs in the process that reads the log-probabilities, and takes a function.
    environment = processes.environment(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1"
    )
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "tokens.json")
        text.write_text(json.dumps(tokens_of(arguments)))
        stated = conditions() | {
            "model": arguments.model.name,
            "dtype": arguments.dtype,
            "cache_tokens": arguments.cache_tokens,
            "stride": arguments.stride,
        }
        for cache in arguments.caches.split(","):
            result, log = Path(name, f"{cache}.json"), Path(name, f"{cache}.log")
            command = processes.command("quality.streaming_perplexity", *sys.argv[1:])
            command += ["--cache", cache]
            command += ["--text", str(text), "--result", str(result)]
            with log.open("w") as file:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=arguments.timeout,
                    check=False,
                )
            if done.returncode or not result.exists():
                refused += 1
                print(f"{cache} IS NOT REPORTED:\n{log.read_text(errors='replace')[-3000:]}")
                continue
            found = json.loads(result.read_text())
            rows += rows_of(cache, found["logprobs"], arguments.bucket)
            print(f"{cache}: {found['seconds']:.1f} s")
            write_rows(arguments.output, stated, rows)
    report(rows, arguments.caches.split(","))
    return 1 if refused or not rows else 0


def report(rows: list[dict[str, Any]], caches: list[str]) -> None:
    """Print perplexity by position, a column for each cache."""
    print(f"\n{'tokens':>17} " + " ".join(f"{cache:>11}" for cache in caches))
    table: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        span = (row["first_token"], row["last_token"])
        table.setdefault(span, {})[row["cache"]] = row["perplexity"]
    for (first, last), cells in sorted(table.items()):
        cells_text = " ".join(f"{cells.get(cache, math.nan):11.2f}" for cache in caches)
        print(f"{first:8,}-{last:8,} {cells_text}")


if __name__ == "__main__":
    sys.exit(main())
