"""Requests that begin alike, with the cascade and with FlashAttention: hits, first tokens, blocks.

Models of Llama-3.1-8B's shape with dummy weights, one engine after the other, prefix caching on.
Four workloads: `system`, many short questions behind one system prompt, all within the budget;
`arriving`, the same at random times, where no request waits for another to end; `open`, as `system`
by clients that give no `max_tokens` and leave after as many tokens; and `text`, questions about a
text of several budgets, the cascade alone. Of `system` and `open` a fixed number of requests is
under way at a time; the questions about the text come one after another.

    python benchmarks engine.shared_prefix         writes benchmarks/results/gpu_shared_prefix.csv
    python benchmarks engine.shared_prefix --tiny  proves the program on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from engine import processes
from engine.models import LLAMA, TINY_LLAMA
from engine.serving import OURS
from records import RESULTS, conditions, percentiles, read_rows, write_rows

OUTPUT = RESULTS / "gpu_shared_prefix.csv"
THEIRS, CPU = "FLASH_ATTN", "CPU_ATTN"
# Requests that arrive in a second: both backends serve them as they come.
RATE = 12.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that begin alike.

    Args:
        name: Of the row.
        shared: Tokens that all requests begin with.
        own: Further tokens of each request's prompt.
        answer: Tokens that a client reads of each answer.
        requests: How many in all.
        at_once: Most requests that are under way at a time.
        per_second: How many arrive in a second, at exponential gaps; at once if 0.
        is_open: Whether the requests give no `max_tokens`, and clients leave.
    """

    name: str
    shared: int
    own: int
    answer: int
    requests: int
    at_once: int
    per_second: float = 0.0
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """What runs.

    Args:
        model: The model's configuration.
        backends: Both.
        system: The workload within the budget.
        text: The workload of several budgets.
        cascade: Options of the cascade.
        engine: Options of the engine.
    """

    model: dict[str, Any]
    backends: tuple[str, str]
    system: Workload
    text: Workload
    cascade: dict[str, Any]
    engine: dict[str, Any]

    def workloads(self, backend: str) -> list[Workload]:
        """Those of a backend."""
        both = [
            self.system,
            replace(self.system, name="arriving", at_once=self.system.requests, per_second=RATE),
            replace(self.system, name="open", is_open=True),
        ]
        return [*both, self.text] if backend == OURS else both


FULL = Sizes(
    model=LLAMA,
    backends=(OURS, THEIRS),
    system=Workload("system", shared=6000, own=200, answer=64, requests=200, at_once=16),
    text=Workload("text", shared=131_072, own=100, answer=16, requests=20, at_once=1),
    cascade={"cache_tokens": 16_384},
    engine={
        "dtype": "bfloat16",
        "max_model_len": 140_000,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
)
TINY = Sizes(
    model=TINY_LLAMA,
    backends=(OURS, CPU),
    system=Workload("system", shared=100, own=30, answer=4, requests=12, at_once=4),
    text=Workload("text", shared=2048, own=20, answer=4, requests=4, at_once=1),
    cascade={"cache_tokens": 256, "num_sink_tokens": 32, "stride": 64, "selection_window": 64},
    engine={
        "dtype": "float32",
        "max_model_len": 2400,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 8 << 20,
    },
)


def play(llm: Any, work: Workload, seed: int) -> dict[str, Any]:
    """Run a workload; a row."""
    from vllm import SamplingParams

    engine, random, most = llm.llm_engine, Random(seed), 0
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool, vocabulary = manager.block_pool, llm.model_config.get_vocab_size()
    shared = random.choices(range(2, vocabulary), k=work.shared)
    assert llm.reset_prefix_cache()
    waiting = [random.choices(range(2, vocabulary), k=work.own) for _ in range(work.requests)]
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    cached: dict[str, int] = {}
    begin = due = time.perf_counter()
    while waiting or sent:
        if not sent:
            time.sleep(max(0.0, due - time.perf_counter()))
        while waiting and len(sent) < work.at_once and due <= time.perf_counter():
            name = f"{work.name}-{len(waiting)}"
            params = SamplingParams(
                temperature=0,
                max_tokens=None if work.is_open else work.answer,
                ignore_eos=True,
                detokenize=False,
            )
            if work.per_second:
                sent[name], due = due, due + random.expovariate(work.per_second)
            else:
                sent[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": [*shared, *waiting.pop()]}, params)
        for output in engine.step():
            name = output.request_id
            if name not in sent:
                continue
            if name not in first:
                first[name] = time.perf_counter() - sent[name]
                cached[name] = output.num_cached_tokens or 0
            most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
            if output.finished or len(output.outputs[0].token_ids) >= work.answer:
                if not output.finished:
                    engine.abort_request([name])
                del sent[name]
    seconds = time.perf_counter() - begin
    block = engine.vllm_config.cache_config.block_size
    # The first request of all has nothing to find.
    hits = sum(sorted(cached.values())[1:]) / ((work.requests - 1) * (work.shared + work.own))
    p20, p50, p80 = percentiles(list(first.values()))
    return {
        "workload": work.name,
        "requests": work.requests,
        "at_once": work.at_once,
        "per_second": work.per_second,
        "shared_tokens": work.shared,
        "own_tokens": work.own,
        "answer_tokens": work.answer,
        "hit_rate": round(hits, 4),
        "shared_computed_again": round(
            1 - sum(sorted(cached.values())[1:]) / ((work.requests - 1) * work.shared), 4
        ),
        "ttft_p20_ms": round(1e3 * p20, 2),
        "ttft_p50_ms": round(1e3 * p50, 2),
        "ttft_p80_ms": round(1e3 * p80, 2),
        "most_held_tokens": most * block,
        "seconds": round(seconds, 2),
        "block_size": block,
    }


def run_backend(backend: str, arguments: argparse.Namespace, sizes: Sizes) -> None:
    """In a process of its own: an engine, all workloads, their rows as JSON."""
    from vllm import LLM

    llm = LLM(
        str(arguments.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        attention_backend=backend,
        enable_prefix_caching=True,
        disable_log_stats=False,
        additional_config={"cascade": sizes.cascade} if backend == OURS else {},
        **sizes.engine,
    )
    play(llm, replace(sizes.system, requests=2 * sizes.system.at_once), seed=0)
    rows = [play(llm, work, seed=1) for work in sizes.workloads(backend)]
    stated = conditions() | {"backend": backend}
    arguments.output.write_text(json.dumps([stated | row for row in rows]))
    llm.llm_engine.engine_core.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--timeout", type=int, default=280, help="seconds that a backend may take")
    # Of a backend's own process.
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    if arguments.backend:
        run_backend(arguments.backend, arguments, sizes)
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(sizes.model))
        for backend in sizes.backends:
            found, log = folder / f"{backend}.json", folder / f"{backend}.log"
            command = processes.command("engine.shared_prefix", "--backend", backend)
            command += ["--model", name, "--output", str(found)] + ["--tiny"] * arguments.tiny
            environment = processes.engine_environment()
            code = processes.run(command, environment, log, arguments.timeout)
            if processes.is_well(backend, code, log, arguments.timeout):
                rows += json.loads(found.read_text())
    columns = ("backend", "workload", "hit_rate", "shared_computed_again", "ttft_p50_ms")
    columns += ("ttft_p80_ms", "most_held_tokens", "seconds")
    print(" ".join(f"{column:>21}" for column in columns))
    for row in rows:
        print(" ".join(f"{row[column]!s:>21}" for column in columns))
    if rows and not arguments.tiny:
        write_rows(OUTPUT, {}, [*rows, *_others(rows)])
    return 0 if len({row["backend"] for row in rows}) == len(sizes.backends) else 1


def _others(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of the file that these do not replace: another backend's."""
    there = {row["backend"] for row in rows}
    return [row for row in read_rows(OUTPUT) if row["backend"] not in there]


if __name__ == "__main__":
    sys.exit(main())
