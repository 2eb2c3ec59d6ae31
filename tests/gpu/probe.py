"""What an engine in the test's own process does in each step, seen from outside."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


@dataclass
class Steps:
    """What was counted.

    Args:
        plans: Per step, the requests in the batch if any of them has a single token, else 0; and
            the rounds that its chunks take.
        forwards: Calls of a layer from Python.
        replays: CUDA graphs replayed.
    """

    plans: list[tuple[int, int]] = field(default_factory=list)
    forwards: int = 0
    replays: int = 0

    @property
    def decodes(self) -> int:
        """Steps that had single tokens only."""
        return sum(not rounds for _, rounds in self.plans)


@contextlib.contextmanager
def watched(*, forbid_sync: bool = False) -> Iterator[Steps]:
    """Count the steps of the engine while the block runs.

    Args:
        forbid_sync: Whether planning a step and a layer's forward pass may not wait for the device.
    """
    from vllm_cascade.attention.builder import CascadeMetadataBuilder
    from vllm_cascade.attention.gpu_layer import GpuLayer

    steps = Steps()

    def guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not forbid_sync:
            return function(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    build, forward = CascadeMetadataBuilder.build, GpuLayer.forward
    replay = torch.cuda.CUDAGraph.replay

    def watched_build(*args: Any, **kwargs: Any) -> Any:
        plan = guarded(build, *args, **kwargs)
        requests = 0 if plan.decode is None else len(plan.decode.slots)
        steps.plans.append((requests, len(plan.rounds)))
        return plan

    def watched_forward(*args: Any, **kwargs: Any) -> None:
        steps.forwards += 1
        guarded(forward, *args, **kwargs)

    def watched_replay(graph: torch.cuda.CUDAGraph) -> None:
        steps.replays += 1
        guarded(replay, graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CascadeMetadataBuilder, "build", watched_build)
        patch.setattr(GpuLayer, "forward", watched_forward)
        patch.setattr(torch.cuda.CUDAGraph, "replay", watched_replay)
        yield steps


@contextlib.contextmanager
def compiled_anew() -> Iterator[list[str]]:
    """The cascade's kernels that are compiled while the block runs, as in a process that starts."""
    import triton

    import vllm_cascade.attention.gpu_layer  # noqa: F401
    from vllm_cascade.kernels import launch

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_cascade.kernels."):
            for each in vars(module).values():
                if isinstance(each, triton.JITFunction):
                    each.device_caches.clear()
    names: list[str] = []
    hook = triton.knobs.runtime.jit_post_compile_hook

    def note(*args: Any, fn: Any, **kwargs: Any) -> Any:
        if fn.jit_function.fn.__module__.startswith("vllm_cascade."):
            names.append(fn.name.rpartition(".")[2])
        return None if hook is None else hook(*args, fn=fn, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_variants", {})
        patch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
        yield names
