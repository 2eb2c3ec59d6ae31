"""Host time of a wave of prefill in one layer: the first of a step, the others, as Triton launches.

python benchmarks tune.host            prints a table
python benchmarks tune.host --tiny     small sizes, for the interpreter, which launches nothing
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton

from layer.driver import Driver, Inputs, make_config
from vllm_cascade.attention.gpu_workspace import Shape
from vllm_cascade.kernels import kv_write
from vllm_cascade.kernels.decode import launch_config as decode_launch
from vllm_cascade.kernels.merge import groups as compaction
from vllm_cascade.kernels.merge import means
from vllm_cascade.kernels.prefill import attention as prefill_attention
from vllm_cascade.kernels.prefill import scores as key_scores
from vllm_cascade.kernels.prefill import workspace as prefill_workspace

MODULES = (
    compaction,
    decode_launch,
    key_scores,
    kv_write,
    means,
    prefill_attention,
    prefill_workspace,
)
# Query heads, KV heads, budget, stride, tokens of a chunk: Llama-3.1-8B on a rank of four and on a
# GPU alone, SmolLM2-135M with a short stride.
CASES = [(8, 2, 4096, 1024, 8192), (32, 8, 16384, 1024, 8192), (9, 3, 1024, 128, 2048)]
TINY = [(2, 1, 128, 64, 128)]


def through_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """What `kernels.launch.launch` stands for."""
    kernel[grid](*args, **meta)


THEIRS = {
    "launch": through_triton,
    "cdiv": triton.cdiv,
    "next_power_of_2": triton.next_power_of_2,
}


@contextlib.contextmanager
def as_triton_has_them() -> Iterator[None]:
    """Let the kernels' modules use Triton's own launches and arithmetic."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, theirs in THEIRS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, theirs))
        yield


def microseconds(driver: Driver, inputs: Inputs, repeats: int, *, anew: bool) -> str:
    """Median host time of a wave until its launches are made, and until the device is done.

    Args:
        driver: The layer.
        inputs: A chunk.
        repeats: How often it is timed.
        anew: Whether as the first layer of a step, which the others repeat.
    """
    num_tokens = len(inputs.query)
    full = driver.config.num_sink_tokens + driver.config.cache_tokens + driver.config.stride
    start = -(-full // num_tokens) * num_tokens
    metadata = driver.plan(driver.step((0, start, start + num_tokens)))
    rows = inputs.rows(0, num_tokens)
    host, whole = [], []
    for number in range(repeats + 3):
        if anew:
            metadata.recordings.clear()
        begin = time.perf_counter()
        driver.forward(metadata, *rows)
        launched = time.perf_counter()
        if driver.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            host.append(1e6 * (launched - begin))
            whole.append(1e6 * (time.perf_counter() - begin))
    waves = sum(len(each.launches) for each in metadata.rounds)
    return f"{statistics.median(host) / waves:.0f} ({statistics.median(whole) / waves:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{'heads':>8} {'budget':>7} {'stride':>7}   us a wave, with the device's time")
    for num_heads, num_kv_heads, budget, stride, chunk in TINY if arguments.tiny else CASES:
        options = {"cache_tokens": budget, "num_sub_caches": 4, "stride": stride}
        if arguments.tiny:
            options |= {"num_sub_caches": 2, "num_sink_tokens": 16, "selection_window": 32}
        shape = Shape(num_heads, num_kv_heads, 16 if arguments.tiny else 128, dtype)
        driver = Driver(make_config(1 << 18, **options), shape, chunk, 1, device)
        driver.fill()
        inputs = Inputs.random(shape, chunk, device)
        repeats = 1 if arguments.tiny else 20
        for turn in range(1 if arguments.tiny else 2):
            with as_triton_has_them():
                theirs = microseconds(driver, inputs, repeats, anew=True)
            first = microseconds(driver, inputs, repeats, anew=True)
            others = microseconds(driver, inputs, repeats, anew=False)
            print(
                f"{num_heads:>5}/{num_kv_heads:<2} {budget:>7} {stride:>7}   {turn + 1}: "
                f"Triton's {theirs}, a first layer {first}, another {others}"
            )


if __name__ == "__main__":
    main()
