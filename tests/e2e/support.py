"""Engines inside the test's own process, and what the tests read from their pages."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"


def model_folder() -> str:
    """The folder of SmolLM2-135M-Instruct; its absence is a failure, not a skip."""
    if not (MODEL / "config.json").exists():
        pytest.fail(f"{MODEL} is missing: run `make model`")
    return str(MODEL)


@contextlib.contextmanager
def engine(cascade: dict[str, Any] | None, model: str | None = None, **options: Any) -> Iterator:
    """An `LLM` whose scheduler and worker live in this process.

    Args:
        cascade: The cascade's options, or None for vLLM's own attention.
        model: Model folder; SmolLM2 unless given.
        options: For `LLM`; eager float32, and a pool of pages that is made fast, unless given.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if cascade is not None:
        options = {
            "attention_backend": "CASCADE",
            "additional_config": {"cascade": cascade},
            **options,
        }
    options = {"dtype": "float32", "enforce_eager": True, "seed": 0, **options}
    if not torch.cuda.is_available():
        options = {"kv_cache_memory_bytes": (64 if model else 512) << 20, **options}
    elif "gpu_memory_utilization" not in options:
        # vLLM does not look for free memory then: other tests may run beside this one.
        options = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # It would overrule the option.
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        try:
            llm = LLM(model or model_folder(), **options)
        except Exception:
            # An engine that did not start leaves its process groups behind.
            cleanup_dist_env_and_memory()
            raise
        try:
            yield llm
        finally:
            impls = impls_of(llm)
            llm.llm_engine.engine_core.shutdown()
            # The engine outlives this block in its caller, and views keep a pool alive.
            for impl in impls:
                impl.pages = None
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def core_of(llm: Any) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def impls_of(llm: Any) -> list[Any]:
    """What attends in each layer of an in-process engine, in order."""
    layers = runner_of(llm).compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if hasattr(layer, "impl")]


def cascade_manager_of(llm: Any) -> Any:
    """The KV cache manager of an in-process engine's cascade layers."""
    managers = core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    return next(manager for manager in managers if hasattr(manager, "continued_by"))


@contextlib.contextmanager
def poisoned(llm: Any) -> Iterator[None]:
    """Fill every page with NaN, its tail included, and every block again when it is handed out."""
    pools, num_blocks = [], core_of(llm).scheduler.kv_cache_config.num_blocks
    for cache in runner_of(llm).kv_caches:
        flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
        flat.set_(cache.untyped_storage())
        flat.fill_(255)
        stride = cache.stride(0) * cache.element_size() * cache.shape[0] // num_blocks
        start = cache.storage_offset() * cache.element_size()
        pools.append(flat.as_strided((num_blocks, stride), (stride, 1), start))
    manager = cascade_manager_of(llm)
    original = manager.allocate_new_blocks

    def allocate_new_blocks(*args: Any) -> Any:
        blocks = original(*args)
        if blocks:
            for pool in pools:
                pool[[block.block_id for block in blocks]] = 255
        return blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "allocate_new_blocks", allocate_new_blocks)
        yield


class KeptLog:
    """What every layer held after every merge, per request, read from the pages.

    Merges inside a CUDA graph are not seen: on a GPU the engine has to be eager.
    """

    def __init__(self, llm: Any) -> None:
        self._manager = cascade_manager_of(llm)
        self._impls = [impl for impl in impls_of(llm) if hasattr(impl, "pages")]
        self._on_gpu = runner_of(llm).device.type != "cpu"
        self.config = self._impls[0].config
        # (request, tokens computed) -> layer -> [num_kv_heads, kept]
        self.kept: dict[tuple[str, int], dict[int, torch.Tensor]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[KeptLog]:
        """Record while the block runs."""
        if self._on_gpu:
            from vllm_cascade.attention.gpu_layer import GpuLayer
            from vllm_cascade.kernels.merge import groups as compaction

            forward = GpuLayer.forward

            def anew(layer: GpuLayer, *args: Any) -> None:
                # Else layers repeat what the first one launched, and nothing is called.
                *_, metadata, _ = args
                metadata.recordings.clear()
                forward(layer, *args)
        else:
            from vllm_cascade.kernels.cpu import merge as compaction
        original = compaction.merge_groups

        def merge_groups(pages: Any, merges: Any, *args: Any, **kwargs: Any) -> None:
            original(pages, merges, *args, **kwargs)
            self._note(pages, self._held(merges) if self._on_gpu else merges.held)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compaction, "merge_groups", merge_groups)
            if self._on_gpu:
                patch.setattr(GpuLayer, "forward", anew)
            yield self

    def _held(self, merges: Any) -> list[torch.Tensor]:
        """The blocks of each row that merges, in logical order; all of them are full."""
        num_blocks = merges.num_keys // self.config.block_size
        return [
            merges.block_table[row, : int(num_blocks[row])]
            for row, groups in enumerate(merges.num_groups.tolist())
            if groups
        ]

    def _note(self, pages: Any, all_held: list[torch.Tensor]) -> None:
        from vllm_cascade.attention.trace import kept_in
        from vllm_cascade.structure.layout import build_layout

        layer = next(i for i, impl in enumerate(self._impls) if impl.pages is pages)
        parts = self._manager._parts
        owners = {
            blocks[0].block_id * parts: (request, blocks)
            for request, blocks in self._manager.req_to_blocks.items()
            if blocks
        }
        for held in all_held:
            request, blocks = owners[int(held[0])]
            end = int(pages.token[int(held[-1]), 0, -1]) + 1
            row = torch.tensor([b.block_id for b in blocks], dtype=torch.int32)
            row = (row[:, None] * parts + torch.arange(parts)).flatten().numpy()
            kept = kept_in(pages, build_layout(self.config), row, end)
            self.kept.setdefault((request, end), {})[layer] = kept.long().cpu().clone()

    def of(self, request: str) -> dict[int, torch.Tensor]:
        """Boundary k -> int64 [num_layers, num_kv_heads, kept] of one request.

        Args:
            request: Id of the request, as in its `RequestOutput`.
        """
        sinks, stride = self.config.num_sink_tokens, self.config.stride
        found = {}
        for (owner, end), layers in self.kept.items():
            # vLLM appends a random suffix to the ids inside the engine.
            if owner == request or owner.startswith(f"{request}-"):
                assert sorted(layers) == list(range(len(self._impls)))
                ordered = torch.stack([layers[i] for i in range(len(self._impls))])
                found[(end - sinks) // stride] = ordered
        return found


def book_tokens(count: int, start: int = 0) -> list[int]:
    """Consecutive tokens of the King James Bible, from its `start`-th; over 30,000 in all."""
    tokens = _book()
    assert start + count <= len(tokens)
    return tokens[start : start + count]


@functools.cache
def _book() -> list[int]:
    from transformers import AutoTokenizer

    from texts import king_james

    return AutoTokenizer.from_pretrained(model_folder())(king_james()[:150_000])["input_ids"]


def license_tokens(count: int, start: int = 0) -> list[int]:
    """Consecutive tokens of this repository's LICENSE, from its `start`-th; over 2,000 in all."""
    from transformers import AutoTokenizer

    text = (ROOT / "LICENSE").read_text()
    tokens = AutoTokenizer.from_pretrained(model_folder())(text)["input_ids"]
    assert start + count <= len(tokens)
    return tokens[start : start + count]
