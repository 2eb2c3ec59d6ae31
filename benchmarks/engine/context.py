"""What users of a server see against context length, with the cascade and with FlashAttention.

Models of Llama-3.1-8B's shape with dummy weights, one engine after the other, CUDA graphs for
decode, no torch.compile. For each context length: time to first token and time per output token of
one request, KV memory of a request, requests at once, and tokens per second of as many as fit (64
at most). Times are those of the engine alone, without a server in front.

Measured are all times, and the blocks that a request holds. `requests_fit` is computed: blocks of
the pool over blocks of a request. The many requests that decode together are not prefilled, see
`context_engine.py`; a row has no figures of them if one request alone decodes at another speed
with its context assumed than with its context prefilled. No row is reported if a request was
preempted or did not end, or if the cascade's counters are not what the layout predicts.

    python benchmarks engine.context            writes benchmarks/results/gpu_context.csv
    python benchmarks engine.context --backends CASCADE --lengths 65536,1048576
    python benchmarks engine.context --tiny     proves the program on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import processes
from engine.models import LLAMA, TINY_LLAMA
from engine.serving import OURS
from records import RESULTS, RefusalError, conditions, percentiles, read_rows, replace_rows

OUTPUT = RESULTS / "gpu_context.csv"
THEIRS, CPU = "FLASH_ATTN", "CPU_ATTN"
GIB, MIB = 1 << 30, 1 << 20
# Seconds of an engine's start, and of a prompt of n tokens: a n + b n^2, from gpu_million.csv and
# gpu_serving.csv. For the plan that is printed first; nothing depends on it.
START_S = 50.0
PREFILL_S = {OURS: (65.3e-6, 0.0), THEIRS: (17.5e-6, 4.72e-10)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What runs.

    Args:
        model: The model's configuration.
        lengths: Tokens of a context, prompt and output together.
        longest: Backend to the longest context that it is timed at.
        output: Tokens that a request generates.
        warm_up: Tokens of a first prompt, past the budget, that is not reported.
        most_requests: Requests that decode together.
        drift: Most that assumed and prefilled contexts may differ in the time of a token.
        cascade: Options of the cascade.
        engine: Options of the engine.
    """

    model: dict[str, Any]
    lengths: tuple[int, ...]
    longest: dict[str, int]
    output: int
    warm_up: int
    most_requests: int
    drift: float
    cascade: dict[str, Any]
    engine: dict[str, Any]


FULL = Sizes(
    model=LLAMA,
    lengths=(1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20),
    longest={OURS: 1 << 20, THEIRS: 1 << 18},
    output=64,
    warm_up=24_000,
    most_requests=64,
    drift=0.1,
    cascade={},
    engine={
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "max_num_batched_tokens": 16_384,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, *range(8, 65, 8)],
        },
    },
)
TINY = Sizes(
    model=TINY_LLAMA,
    lengths=(128, 1024, 2048),
    longest={OURS: 2048, CPU: 1024},
    output=12,
    warm_up=600,
    most_requests=3,
    drift=float("inf"),
    cascade={
        "cache_tokens": 256,
        "num_sub_caches": 4,
        "newest_share": 0.0,
        "num_sink_tokens": 32,
        "stride": 128,
        "selection_window": 64,
    },
    engine={
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "enforce_eager": True,
        # Full attention has no room for the longest context.
        "kv_cache_memory_bytes": 2 << 20,
    },
)


def runs_of(context: int) -> int:
    """How often one request of a length is timed."""
    return 3 if context <= 1 << 14 else 2 if context <= 1 << 16 else 1


def plan(sizes: Sizes, backend: str, lengths: list[int]) -> list[tuple[int, float]]:
    """Each length that is timed, and about how many seconds it takes."""
    linear, quadratic = PREFILL_S.get(backend, PREFILL_S[OURS])
    timed = [length for length in lengths if length <= sizes.longest[backend]]
    # Besides, 2 s of single tokens and 5 s of many requests.
    return [(n, runs_of(n) * (linear * n + quadratic * n * n) + 7.0) for n in timed]


def measure(engine: Any, sizes: Sizes, context: int) -> dict[str, Any]:
    """A row.

    Args:
        engine: A `context_engine.Engine`.
        sizes: What runs.
        context: Tokens of the context.

    Raises:
        RefusalError: See the module.
    """
    prompt, runs, note = context - sizes.output, [], ""
    is_timed = context <= engine.vllm_config.model_config.max_model_len
    for _ in range(runs_of(context) if is_timed else 0):
        runs.append(engine.run(prompt, sizes.output))
        first, step = runs[-1].first_token_s, runs[-1].step_s
        print(f"  {context:,}: first token {first:.2f} s, {1e3 * step:.2f} ms a token")
    blocks = runs[0].blocks if runs else -(-context // engine.block_size)
    fit = engine.free_blocks // blocks
    together = assumed = None
    if not is_timed:
        note = "not run; blocks computed"
    else:
        try:
            assumed = engine.run(prompt, sizes.output, is_assumed=True)
            off = assumed.step_s / _median(run.step_s for run in runs) - 1
            if abs(off) > sizes.drift:
                raise RefusalError(f"one assumed context decodes {off:+.1%} off a prefilled one")
            requests = min(fit, sizes.most_requests)
            together = engine.run(prompt, sizes.output, requests, is_assumed=True)
            step = together.step_s
            print(f"  {context:,}: {requests} at once, {requests / step:,.0f} tokens/s")
        except Exception as error:
            # The latency of one request stands without it.
            if not isinstance(error, RefusalError):
                print(traceback.format_exc())
            note = f"requests at once are not reported: {error}".replace("\n", " ")[:300]
            print(f"  {context:,}: {note}")
            together = None
    return {
        "context": context,
        "prompt_tokens": prompt,
        "output_tokens": sizes.output,
        "runs": len(runs),
        "ttft_s": _round(_median(run.first_token_s for run in runs), 3),
        "tpot_ms": _round(_median(1e3 * run.step_s for run in runs), 3),
        "tpot_assumed_ms": _round(assumed and 1e3 * assumed.step_s, 3),
        "kv_mib_per_request": _round(blocks * engine.block_bytes / MIB, 1),
        "kv_pool_gib": _round(engine.free_blocks * engine.block_bytes / GIB, 1),
        "requests_fit": fit,
        "requests_at_once": requests if together else None,
        "kv_mib_at_once": together and _round(together.blocks * engine.block_bytes / MIB, 1),
        "ms_per_step": _round(together and 1e3 * together.step_s, 3),
        "tokens_per_s": _round(together and requests / together.step_s, 1),
        "max_model_len": engine.vllm_config.model_config.max_model_len,
        "cudagraph_mode": engine.facts["cudagraph_mode"],
        "cascade": engine.config.summary() if engine.config else "",
        "note": note,
    }


def _median(values: Any) -> float | None:
    found = list(values)
    return percentiles(found)[1] if found else None


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def run_backend(backend: str, arguments: argparse.Namespace, sizes: Sizes) -> int:
    """In a process of its own: start an engine, add each row to the file as it is measured.

    Returns:
        How many rows there are not.
    """
    from vllm import LLM

    from engine.context_engine import Engine

    stated, refused = conditions(), 0
    timed = plan(sizes, backend, arguments.lengths)
    begin = time.perf_counter()
    llm = LLM(
        str(arguments.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        attention_backend=backend,
        enable_prefix_caching=False,
        worker_extension_cls="engine.serving.Probe",
        max_model_len=max([sizes.warm_up + sizes.output, *(length for length, _ in timed)]),
        additional_config={"cascade": sizes.cascade} if backend == OURS else {},
        **sizes.engine,
    )
    engine = Engine(llm, backend == OURS)
    print(f"{backend}: started in {time.perf_counter() - begin:.0f} s")
    engine.run(sizes.warm_up, sizes.output)
    for context in arguments.lengths:
        try:
            row = measure(engine, sizes, context)
        except RefusalError as error:
            refused += 1
            print(f"{backend} {context:,} IS NOT REPORTED: {error}")
            continue
        add_row(arguments.output, stated | {"backend": backend} | row)
        print(f"{backend} {context:,}: done after {time.perf_counter() - begin:.0f} s")
    llm.llm_engine.engine_core.shutdown()
    return refused


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row into a file, in the place of the one of its backend and context."""

    def key(row: dict[str, Any]) -> tuple[str, int]:
        return str(row["backend"]), int(row["context"])

    rows = [there for there in read_rows(path) if key(there) != key(row)]
    replace_rows(path, sorted([*rows, row], key=key), row)


def start(backend: str, arguments: argparse.Namespace, folder: Path) -> bool:
    """Run one backend in a process of its own; whether all its rows are there."""
    log = arguments.logs / f"gpu_context_{backend}.log"
    command = processes.command("engine.context", "--backend", backend, "--model", str(folder))
    command += ["--lengths", ",".join(map(str, arguments.lengths))]
    command += ["--output", str(arguments.output)] + ["--tiny"] * arguments.tiny
    environment = processes.engine_environment()
    begin = time.perf_counter()
    code = processes.run(command, environment, log, arguments.timeout)
    print(f"{backend}: {time.perf_counter() - begin:.0f} s, log in {log}")
    return processes.is_well(backend, code, log, arguments.timeout)


def report(rows: list[dict[str, str]]) -> None:
    """Print the table."""
    columns = ("backend", "context", "ttft_s", "tpot_ms", "tpot_assumed_ms", "kv_mib_per_request")
    columns += ("requests_fit", "requests_at_once", "ms_per_step", "tokens_per_s", "note")
    print("\n" + " ".join(f"{name:>18}" for name in columns))
    for row in rows:
        print(" ".join(f"{row[name]:>18}" for name in columns))


def parse() -> tuple[argparse.Namespace, Sizes]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", help="with a comma between; both by default")
    parser.add_argument("--lengths", help="tokens of the contexts, with commas between")
    parser.add_argument("--plan", action="store_true", help="print what would run, and end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--timeout", type=int, default=280, help="seconds that a backend may take")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT.name}; none with --tiny")
    # Of a backend's own process.
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    sizes = TINY if arguments.tiny else FULL
    arguments.backends = (arguments.backends or ",".join(sizes.longest)).split(",")
    if not set(arguments.backends) <= set(sizes.longest):
        parser.error(f"backends are {', '.join(sizes.longest)}")
    lengths = map(int, arguments.lengths.split(",")) if arguments.lengths else sizes.lengths
    arguments.lengths = sorted(lengths)
    if not 2 * sizes.output <= arguments.lengths[0] <= arguments.lengths[-1] <= 1 << 20:
        parser.error(f"lengths are from {2 * sizes.output} to {1 << 20:,} tokens")
    return arguments, sizes


def main() -> int:
    arguments, sizes = parse()
    sys.stdout.reconfigure(line_buffering=True)
    if arguments.backend:
        return 1 if run_backend(arguments.backend, arguments, sizes) else 0
    for backend in arguments.backends:
        steps = plan(sizes, backend, arguments.lengths)
        total = START_S + sum(seconds for _, seconds in steps)
        each = ", ".join(f"{length:,} {seconds:.0f} s" for length, seconds in steps)
        print(f"{backend}: about {total:.0f} s: start {START_S:.0f} s, {each}")
    if arguments.plan:
        return 0
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(sizes.model))
        arguments.output = arguments.output or (Path(name) / "x.csv" if arguments.tiny else OUTPUT)
        whole = [start(backend, arguments, Path(name)) for backend in arguments.backends]
        report(read_rows(arguments.output))
    return 0 if all(whole) else 1


if __name__ == "__main__":
    sys.exit(main())
