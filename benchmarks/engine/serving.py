"""Time of whole engines on a GPU with the cascade and with FlashAttention, one after the other.

Models of Llama-3.1-8B's shape with dummy weights, default options on both sides: torch.compile,
CUDA graphs, async scheduling, chunked prefill. Rows: throughput of 64 requests of 1,000 tokens that
generate 128 each, and the time to the first token of a prompt of 120,000 and of 500,000 tokens.

A row is not reported unless every request generated what was asked, and the device counters of all
layers (pairs scored, groups merged, tokens dropped) are what the layout predicts for its runs.

    python benchmarks engine.serving --long     rewrites benchmarks/results/gpu_serving.csv
    python benchmarks engine.serving --tiny     proves the program on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import processes
from engine.models import LLAMA, TINY_LLAMA
from records import RESULTS, RefusalError, conditions, in_words, percentiles, predict, write_rows

OUTPUT = RESULTS / "gpu_serving.csv"
OURS = "CASCADE"


@dataclass(frozen=True, slots=True)
class Case:
    """A row.

    Args:
        requests: Requests at once.
        prompt_tokens: Tokens of each prompt.
        output_tokens: Tokens that each generates.
        runs: Timed runs.
        must: Bound on ours over theirs in throughput, theirs over ours in time to first token.
        aim: Bound to hope for.
        ratio_floor: The ratio at the floor, or None.
        is_long: Whether it runs only with --long.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    runs: int
    must: float
    aim: float
    ratio_floor: float | None = None
    is_long: bool = False

    @property
    def is_throughput(self) -> bool:
        """Whether requests generate more than the first token."""
        return self.output_tokens > 1


CASES = {
    "throughput": Case(64, 1_000, 128, 3, 0.99, 1.0),
    "first_token_120k": Case(1, 120_000, 1, 2, 1.75, 1.85, 1.9),
    "first_token_500k": Case(1, 500_000, 1, 1, 6.0, 6.2, 6.4, is_long=True),
}
TINY_CASES = {
    "throughput": Case(3, 50, 8, 2, 0.99, 1.0),
    "first_token_120k": Case(1, 700, 1, 2, 1.75, 1.85, 1.9),
    "first_token_500k": Case(1, 1_500, 1, 1, 6.0, 6.2, 6.4, is_long=True),
}
WARM_UP_TOKENS, TINY_WARM_UP_TOKENS = 40_000, 600


class Probe:
    """What is asked of vLLM's worker, wherever it runs; vLLM adds it to the worker's class."""

    def cascade_probe_start(self) -> None:
        """Count from here on: graph replays, and what the layers' kernels count."""
        import torch

        if not hasattr(Probe, "replays"):
            original = torch.cuda.CUDAGraph.replay

            def replay(graph: Any) -> None:
                Probe.replays += 1
                original(graph)

            torch.cuda.CUDAGraph.replay = replay
        Probe.replays = 0
        # The engine may have made them in inference mode, and may use another stream.
        with torch.inference_mode():
            _synchronize()
            for counters in self._cascade_probe_counters():
                counters.zero_()
            _synchronize()

    def cascade_probe_read(self) -> dict[str, Any]:
        """What was counted, and what it depends on; plain numbers and words."""
        worker: Any = self
        _synchronize()
        manager = getattr(worker.model_runner, "cudagraph_manager", None)
        compilation = worker.vllm_config.compilation_config
        mode = getattr(manager, "cudagraph_mode", None) or compilation.cudagraph_mode
        impls = self._cascade_probe_impls()
        counters = self._cascade_probe_counters()
        return {
            "replays": Probe.replays,
            "cudagraph_mode": getattr(mode, "name", str(mode)),
            "model_runner": type(worker.model_runner).__module__,
            "layers": len(impls),
            "num_kv_heads": impls[0].num_kv_heads if impls else 0,
            "config": dataclasses.asdict(impls[0].config) if impls else None,
            "counters": [sum(c) for c in zip(*(c.tolist() for c in counters), strict=True)],
        }

    def _cascade_probe_impls(self) -> list[Any]:
        worker: Any = self
        return cascade_impls(worker.vllm_config.compilation_config)

    def _cascade_probe_counters(self) -> list[Any]:
        # Layers of one shape share a workspace; those on a CPU have none.
        impls = self._cascade_probe_impls()
        found = [getattr(impl.worker, "workspace", None) for impl in impls]
        spaces = {id(space): space for space in found if space is not None}
        return [space.counters for space in spaces.values()]


def cascade_impls(compilation: Any) -> list[Any]:
    """What attends in the cascade's layers.

    Args:
        compilation: vLLM's configuration that names all layers.
    """
    layers = compilation.static_forward_context.values()
    impls = [getattr(layer, "impl", None) for layer in layers]
    return [impl for impl in impls if type(impl).__name__ == "CascadeImpl"]


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_counters(probe: dict[str, Any], case: Case, has_gpu: bool) -> str:
    """Compare what the layers counted in one run with the layout's prediction.

    Args:
        probe: From `Probe`.
        case: What ran.
        has_gpu: Whether there must be counters.

    Returns:
        The counters, in one line.

    Raises:
        RefusalError: They differ, or are missing.
    """
    from vllm_cascade.structure.config import CascadeConfig
    from vllm_cascade.structure.layout import build_layout

    if not probe["counters"]:
        if has_gpu:
            raise RefusalError("the engine's layers have no device counters")
        return "no device counters on a CPU"
    layout = build_layout(CascadeConfig(**probe["config"]))
    # The last token generated is never computed.
    computed = case.prompt_tokens + case.output_tokens - 1
    spans = [(0, computed)] * case.requests
    predicted = predict(layout, spans, probe["num_kv_heads"]).times(probe["layers"])
    predicted.check(probe["counters"], f"{case.requests} requests of {computed:,} tokens")
    return f"{predicted.pairs} pairs, {predicted.groups} groups, {predicted.dropped} dropped"


def run_side(arguments: argparse.Namespace) -> None:
    """In a process of its own: start the engine of one side, run all rows, write them as JSON."""
    import torch
    from vllm import LLM, SamplingParams

    has_gpu = torch.cuda.is_available()
    engine = LLM(**engine_options(arguments))
    config = engine.llm_engine.vllm_config
    facts = {
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "block_size": config.cache_config.block_size,
    }
    results: dict[str, Any] = {}

    def generate(case: Case, seed: int) -> float:
        draw = random.Random(seed)
        vocabulary = (TINY_LLAMA if arguments.tiny else LLAMA)["vocab_size"]
        prompts = [
            {"prompt_token_ids": [draw.randrange(2, vocabulary) for _ in range(case.prompt_tokens)]}
            for _ in range(case.requests)
        ]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=case.output_tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {case.output_tokens} or len(outputs) != case.requests:
            raise RefusalError(f"{len(outputs)} requests generated {sorted(lengths)} tokens")
        return seconds

    for name, case in cases_of(arguments).items():
        try:
            # Throughput warms up by itself; a long prompt by one that is past the budget too.
            warm_up = case
            if not case.is_throughput:
                tokens = TINY_WARM_UP_TOKENS if arguments.tiny else WARM_UP_TOKENS
                warm_up = dataclasses.replace(case, prompt_tokens=tokens)
            generate(warm_up, seed=1)
            seconds, replays, counted = [], [], ""
            for run in range(case.runs):
                engine.collective_rpc("cascade_probe_start")
                seconds.append(generate(case, seed=2 + run))
                (probe,) = engine.collective_rpc("cascade_probe_read")
                replays.append(probe["replays"])
                if arguments.side == OURS:
                    if not probe["layers"]:
                        raise RefusalError("no layer of the engine is the cascade's")
                    counted = check_counters(probe, case, has_gpu)
                print(f"{name}, run {run + 1}: {seconds[-1]:.3f} s, {replays[-1]} replays")
            results[name] = facts | {
                "seconds": seconds,
                "replays": replays,
                "cudagraph_mode": probe["cudagraph_mode"],
                "model_runner": probe["model_runner"],
                "counted": counted,
            }
        except RefusalError as error:
            results[name] = {"refused": str(error)}
        except Exception:
            results[name] = {"refused": traceback.format_exc()[-1500:]}
        arguments.result.write_text(json.dumps(results))
    engine.llm_engine.engine_core.shutdown()


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both sides' engines are started with, but for the backend."""
    options: dict[str, Any] = {
        "model": str(arguments.model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32" if arguments.tiny else "bfloat16",
        "seed": 0,
        "max_model_len": arguments.max_model_len,
        "enable_prefix_caching": False,
        "attention_backend": arguments.side,
        "worker_extension_cls": "engine.serving.Probe",
    }
    if arguments.side == OURS and arguments.cascade:
        options["additional_config"] = {"cascade": json.loads(arguments.cascade)}
    if arguments.tiny:
        return options | {"enforce_eager": True}
    options["gpu_memory_utilization"] = 0.9
    if arguments.compile_mode == "none":
        options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    for name in ("max_num_batched_tokens", "max_num_seqs"):
        if getattr(arguments, name):
            options[name] = getattr(arguments, name)
    return options


def cases_of(arguments: argparse.Namespace) -> dict[str, Case]:
    """The rows that were asked for."""
    cases = TINY_CASES if arguments.tiny else CASES
    if arguments.rows:
        return {name: cases[name] for name in arguments.rows.split(",")}
    return {name: case for name, case in cases.items() if arguments.long or not case.is_long}


def start_side(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own, and end it and all its children if it takes too long.

    Args:
        side: The attention backend.
        arguments: Of this program.
        folder: For the model's configuration, results and the log.

    Returns:
        Row to results, of the rows that it came to.
    """
    result, log = folder / f"{side}.json", arguments.logs / f"gpu_serving_{side}.log"
    command = processes.command("engine.serving", *sys.argv[1:], "--side", side)
    command += ["--model", str(folder), "--result", str(result)]
    environment = processes.environment(
        VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1"
    )
    if arguments.in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    begin = time.perf_counter()
    code = processes.run(command, environment, log, arguments.timeout, is_quiet=True)
    ending = "" if code == 0 else f"ended with {code}"
    if code is None:
        ending = f"did not end within {arguments.timeout} s and was killed"
    print(f"{side}: {time.perf_counter() - begin:.0f} s {ending}, log in {log}")
    if ending:
        print("  " + "\n  ".join(log.read_text(errors="replace").splitlines()[-40:]))
    found = json.loads(result.read_text()) if result.exists() else {}
    for name in cases_of(arguments):
        found.setdefault(name, {"refused": ending or "no result"})
    return found


def rows_of(name: str, case: Case, sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of results of one row; ours is the last, and has the ratio if there is another.

    Args:
        name: Of the row.
        case: What ran.
        sides: Side to its results.

    Raises:
        RefusalError: A side has none.
    """
    for side, found in sides.items():
        if "refused" in found:
            raise RefusalError(f"{side}: {found['refused']}")
    median = {side: percentiles(found["seconds"])[1] for side, found in sides.items()}
    rows = []
    for side, found in sides.items():
        p20, p50, p80 = percentiles(found["seconds"])
        ratio = None
        if side == OURS and len(sides) == 2:
            (theirs,) = (seconds for other, seconds in median.items() if other != OURS)
            ratio = theirs / p50
        ours = ratio is not None
        reached = ""
        if ratio is not None:
            reached = "aim" if ratio >= case.aim else "must" if ratio >= case.must else "missed"
        tokens = case.requests * (case.prompt_tokens + case.output_tokens)
        rows.append(
            {
                "row": name,
                "requests": case.requests,
                "prompt_tokens": case.prompt_tokens,
                "output_tokens": case.output_tokens,
                "side": side,
                "runs": len(found["seconds"]),
                "s_p20": round(p20, 4),
                "s_p50": round(p50, 4),
                "s_p80": round(p80, 4),
                "tokens_per_s": round(tokens / p50, 1),
                "ratio": round(ratio, 3) if ratio is not None else None,
                "ratio_floor": case.ratio_floor if ours else None,
                "must": case.must if ours else None,
                "aim": case.aim if ours else None,
                "reached": reached,
                "cudagraph_mode": found["cudagraph_mode"],
                "replays": " ".join(map(str, found["replays"])),
                "max_num_batched_tokens": found["max_num_batched_tokens"],
                "max_num_seqs": found["max_num_seqs"],
                "async_scheduling": found["async_scheduling"],
                "block_size": found["block_size"],
                "model_runner": found["model_runner"],
                "counted": found["counted"],
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        f"\n{'row':18} {'side':11} {'s p50':>9} {'tokens/s':>10} {'ratio':>7} {'floor':>6} "
        f"{'must':>5} {'aim':>5} {'reached':8} {'graphs':20} replays"
    )
    for row in rows:
        ratio, floor, must, aim = (
            "" if row[name] is None else row[name]
            for name in ("ratio", "ratio_floor", "must", "aim")
        )
        print(
            f"{row['row']:18} {row['side']:11} {row['s_p50']:9.3f} {row['tokens_per_s']:10,.0f} "
            f"{ratio:>7} {floor:>6} {must:>5} {aim:>5} {row['reached']:8} "
            f"{row['cudagraph_mode']:20} {row['replays']}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"of {', '.join(CASES)}, with commas between")
    parser.add_argument("--long", action="store_true", help="the row of 500,000 tokens too")
    parser.add_argument("--compile-mode", choices=("default", "none"), default="default")
    parser.add_argument("--max-num-batched-tokens", type=int, help="vLLM's default if not given")
    parser.add_argument("--max-num-seqs", type=int, help="vLLM's default if not given")
    parser.add_argument("--max-model-len", type=int, default=1 << 19)
    parser.add_argument("--cascade", help="options of the cascade as JSON; the defaults if not")
    parser.add_argument("--sides", help="backends with a comma between; a ratio needs both")
    parser.add_argument("--in-process", action="store_true", help="the engine in one process")
    parser.add_argument("--timeout", type=int, default=400, help="seconds that a side may take")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path)
    # Of a side's own process.
    for name in ("--side", "--model", "--result"):
        parser.add_argument(name, type=str if name == "--side" else Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    if arguments.tiny:
        arguments.max_model_len = TINY_LLAMA["max_position_embeddings"]
    elif arguments.output is None:
        arguments.output = OUTPUT
    if arguments.rows and not set(arguments.rows.split(",")) <= set(CASES):
        parser.error(f"rows are {', '.join(CASES)}")
    return arguments


def main() -> int:
    arguments = parse()
    sys.stdout.reconfigure(line_buffering=True)
    if arguments.side:
        run_side(arguments)
        return 0
    stated = conditions()
    print(in_words(stated))
    sides = ["CPU_ATTN" if arguments.tiny else "FLASH_ATTN", OURS]
    if arguments.sides:
        sides = arguments.sides.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = TINY_LLAMA if arguments.tiny else LLAMA
        (folder / "config.json").write_text(json.dumps(model))
        found = {side: start_side(side, arguments, folder) for side in sides}
    rows: list[dict[str, Any]] = []
    refused = []
    for name, case in cases_of(arguments).items():
        try:
            rows += rows_of(name, case, {side: found[side][name] for side in sides})
        except RefusalError as error:
            refused.append(name)
            print(f"{name} IS NOT REPORTED: {error}")
    if rows:
        report(rows)
        if arguments.output:
            write_rows(arguments.output, stated | {"compile_mode": arguments.compile_mode}, rows)
            print(f"\nwrote {arguments.output}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
