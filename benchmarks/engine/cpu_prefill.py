"""Time of prefill with the cascade and with vLLM's own CPU attention, side by side.

Part 1: a prompt of 2,000 tokens, under the budget of the default options, where both do the same
work. Both engines are up at the same time and take turns. Part 2: prompts of 4K to 32K tokens with
a budget of 2,048; the model's own limit is 8,192 tokens, so vLLM's attention stops there.

Nothing is reported unless both engines generate the same tokens under the budget in float32.

    python benchmarks engine.cpu_prefill            rewrites benchmarks/results/cpu_prefill.csv
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import prepare_model
from demo_engine import Completion, Engine
from records import RESULTS, commit, today, write_rows
from texts import king_james

OUTPUT = RESULTS / "cpu_prefill.csv"
SHORT = 2_000
LONG = (4_000, 8_000, 16_000, 32_000)
MODEL_LIMIT = 8_192
LONG_OPTIONS = {"cache_tokens": 2048, "num_sub_caches": 4, "stride": 256, "num_sink_tokens": 64}
CHECKED_TOKENS = 32
BASELINE, CASCADE = "CPU_ATTN", "CASCADE"


def machine() -> dict[str, Any]:
    """What a timing depends on: versions, commit, processor and threads."""
    import vllm

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": today(),
        "commit": commit(),
        "vllm": vllm.__version__,
        "torch": version("torch"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
    }


def row(
    part: str, backend: str, dtype: str, num_tokens: int, runs: Iterable[Completion]
) -> dict[str, Any]:
    """One line of results: the median of some runs of one prompt."""
    runs = list(runs)
    seconds = [run.prefill_s for run in runs]
    return {
        "part": part,
        "backend": backend,
        "dtype": dtype,
        "prompt_tokens": num_tokens,
        "repeats": len(runs),
        "prefill_s_median": round(median(seconds), 3),
        "prefill_s_min": round(min(seconds), 3),
        "prefill_s_max": round(max(seconds), 3),
        "ms_per_token": round(1e3 * median(seconds) / num_tokens, 4),
        "kv_blocks": runs[0].num_blocks,
        "kv_mib": round(runs[0].kv_bytes / 2**20, 1),
    }


def under_budget(tokens: list[int], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Time one prompt under the budget with both backends in turn.

    Raises:
        RuntimeError: in float32, the two backends generate different tokens.
    """
    prompt = tokens[:SHORT]
    runs: dict[str, list[Completion]] = {BASELINE: [], CASCADE: []}
    print(f"{dtype}: starting both engines")
    with (
        Engine(attention_backend=BASELINE, dtype=dtype) as baseline,
        Engine(attention_backend=CASCADE, dtype=dtype) as cascade,
    ):
        engines = {BASELINE: baseline, CASCADE: cascade}
        generated = {n: e.complete(prompt, CHECKED_TOKENS).token_ids for n, e in engines.items()}
        if dtype == "float32" and generated[BASELINE] != generated[CASCADE]:
            raise RuntimeError(f"no timing of wrong results; the tokens differ: {generated}")
        for number in range(repeats):
            for name, engine in engines.items():
                runs[name].append(engine.complete(prompt, 2))
                seconds = runs[name][-1].prefill_s
                print(f"{dtype}, {SHORT:,} tokens, {name}, run {number + 1}: {seconds:.2f} s")
    return [row("under budget", name, dtype, SHORT, done) for name, done in runs.items()]


def beyond_budget(tokens: list[int], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Time prompts far longer than the budget, the shortest first."""
    rows = []
    for name in (BASELINE, CASCADE):
        limit = MODEL_LIMIT if name == BASELINE else max(LONG) + 64
        options: dict[str, Any] = {"block_size": 32, "max_model_len": limit}
        if name == CASCADE:
            options["additional_config"] = {"cascade": LONG_OPTIONS}
        print(f"{dtype}: starting the engine with {name}")
        with Engine(attention_backend=name, dtype=dtype, **options) as engine:
            for length in LONG:
                if length > limit:
                    break
                done = []
                for number in range(repeats):
                    done.append(engine.complete(tokens[:length], 2))
                    seconds = done[-1].prefill_s
                    print(f"{dtype}, {length:,} tokens, {name}, run {number + 1}: {seconds:.2f} s")
                rows.append(row("beyond budget", name, dtype, length, done))
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the two tables that the results are read from."""
    short = [r for r in rows if r["part"] == "under budget"]
    print(f"\nprefill of {SHORT:,} tokens under the budget, median seconds")
    for dtype in dict.fromkeys(r["dtype"] for r in short):
        baseline, cascade = (
            next(r["prefill_s_median"] for r in short if (r["dtype"], r["backend"]) == (dtype, b))
            for b in (BASELINE, CASCADE)
        )
        ratio = cascade / baseline
        print(f"  {dtype}: {BASELINE} {baseline:.2f}, {CASCADE} {cascade:.2f}, ratio {ratio:.2f}")
    print("\nprefill beyond a budget of 2,048 tokens (`next`: ms a token since the row above)")
    print(f"  {'backend':10} {'tokens':>7} {'seconds':>8} {'ms/token':>9} {'next':>6} {'KV':>10}")
    before = {"backend": ""}
    for r in (r for r in rows if r["part"] == "beyond budget"):
        new = "-"
        if r["backend"] == before["backend"]:
            seconds = r["prefill_s_median"] - before["prefill_s_median"]
            new = f"{1e3 * seconds / (r['prompt_tokens'] - before['prompt_tokens']):.2f}"
        print(
            f"  {r['backend']:10} {r['prompt_tokens']:7,} {r['prefill_s_median']:8.2f}"
            f" {r['ms_per_token']:9.2f} {new:>6} {r['kv_mib']:6.0f} MiB"
        )
        before = r


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of part 1; part 2: a third of it")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    # Where the output goes to a file, progress is to be seen there all the same.
    sys.stdout.reconfigure(line_buffering=True)
    prepare_model.prepare()
    conditions = machine()
    if conditions["load_before"] > 0.5:
        print(
            f"warning: the machine is busy (load {conditions['load_before']}), timings will be off"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_model.FOLDER)
    tokens = tokenizer(king_james()[: 8 * max(LONG)])["input_ids"][: max(LONG)]
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows += under_budget(tokens, dtype, arguments.repeats)
    rows += beyond_budget(tokens, "bfloat16", max(1, arguments.repeats // 3))
    report(rows)
    write_rows(arguments.output, conditions, rows)
    print(f"\nwrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
