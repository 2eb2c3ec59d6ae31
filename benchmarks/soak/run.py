"""Minutes of random load on one engine, and what must hold of it afterwards.

Requests of 1 token to 50 times the budget arrive in bursts, some clients leave in the middle of
prefill or decode, and the KV pool is too small for all, so that the scheduler preempts. Pages are
NaN to begin with. The program fails unless, in the end,

- every block is back in the pool, and the scheduler holds nothing of any request;
- no log-probability was NaN or infinite, and every request that was to finish did;
- the last third of the time needed no more memory than the first, in the engine's process, on the
  device and in the front end;
- a sample of the greedy answers is what the same requests get alone, up to ties (on a GPU, in
  bfloat16, of requests that fit the budget; `--tiny`, in float32, compares the others too);
- requests were in fact aborted, preempted, past the budget and in one step with others' decodes.

    python benchmarks soak.run --seconds 420     on a GPU, writes benchmarks/results/soak.csv
    python benchmarks soak.run --tensor 8 --output soak8.csv     over eight
    python benchmarks soak.run --tiny            the same program on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before vLLM is imported, and not for those who import this file
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from engine.models import LLAMA, TINY_LLAMA
from records import RESULTS, conditions, in_words, write_rows
from soak.checks import MIB, compare, faults_of, growth
from soak.traffic import BUDGETS, Clients, Load

OUTPUT = RESULTS / "soak.csv"


@dataclass(frozen=True, slots=True)
class Scale:
    """An engine, its load, and what is allowed to differ.

    Args:
        model: The model's configuration.
        cascade: The cascade's options.
        engine: Other options of the engine.
        pool: KV pool, in the most blocks that a request can hold.
        load: What is asked.
        tie: Difference of log-probabilities that is no difference.
        noise: What a quiet batch changes in them, so many times over, is no difference either.
        growth: Most bytes by which memory may grow.
    """

    model: dict[str, Any]
    cascade: dict[str, Any]
    engine: dict[str, Any]
    pool: float
    load: Load
    tie: float
    noise: float
    growth: int


GPU = Scale(
    model=LLAMA | {"max_position_embeddings": 8192},
    cascade={"cache_tokens": 2048, "num_sub_caches": 4, "stride": 256},
    engine={
        "dtype": "bfloat16",
        "block_size": 16,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "gpu_memory_utilization": 0.6,
        "async_scheduling": True,
        # Half a minute to start instead of two.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
        },
    },
    pool=12,
    load=Load(
        budget=2048,
        max_output_tokens=768,
        per_second=2.0,
        at_once=64,
        sample=15,
        compared_tokens=128,
        all_compared=False,
    ),
    # bfloat16 numbers of a logit's size are 2**-5 apart, and 32 layers add to that.
    tie=0.25,
    # The size of a batch changes bits.
    noise=2.0,
    growth=96 * MIB,
)
TINY = Scale(
    model=TINY_LLAMA | {"max_position_embeddings": 1024, "rope_theta": 10000.0},
    cascade={
        "cache_tokens": 128,
        "num_sub_caches": 4,
        "newest_share": 0.0,
        "num_sink_tokens": 16,
        "stride": 64,
        "selection_window": 64,
    },
    engine={
        "dtype": "float32",
        "block_size": 16,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
    },
    pool=3.2,
    load=Load(
        budget=128,
        max_output_tokens=256,
        per_second=4.0,
        at_once=24,
        sample=6,
        compared_tokens=48,
    ),
    tie=1e-3,
    noise=0.0,
    growth=32 * MIB,
)


def start(folder: Path, scale: Scale, tensor: int) -> Any:
    """The engine of `tensor` ranks, with `probe.py` in its own process."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from soak.probe import LOAD_FORMAT, RanksExecutor
    from vllm_cascade.commands.plan import make_plan

    (folder / "config.json").write_text(json.dumps(scale.model))
    max_model_len = BUDGETS * scale.load.budget + scale.load.max_output_tokens
    options = {name: scale.engine[name] for name in ("block_size", "dtype")}
    plan = make_plan(str(folder), scale.cascade, max_model_len=max_model_len, **options)
    scheduler = "Async" if scale.engine.get("async_scheduling") else ""
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format=LOAD_FORMAT,
            seed=0,
            max_model_len=max_model_len,
            num_gpu_blocks_override=1 + int(scale.pool * plan.max_blocks),
            tensor_parallel_size=tensor,
            distributed_executor_backend="uni" if tensor == 1 else RanksExecutor,
            attention_backend="CASCADE",
            additional_config={"cascade": scale.cascade},
            worker_extension_cls="soak.probe.Probe",
            scheduler_cls=f"soak.probe.Counting{scheduler}Scheduler",
            **scale.engine,
        )
    )


async def soak(
    engine: Any, scale: Scale, seconds: float, seed: int, tensor: int = 1
) -> tuple[list[str], dict]:
    """Play the load and look at what is left. Each of `tensor` ranks may grow.

    Returns:
        What is wrong, and the row of results.
    """
    from vllm.v1.metrics.reader import get_metrics_snapshot

    await engine.collective_rpc("soak_prepare")
    clients = Clients(engine, scale.load, seed)
    begin = time.monotonic()
    await clients.play(seconds)
    if clients.faults:
        return clients.faults, {}
    row: dict[str, Any] = {
        "ranks": tensor,
        "seconds": round(time.monotonic() - begin, 1),
        "async_scheduling": engine.vllm_config.scheduler_config.async_scheduling,
        "requests": clients.asked,
        "finished": clients.finished,
        "past_budget": clients.past_budget,
        "continued": clients.continued,
        "tokens": clients.tokens,
        "preemptions": sum(
            int(metric.value)
            for metric in get_metrics_snapshot()
            if metric.name == "vllm:num_preemptions"
        ),
    }
    state = await clients.state()
    for what in ("aborted_in_queue", "aborted_in_prefill", "aborted_in_decode", "mixed_steps"):
        row[what] = state["counts"].get(what, 0)
    for what, grown in growth(clients.readings).items():
        name = what.replace(" ", "_")
        row |= {f"{name}_mib": round(state["memory"][what] / MIB)}
        row |= {f"{name}_grew_mib": round(grown / MIB, 1)}
    asks = clients.sample(state["preempted"])
    # From the beginning, also where another request of the sample goes on from this one.
    alone = []
    for ask in asks:
        await engine.reset_prefix_cache()
        alone.append(await clients.repeat(ask, "alone"))
    await engine.reset_prefix_cache()
    batch = await asyncio.gather(*(clients.repeat(ask, "batch") for ask in asks))
    found = [clients.answers[ask] for ask in asks]
    row |= compare(found, alone, batch, scale.tie, scale.noise)
    return clients.faults + faults_of(row, await clients.state(), tensor * scale.growth), row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="of arrivals; default: 420, with --tiny 25")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; default: 1")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT.name}; none with --tiny")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    scale, seconds = (TINY, 25.0) if arguments.tiny else (GPU, 420.0)
    # On GPUs more ranks are faster, and would preempt nothing.
    per_second = scale.load.per_second * arguments.tensor
    scale = replace(scale, load=replace(scale.load, per_second=per_second))
    if arguments.tiny:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Else vLLM's CPU platform gives the worker a process of its own, away from the scheduler.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # oneDNN keeps a product compiled for each shape, 0.4 MiB each: a thousand of them would
        # still be coming when the run ends, and hide what else grows.
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "16"
    output = arguments.output or (None if arguments.tiny else OUTPUT)
    begin = time.monotonic()

    async def run(folder: Path) -> tuple[list[str], dict]:
        engine = start(folder, scale, arguments.tensor)
        try:
            print(f"started in {time.monotonic() - begin:.0f} s")
            played = arguments.seconds or seconds
            return await soak(engine, scale, played, arguments.seed, arguments.tensor)
        finally:
            engine.shutdown()
            # Collected later it would shut down once more, in an interpreter half gone.
            del engine

    with tempfile.TemporaryDirectory() as name:
        faults, row = asyncio.run(run(Path(name)))
    # Asks for the GPU's name, which a process that has yet to start an engine had better not.
    stated = conditions()
    print("\n" + in_words(stated))
    for column, value in row.items():
        print(
            f"{column:22} {value:>14.5g}"
            if isinstance(value, float)
            else f"{column:22} {value:>14,}"
        )
    for fault in faults:
        print(f"FAILED: {fault}")
    if not faults:
        print(f"every check holds; {time.monotonic() - begin:.0f} s in all")
        if output:
            write_rows(output, stated, [row])
            print(f"wrote {output}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
