"""Time of preparing a wave of prefill, and of the boundary after it, by tile sizes.

One attention layer of Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128, bfloat16, blocks of
16 tokens in random order. A wave of `own` tokens finds `prefix` keys in the pages. Microseconds are
the median over replays of a CUDA graph of 10 launches; GB/s counts what is read and written once.

    python benchmarks tune.prepare
    python benchmarks tune.prepare --tiny  # in Triton's interpreter, no timings
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from layer.bench import FULL, SMALL, Bench  # noqa: E402
from layer.driver import Driver, Inputs, make_config  # noqa: E402
from records import percentiles  # noqa: E402
from vllm_cascade.kernels.merge import groups as compaction  # noqa: E402
from vllm_cascade.kernels.prefill import workspace as prefill_workspace  # noqa: E402
from vllm_cascade.kernels.weights import Weights  # noqa: E402

# Tokens of a program, of a segment's own and of those in the pages, and warps.
TILES = [(16, 16, 4), (32, 32, 4), (16, 16, 2), (32, 32, 8)]


def main() -> int:
    device = torch.device("cpu" if TINY else "cuda")
    sizes = SMALL if TINY else FULL
    bench = Bench(sizes, device, False)
    waves = [(64, 64)] if TINY else [(1024, 16_448), (4096, 16_448), (1024, 4_160), (8192, 0)]
    inputs = Inputs.random(sizes.shape, max(own for own, _ in waves), device)
    for own, budget in waves:
        if budget:
            options = {**sizes.narrow, "cache_tokens": budget - 64, "stride": own}
            config = make_config(sizes.long, **(options if not TINY else sizes.narrow))
        else:
            config = make_config(own, cache_tokens=own, num_sub_caches=2)
        driver = Driver(config, sizes.shape, own, 1, device)
        driver.fill()
        epoch = driver.layout.epochs[len(driver.layout.epochs) // 2]
        (each,) = driver.plan(driver.step((0, epoch.start, epoch.end))).rounds
        (launch,), layer, segments = each.launches, driver.layer, each.segments
        prefix = segments.max_prefix_len
        shape, size = sizes.shape, sizes.shape.dtype.itemsize
        rows = 2 * own * shape.num_heads + (own * 6 + prefix * 4) * shape.num_kv_heads
        moved = rows * shape.head_size * size
        print(f"\nown {own:,}, prefix {prefix:,}: {moved / 1e6:.0f} MB, groups {len(epoch.groups)}")

        def prepare(weights, layer=layer, each=each, launch=launch, driver=driver) -> None:
            layer.weights = weights
            rows = layer._rows(each.segments)
            own = inputs.rows(0, each.segments.num_queries)[:3]
            unmerged = replace(each, launches=(replace(launch, merges=None),))
            layer._prepare(*own, driver.pages, unmerged, rows)

        def merge(has_sums: bool, layer=layer, launch=launch, driver=driver) -> None:
            layer.weights = Weights(0.0, 1.0, 1.0)
            layer._merge(driver.pages, launch.merges, has_sums=has_sums)

        def time(name: str, run, moved: int = moved) -> None:
            times = 1 if TINY else 10
            replay = bench.graph(run, times)
            replay()
            us = percentiles([1e3 / times * ms for ms in bench.measure(replay, times)])[1]
            print(f"  {name:44} {us:8.1f} us {moved / us / 1e3:7.0f} GB/s", flush=True)

        for tiles, summed in itertools.product(TILES, (False, True)):
            names = ("OWN_TOKENS", "PAGE_TOKENS", "NUM_WARPS")
            for name, value in zip(names, tiles, strict=True):
                setattr(prefill_workspace, name, value)
            weights = Weights(float(not summed), float(summed), float(summed))
            what = "with sums" if summed else "without"
            time("own {}, page {}, {} warps, ".format(*tiles) + what, lambda w=weights: prepare(w))
            driver.workspace.merge.sums.zero_()
        if launch.merges is None:
            continue
        time("merge", lambda: merge(True), 0)
        time("sums and merge", lambda: merge(False), 0)
        if TINY:
            continue
        base = compaction.launch_config(shape.head_size, size, config.group_tokens)
        original = compaction.launch_config
        for change in ({"group_keys": 64}, {"group_keys": 16}):
            changed = replace(base, **change)
            compaction.launch_config = lambda *_, config=changed: config
            time(f"merge, {change}", lambda: merge(True), 0)
        for change in ({"sum_keys": 64}, {"sum_warps": 8}):
            changed = replace(base, **change)
            compaction.launch_config = lambda *_, config=changed: config
            time(f"sums and merge, {change}", lambda: merge(False), 0)
        compaction.launch_config = original
    return 0


if __name__ == "__main__":
    sys.exit(main())
