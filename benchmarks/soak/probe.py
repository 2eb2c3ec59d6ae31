"""What the soak puts into the engine: weights that answer, a scheduler that counts, readings.

vLLM imports this module in the engine's process, by the names that `AsyncEngineArgs` is given.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

LOAD_FORMAT = "soak"
# The engine's scheduler; the worker, in the same process, reads it.
watched: list[Any] = []


@register_model_loader(LOAD_FORMAT)
class NormalLoader(DummyModelLoader):
    """Weights by which every layer has its say in the logits; vLLM's own dummies are near zero."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(model_config.seed)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.data.fill_(1)
                continue
            # Attention sharp enough that single tokens matter.
            gain = 1.5 if "qkv_proj" in name else 1.0
            scale = 1.0 if "embed_tokens" in name else gain * weight.shape[-1] ** -0.5
            weight.data.normal_(0, scale, generator=generator)


class Counting:
    """A part of vLLM's scheduler that counts what it does to requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts: Counter[str] = Counter()
        self.preempted: set[str] = set()
        watched[:] = [self]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        step = super().schedule(*args, **kwargs)
        lengths = step.num_scheduled_tokens.values()
        if lengths and min(lengths) == 1 < max(lengths):
            self.counts["mixed_steps"] += 1
        return step

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        before = {name: phase(request) for name, request in self.requests.items()}
        ended = super().finish_requests(request_ids, finished_status)
        self.counts.update(f"aborted_in_{before[request.request_id]}" for request in ended)
        return ended

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.preempted.add(request.request_id)
        super()._preempt_request(request, *args, **kwargs)


def phase(request: Any) -> str:
    """Where a request is: in the queue, in the middle of prefill, or in decode."""
    if request.num_output_tokens:
        return "decode"
    return "prefill" if 0 < request.num_computed_tokens < request.num_prompt_tokens else "queue"


class CountingScheduler(Counting, Scheduler):
    """vLLM's scheduler, counting."""


class CountingAsyncScheduler(Counting, AsyncScheduler):
    """vLLM's scheduler where scheduling is asynchronous, counting."""


def scheduler_state() -> dict[str, Any]:
    """What the scheduler holds and has counted; in the engine core's own process."""
    (scheduler,) = watched
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    (cascade,) = manager.coordinator.single_type_managers
    return {
        "pool_blocks": pool.num_gpu_blocks - 1,  # one is vLLM's null block
        "free_blocks": pool.get_num_free_blocks(),
        "held": {
            "requests": len(scheduler.requests),
            "rows of blocks": len(cascade.req_to_blocks),
            "records of requests": len(cascade._progress),
        },
        "in_prefill": [r.request_id for r in scheduler.running if phase(r) == "prefill"],
        "counts": dict(scheduler.counts),
        "preempted": sorted(scheduler.preempted),
    }


class Probe:
    """What is asked of vLLM's worker."""

    def soak_prepare(self) -> None:
        """Fill every page with NaN: what was never written must never be read."""
        for cache in self.model_runner.kv_caches:
            flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
            flat.set_(cache.untyped_storage())
            flat.fill_(255)

    def soak_memory(self) -> dict[str, int]:
        """The memory of the worker's process, in bytes."""
        on_gpu = torch.cuda.is_available()
        return {
            "engine": psutil.Process().memory_info().rss,
            "device": torch.cuda.memory_allocated() if on_gpu else 0,
        }

    def soak_state(self) -> dict[str, Any]:
        """`scheduler_state` and the memory of the process, which is the engine core's too."""
        return scheduler_state() | {"memory": self.soak_memory()}


class RanksExecutor(MultiprocExecutor):
    """Ranks in processes of their own: of the scheduler the engine core's process knows alone."""

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method != "soak_state":
            return super().collective_rpc(method, *args, **kwargs)
        ranks = super().collective_rpc("soak_memory", *args, **kwargs)
        memory = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
        memory["engine"] += psutil.Process().memory_info().rss
        return [scheduler_state() | {"memory": memory}]
