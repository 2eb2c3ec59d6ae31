"""Times the merging of groups in one layer of Llama-3.1-8B: steps without and with a boundary.

python benchmarks tune.merge                       prints a table
python benchmarks tune.merge --set sum_warps=8      the same with another tile
python benchmarks tune.merge --tiny                small sizes, for the interpreter
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import triton

from vllm_cascade.kernels.merge.groups import make_scratch, merge_groups
from vllm_cascade.kernels.merge.launch_config import PROGRAMS_PER_SM, LaunchConfig, launch_config
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import Weights

NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, WINDOW = 8, 128, 16, 128
GROUP_BLOCKS = WINDOW // BLOCK_SIZE
# Policies "distinct" and "blend", and scores alone.
WEIGHTS = (Weights(0.0, 1.0, 1.0), Weights(1.0, 1.0, 1.0), Weights(1.0, 0.0, 0.0))
CALLS, REPEATS = 100, 20


def make_step(
    num_rows: int,
    num_groups: int,
    num_keys: int,
    copies: int,
    has_score: bool,
    device: torch.device,
) -> tuple[Pages, list[Merges]]:
    """Rows of `num_keys` keys, each with as many groups to merge, in shuffled blocks.

    Args:
        num_rows: Rows of a call.
        num_groups: Groups of each.
        num_keys: Keys each holds.
        copies: How many calls find other rows, lest the keys of the last call be in the L2 cache.
        has_score: Whether pages have scores behind keys and values.
        device: Where.
    """
    rows_of_a_call, num_rows = num_rows, num_rows * copies
    row_blocks = num_keys // BLOCK_SIZE
    num_blocks = num_rows * row_blocks
    slots = NUM_KV_HEADS * BLOCK_SIZE
    slot_size = 2 * HEAD_SIZE + 2 * has_score
    pool = torch.zeros(num_blocks, slots * slot_size, dtype=torch.bfloat16, device=device)
    kv = pool[:, : slots * 2 * HEAD_SIZE].view(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, -1)
    pages = Pages.view(kv, has_score, False)
    for start in range(0, num_blocks, 4096):
        kv[start : start + 4096].normal_()
    if pages.score is not None:
        pages.score.uniform_()
    table = torch.randperm(num_blocks, device=device).int().view(num_rows, row_blocks)
    max_groups = max(num_groups, 1)
    groups = table[:, : max_groups * GROUP_BLOCKS].reshape(num_rows, max_groups, GROUP_BLOCKS)
    counts = torch.full((num_rows,), num_groups, dtype=torch.int32, device=device)
    keys = torch.full((num_rows,), num_keys, dtype=torch.int32, device=device)
    everything = (groups.contiguous(), counts, table, keys)
    split = (tensor.split(rows_of_a_call) for tensor in everything)
    return pages, [Merges(*parts) for parts in zip(*split, strict=True)]


def microseconds(
    pages: Pages,
    merges: list[Merges],
    weights: Weights,
    config: LaunchConfig,
    programs_per_sm: int,
    calls: int,
) -> float:
    """Median time of a call: replays of a CUDA graph of several (0 without a CUDA device)."""
    device = pages.kv.device
    scratch = make_scratch(
        len(merges[0].num_groups),
        NUM_KV_HEADS,
        HEAD_SIZE,
        device,
        max_group=WINDOW,
        programs_per_sm=programs_per_sm,
    )

    def call(number: int) -> None:
        step = merges[number % len(merges)]
        merge_groups(pages, step, HEAD_SIZE, WINDOW, weights, scratch, config=config)

    call(0)
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=N", help="of LaunchConfig")
    parser.add_argument("--programs-per-sm", type=int, default=PROGRAMS_PER_SM)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = launch_config(HEAD_SIZE, 2, WINDOW)
    config = replace(
        config, **{name: int(n) for name, _, n in (pair.partition("=") for pair in arguments.set)}
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{config}, {arguments.programs_per_sm} programs per multiprocessor")

    # (what, rows, groups of each row, keys of each row). With C = 16,384 and N = 4, a stride of
    # S tokens merges S/128 + S/256 + S/512 groups.
    cases = [(f"no boundary, {rows} rows", rows, 0, 1024) for rows in (1, 64, 512)]
    cases += [
        ("boundary, S = 4,096, 1 row", 1, 56, 64 + 16384 + 4096),
        ("boundary, S = 1,024, 64 rows", 64, 14, 64 + 16384 + 1024),
    ]
    if arguments.tiny:
        cases = [("no boundary, 2 rows", 2, 0, 256), ("boundary, 1 row", 1, 1, 256)]
    print("| step | weights of score, key, value | us a call | MB read and written | GB/s |")
    print("|---|---|---|---|---|")
    for what, rows, num_groups, num_keys in cases:
        copies = 4 if num_groups and rows == 1 else 1
        for weights in WEIGHTS:
            has_score = weights.score > 0
            pages, merges = make_step(rows, num_groups, num_keys, copies, has_score, device)
            calls = CALLS if rows * num_groups < 500 else 5
            took = microseconds(pages, merges, weights, config, arguments.programs_per_sm, calls)
            key_bytes = NUM_KV_HEADS * HEAD_SIZE * 2
            # All of the means, what is compared with them, then half of K and V in and out.
            size = rows * num_groups * WINDOW * 2 * key_bytes
            for weight in (weights.key, weights.value):
                if weight and num_groups:
                    size += rows * (num_keys + num_groups * WINDOW) * key_bytes
            rate = f"{size / took / 1e3:,.0f}" if took else "-"
            named = ", ".join(f"{weight:g}" for weight in weights)
            print(f"| {what} | {named} | {took:,.2f} | {size / 1e6:,.1f} | {rate} |")
            del pages, merges


if __name__ == "__main__":
    main()
