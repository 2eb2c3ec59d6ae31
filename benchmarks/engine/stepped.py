"""An engine in this process that is stepped by hand, so that its block pool can be read."""

from __future__ import annotations

from typing import Any


class SteppedEngine:
    """The parts of an engine that are read between its steps; preemptions are counted.

    Args:
        llm: From vLLM.
    """

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.preemptions = 0
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers, measured: the pools' storage over their blocks."""
        storages = {}
        for cache in self.runner.kv_caches:
            storage = cache.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values()) // self.pool.num_gpu_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that requests can have; block 0 is no request's."""
        return self.pool.num_gpu_blocks - 1

    def held(self) -> int:
        """Blocks that requests hold."""
        return int(self.free_blocks - self.pool.get_num_free_blocks())
