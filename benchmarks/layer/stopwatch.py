"""The time of a run, by the device's clock and by the host's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def once(run: Callable[[], object], has_gpu: bool) -> tuple[float, float]:
    """Milliseconds of a run, and of the host until all of it was queued.

    Args:
        run: What is timed.
        has_gpu: Whether it works on a CUDA device; else both are the host's time.
    """
    if not has_gpu:
        begin = time.perf_counter()
        run()
        ms = 1e3 * (time.perf_counter() - begin)
        return ms, ms
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    run()
    end.record()
    host_ms = 1e3 * (time.perf_counter() - begin)
    end.synchronize()
    return start.elapsed_time(end), host_ms
