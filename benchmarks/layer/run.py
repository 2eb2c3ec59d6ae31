"""Time of one attention layer with the cascade and with others' attention, in the same run.

Llama-3.1-8B's attention: 32 query heads, 8 KV heads of 128 channels, bfloat16, pages of 16 tokens,
policy "distinct". The cascade's side is all that a layer does in the engine: KV write, rotation,
attention, selection and compaction, and the planning of each step besides. The
baselines get their queries and keys rotated and write no pages.

Nothing is reported unless the layer agrees with the float64 oracle first, and no row unless the
device counters of its timed runs (groups merged, tokens dropped, no pair scored) are what the
layout predicts, and baselines beyond 262,144 tokens lie within 5% of their quadratic extrapolation.

    python benchmarks layer.run            rewrites benchmarks/results/gpu_layer.csv
    python benchmarks layer.run --tiny     every path at a size for Triton's interpreter
    python benchmarks layer.run --profile  time by kernel, nothing written
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

TINY = "--tiny" in sys.argv
if TINY and not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from layer.baselines import MissingError  # noqa: E402
from layer.bench import FULL, SMALL, Bench  # noqa: E402
from layer.driver import check_against_oracle  # noqa: E402
from layer.rows import Row, decode_case, rows_of  # noqa: E402
from records import RESULTS, RefusalError, conditions, in_words, write_rows  # noqa: E402

OUTPUT = RESULTS / "gpu_layer.csv"


def profile(bench: Bench) -> None:
    """Print the time of each kernel over 16 strides past the budget, and over a decode step."""
    from torch.profiler import ProfilerActivity

    driver = bench.driver()
    start = driver.layout.epochs[min(4, len(driver.layout.epochs) - 1)].start
    end = min(start + 16 * driver.config.stride, bench.sizes.long)
    driver.prefill(driver.chunks(end, bench.sizes.chunk), bench.inputs)
    cuts = [*range(start, end, bench.sizes.chunk), end]
    steps = [driver.step((0, *cut)) for cut in itertools.pairwise(cuts)]
    case = decode_case(bench)
    metadata = case.driver.plan(case.step)
    parts: dict[str, Callable[[], object]] = {
        f"prefill, tokens {start:,} to {end:,}": lambda: driver.prefill(steps, bench.inputs),
        f"decode, {len(case.step.spans)} requests of {case.length:,} keys": lambda: case.forward(
            metadata
        ),
    }
    kind = torch.autograd.DeviceType.CUDA if bench.has_gpu else torch.autograd.DeviceType.CPU
    activity = ProfilerActivity.CUDA if bench.has_gpu else ProfilerActivity.CPU
    for name, run in parts.items():
        run()
        (ms,) = bench.measure(run, 1)
        with torch.profiler.profile(activities=[activity]) as profiler:
            run()
            if bench.has_gpu:
                torch.cuda.synchronize()
        found = [
            (e.self_device_time_total if bench.has_gpu else e.self_cpu_time_total, e)
            for e in profiler.key_averages()
            if e.device_type == kind
        ]
        total = sum(us for us, _ in found) or 1.0
        print(f"\n{name}: {ms:.3f} ms, kernels {total / 1e3:.3f} ms")
        print(f"  {'ms':>9} {'share':>6} {'calls':>6} {'us each':>9}  kernel")
        for us, event in sorted(found, key=lambda pair: -pair[0])[:25]:
            print(
                f"  {us / 1e3:9.3f} {us / total:6.1%} {event.count:6d} {us / event.count:9.1f}"
                f"  {event.key[:90]}"
            )


def report(rows: list[Row]) -> None:
    """Print the table."""
    print(f"\n{'row':22} {'tokens':>9} {'side':28} {'ms p50':>10} {'floor':>9} "
          f"{'ratio':>8} {'at floor':>8} {'must':>6} {'aim':>6} reached")  # fmt: skip
    for row in rows:
        cells = [row[c] if row[c] is not None else "" for c in ("floor_ms", "ratio", "ratio_floor")]
        bounds = [row[c] if row[c] is not None else "" for c in ("must", "aim")]
        print(
            f"{row['row']:22} {row['tokens']:9,} {row['side']:28} {row['ms_p50']:10.4g} "
            f"{cells[0]:>9} {cells[1]:>8} {cells[2]:>8} {bounds[0]:>6} {bounds[1]:>6} "
            f"{row['reached']} {row['note']}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove the program")
    parser.add_argument("--rows", help="names with commas between; all by default")
    parser.add_argument("--long", action="store_true", help="time FlashAttention-2 at 1M, once")
    parser.add_argument("--chunk", type=int, help="tokens of an engine step")
    parser.add_argument("--profile", action="store_true", help="time by kernel, and nothing else")
    parser.add_argument("--no-check", action="store_true", help="with --profile: no oracle")
    parser.add_argument("--output", type=Path, default=None if TINY else OUTPUT)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("PyTorch sees no CUDA device; --tiny runs without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = SMALL if arguments.tiny else FULL
    if arguments.chunk:
        if arguments.chunk < sizes.narrow["stride"]:
            parser.error("a step must have room for a stride")
        sizes = replace(sizes, chunk=arguments.chunk)
    choices = rows_of(sizes)
    chosen = arguments.rows.split(",") if arguments.rows else list(choices)
    if unknown := set(chosen) - set(choices):
        parser.error(f"no such rows: {sorted(unknown)}; there are {', '.join(choices)}")
    stated = conditions()
    print(in_words(stated))

    begin = time.perf_counter()
    with torch.inference_mode():
        if not (arguments.profile and arguments.no_check):
            found = check_against_oracle(
                sizes.shape, *sizes.checked, device, **sizes.checked_cascade
            )
            print(f"agrees with the float64 oracle ({time.perf_counter() - begin:.0f} s): {found}")
        bench = Bench(sizes, device, arguments.long)
        if arguments.profile:
            profile(bench)
            return 0
        rows, refused = [], []
        for name in chosen:
            try:
                rows += choices[name](bench, name)
                print(f"{time.perf_counter() - begin:6.0f} s: {name} done")
                if arguments.output:
                    write_rows(arguments.output, stated, rows)
            except MissingError as error:
                print(f"{name} is left out: {error}")
            except RefusalError as error:
                refused.append(name)
                print(f"{name} IS NOT REPORTED: {error}")
            except Exception:
                # The other rows may still be had on a machine that is not there for long.
                refused.append(name)
                print(f"{name} IS NOT REPORTED, it broke:\n{traceback.format_exc()}")
    if rows:
        report(rows)
    if arguments.output and rows:
        print(f"\nwrote {arguments.output}")
    if refused:
        print(f"not reported: {', '.join(refused)}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
