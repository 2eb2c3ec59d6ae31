"""Prefill and decode with the cascade on several GPUs of one host, against a single one.

A model of Llama-3.1-8B's shape with dummy weights, CUDA graphs for decode, no torch.compile, behind
`AsyncLLM`, as in a server. One engine after the other: a single GPU; tensor parallel over 2, 4 and
8, through vLLM's own processes and through Ray; 2 pipeline stages; 2 and 8 replicas; and some of
these together. For each: time to the first token of one prompt of 65,536 tokens, and of a longer
one if asked; prefill of two such prompts for each replica, in tokens per second; and tokens per
second of 64 requests of each replica that decode together with full caches, all prefilled.

A row is not reported unless every request generated what was asked, all decoded together for 32
tokens or more, and the device counters of all ranks together (pairs scored, groups merged, tokens
dropped) are what the layout predicts. A row is written as soon as it is measured.

    python benchmarks engine.scaling            writes benchmarks/results/gpu_scaling.csv
    python benchmarks engine.scaling --rows tp1,tp2_ray --plan
    python benchmarks engine.scaling --rows tp1,tp8_mp --budget 16384 --requests 32 --long 500000
    python benchmarks engine.scaling --rows tp1,tp8_mp --requests 32 --backend FLASH_ATTN
    python benchmarks engine.scaling --rows tp4_mp,tp8_mp --shape 70b
    python benchmarks engine.scaling --tiny     proves the program on a CPU, nothing written
    python benchmarks engine.scaling --tiny --rows tp8_mp,tp4_dp2,tp4_pp2,dp8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import models, processes
from engine.models import LLAMA, LLAMA_70B, TINY_LLAMA
from engine.scaling_engine import FEWEST, Engine, Grid, Sizes
from records import RESULTS, RefusalError, conditions, read_rows, replace_rows
from vllm_cascade.commands.arguments import positive_int, tokens
from vllm_cascade.commands.plan import Plan

OUTPUT = RESULTS / "gpu_scaling.csv"
# Seconds of an engine's start and of a prompt's token on one GPU, of earlier runs of million.py
# and serving.py: for the plan. A row that the plan has no time left for does not run.
START_S, TOKEN_S = 50.0, 50e-6


GRIDS = {
    "tp1": Grid(),
    "tp2_mp": Grid(tensor=2, executor="mp"),
    "tp2_ray": Grid(tensor=2, executor="ray"),
    "pp2": Grid(pipeline=2, executor="mp"),
    "dp2": Grid(replicas=2),
    "dp2_ray": Grid(replicas=2, executor="ray"),
    "tp4_mp": Grid(tensor=4, executor="mp"),
    "tp4_ray": Grid(tensor=4, executor="ray"),
    "tp8_mp": Grid(tensor=8, executor="mp"),
    "tp8_ray": Grid(tensor=8, executor="ray"),
    "tp4_dp2": Grid(tensor=4, replicas=2),
    "tp4_pp2": Grid(tensor=4, pipeline=2, executor="mp"),
    "dp8": Grid(replicas=8),
    "dp8_ray": Grid(replicas=8, executor="ray"),
}
# Shape of a model, and the fewest GPUs that hold its weights.
SHAPES = {
    "8b": (LLAMA, 1),
    "8b-4kv": (LLAMA | {"num_key_value_heads": 4}, 1),
    # What one of eight ranks computes, without their reductions.
    "8b-eighth": (
        LLAMA
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
        | {"intermediate_size": 1792, "vocab_size": 16032},
        1,
    ),
    "70b": (LLAMA_70B, 2),
}
BACKENDS = ("CASCADE", "FLASH_ATTN")


FULL = Sizes(
    model=LLAMA,
    prompt=1 << 16,
    requests=64,
    margin=64,
    # 64 full caches of 16,384 tokens are more than one GPU holds beside the weights.
    cascade={"cache_tokens": 4096},
    engine={
        "dtype": "bfloat16",
        "max_model_len": (1 << 16) + 64,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, *range(16, 65, 8)],
        },
    },
)
TINY = Sizes(
    # A query head for each of eight ranks.
    model=TINY_LLAMA | {"num_attention_heads": 8},
    prompt=1500,
    requests=4,
    # Eight replicas on a few cores do not begin together.
    margin=FEWEST + 96,
    cascade={
        "cache_tokens": 256,
        "num_sub_caches": 2,
        "num_sink_tokens": 32,
        "stride": 64,
        "selection_window": 64,
    },
    engine={
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "kv_cache_memory_bytes": 16 << 20,
        # Not eager: the CPU's runner makes what a second stage receives into when it compiles.
        "compilation_config": {"backend": "eager"},
    },
)


def seconds_of(grid: Grid, sizes: Sizes, plan: Plan) -> float:
    """About how long a row takes."""
    # Measured is neither what communication costs nor how long stages wait for each other.
    return START_S + 5 * grid.gpus + TOKEN_S * sizes.total(plan) / grid.gpus + 5


async def run_row(arguments: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """In a process of its own: start an engine, measure, and stop it."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    grid, begin = GRIDS[arguments.row], time.perf_counter()
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(arguments.folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            seed=0,
            attention_backend=sizes.backend,
            enable_prefix_caching=False,
            worker_extension_cls="engine.serving.Probe",
            additional_config={"cascade": sizes.cascade} if sizes.backend == "CASCADE" else {},
            **grid.options(),
            **sizes.engine,
        )
    )
    try:
        started = time.perf_counter() - begin
        print(f"{arguments.row}: started in {started:.0f} s")
        plan = plan_of(arguments.folder, sizes)
        row = await Engine(llm, sizes, grid, plan).measure()
    finally:
        llm.shutdown()
    names = ("tensor", "pipeline", "replicas", "executor")
    spread = {name: getattr(grid, name) for name in names}
    spread |= {"start_s": round(started, 1)}
    return {"row": arguments.row, "gpus": grid.gpus, **spread, **row, "shape": arguments.shape}


def plan_of(folder: Path, sizes: Sizes) -> Plan:
    """The cascade's configuration as the engines resolve it."""
    return models.plan_of(folder, sizes.cascade, sizes.engine)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row into a file, in the place of the one of its name, shape, backend and budget."""
    alike = ("row", "shape", "backend", "cache_tokens")

    def key(each: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(each.get(name, "")) for name in alike)

    there = {key(each): each for each in read_rows(path)} | {key(row): row}
    order = list(GRIDS)
    kept = sorted(there.values(), key=lambda each: (key(each)[1:], order.index(each["row"])))
    replace_rows(path, kept, row)


def start(name: str, arguments: argparse.Namespace, folder: Path, timeout: float) -> bool:
    """Run one row in a process of its own; whether it ended well."""
    log = arguments.logs / f"gpu_scaling_{name}.log"
    command = processes.command("engine.scaling", "--row", name, "--folder", str(folder))
    command += ["--output", str(arguments.output)] + ["--tiny"] * arguments.tiny
    for option in ("shape", "backend", "budget", "requests", "long"):
        value = getattr(arguments, option)
        command += [] if value is None else [f"--{option}", str(value)]
    environment = processes.environment(
        VLLM_LOGGING_STREAM="ext://sys.stderr",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        RAY_DEDUP_LOGS="0",
    )
    if arguments.tiny:
        # Two ranks cannot have all cores each.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    begin = time.perf_counter()
    code = processes.run(command, environment, log, timeout)
    print(f"{name}: {time.perf_counter() - begin:.0f} s, log in {log}")
    return processes.is_well(name, code, log, timeout)


def wait_for_free_gpus(seconds: float = 30.0) -> None:
    """Give the last engine's ranks, which Ray ends on its own, time to leave the GPUs."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        used = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
        if max(map(int, used)) < 2000:
            return
        time.sleep(1)


def report(rows: list[dict[str, str]]) -> None:
    """Print the table, with each figure over the single GPU's."""
    columns = ("row", "gpus", "start_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")
    print("\n" + " ".join(f"{name:>20}" for name in columns))
    alone = next((row for row in rows if row["row"] == "tp1"), None)
    for row in rows:
        cells = [row[name] for name in columns]
        for place in (4, 5) if alone else ():
            over = float(cells[place]) / float(alone[columns[place]])
            cells[place] = f"{float(cells[place]):,.0f} ({over:.2f}x)"
        print(" ".join(f"{cell:>20}" for cell in cells))


def parse() -> tuple[argparse.Namespace, Sizes]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"of {', '.join(GRIDS)}, with commas between")
    parser.add_argument("--plan", action="store_true", help="print what would run, and end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--seconds", type=float, default=530, help="that all rows may take")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT.name}; none with --tiny")
    parser.add_argument(
        "--shape", choices=SHAPES, default="8b", help="of the model; not with --tiny"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: CASCADE")
    parser.add_argument("--budget", type=tokens, help="cache_tokens; default: 4096")
    parser.add_argument(
        "--requests", type=positive_int, help="of each replica that decode at once; default: 64"
    )
    parser.add_argument("--long", type=tokens, help="tokens of a longer prompt; default: none")
    # Of a row's own process.
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    # Ranks of a tiny model share the cores: as many as are asked for, or two.
    arguments.here = (8 if arguments.rows else 2) if arguments.tiny else None
    arguments.rows = arguments.rows.split(",") if arguments.rows else list(GRIDS)
    if not set(arguments.rows) <= set(GRIDS):
        parser.error(f"rows are {', '.join(GRIDS)}")
    return arguments, sizes_of(arguments)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """What runs, as the command line has it."""
    sizes = TINY if arguments.tiny else replace(FULL, model=SHAPES[arguments.shape][0])
    backend = arguments.backend or sizes.backend
    if arguments.tiny and backend != sizes.backend:
        backend = "CPU_ATTN"
    budget = {"cache_tokens": arguments.budget} if arguments.budget else {}
    long = arguments.long or 0
    longest = max(long + 64, sizes.engine["max_model_len"])
    return replace(
        sizes,
        requests=arguments.requests or sizes.requests,
        cascade=sizes.cascade | budget,
        engine=sizes.engine | {"max_model_len": longest},
        long=long,
        backend=backend,
    )


def main() -> int:
    arguments, sizes = parse()
    sys.stdout.reconfigure(line_buffering=True)
    if arguments.row:
        try:
            add_row(arguments.output, conditions() | asyncio.run(run_row(arguments, sizes)))
        except RefusalError as error:
            print(f"{arguments.row} IS NOT REPORTED: {error}")
            return 1
        return 0
    import torch

    # Of the driver, so that no process but the ranks holds memory of a GPU.
    here = arguments.here or torch.cuda.device_count()
    begin, missing = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes.model))
        arguments.output = arguments.output or (
            Path(folder) / "x.csv" if arguments.tiny else OUTPUT
        )
        plan = plan_of(Path(folder), sizes)
        needed = {name: seconds_of(GRIDS[name], sizes, plan) for name in arguments.rows}
        fewest = 1 if arguments.tiny else SHAPES[arguments.shape][1]
        fits = [
            name
            for name in arguments.rows
            if GRIDS[name].gpus >= fewest * GRIDS[name].replicas
            and runs_here(GRIDS[name], here, arguments.tiny)
        ]
        print(f"{here} GPUs; {plan.config.summary()}")
        for name in arguments.rows:
            runs = f"about {needed[name]:.0f} s" if name in fits else "not on this host"
            print(f"{name}: {GRIDS[name].gpus} GPUs, {runs}")
        total = sum(needed[name] for name in fits)
        print(f"about {total:.0f} s in all, {arguments.seconds:.0f} at most")
        if arguments.plan:
            return 0
        for name in fits:
            left = arguments.seconds - (time.perf_counter() - begin)
            if left < needed[name]:
                print(f"{name} IS NOT RUN: {left:.0f} s left")
                missing.append(name)
                continue
            if not arguments.tiny:
                wait_for_free_gpus()
            if not start(name, arguments, Path(folder), left):
                missing.append(name)
        report(read_rows(arguments.output))
    return 1 if missing else 0


def runs_here(grid: Grid, gpus: int, is_tiny: bool) -> bool:
    """Whether there are GPUs enough, and what else it needs."""
    # vLLM's CPU platform does not run through Ray.
    return grid.gpus <= gpus and not (is_tiny and grid.executor == "ray")


if __name__ == "__main__":
    sys.exit(main())
