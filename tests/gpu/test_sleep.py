"""Finds alone: what CASCADE keeps on a GPU and vLLM's sleep loses, or what is found after it.

Each engine is in a process of its own, because vLLM's memory that sleeps allows one a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from e2e.test_continuation import MODEL, MORE, PROMPT, TEXT, check_alike, run, tokens_of
from e2e.tiny import ELASTIC, save_llama
from gpu.test_graphs import graphs

pytestmark = pytest.mark.gpu

# Under the budget and far past it, and no prefix of one another.
PROMPTS = [TEXT[1:101], PROMPT, PROMPT[30:430]]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
NEEDS_FP8 = pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device with FP8")


class Forgetful:
    """A worker whose memory holds NaN, and integers -1, where sleep has copied nothing."""

    def forget_what_sleeps(self) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator, libcudart

        allocator = CuMemAllocator.get_instance()
        original, self.lost_bytes = allocator.wake_up, Counter[str]()

        def wake_up(tags: list[str] | None = None) -> None:
            asleep = [each for each in allocator.pointer_to_data.items() if each[1].is_asleep]
            lost = [each for each in asleep if each[1].cpu_backup_tensor is None]
            original(tags)
            for pointer, data in lost:
                if not data.is_asleep:
                    libcudart.cudaMemset(pointer, 255, data.handle[1])
                    self.lost_bytes[data.tag] += data.handle[1]
            torch.cuda.synchronize()

        allocator.wake_up = wake_up

    def lost_since(self) -> dict[str, int]:
        lost, self.lost_bytes = dict(self.lost_bytes), Counter[str]()
        return lost


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("distinct", "float32", "auto"), id="distinct"),
        pytest.param(("blend", "bfloat16", "auto"), id="blend"),
        # vLLM does not load a checkpoint's scales of each KV head again.
        pytest.param(("distinct", "bfloat16", "fp8"), id="fp8", marks=NEEDS_FP8),
    ],
)
def llm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Any]:
    from vllm import LLM

    policy, dtype, kv_cache_dtype = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        llm = LLM(
            save_llama(tmp_path_factory.mktemp("llama"), head_dim=64, **MODEL),
            attention_backend="CASCADE",
            additional_config={"cascade": ELASTIC | {"policy": policy}},
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            seed=0,
            block_size=16,
            max_model_len=4096,
            max_num_batched_tokens=256,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            enable_sleep_mode=True,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=256 << 20,
            worker_extension_cls="gpu.test_sleep.Forgetful",
            **graphs(1, 2, 4),
        )
    try:
        llm.collective_rpc("forget_what_sleeps")
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def each(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """One after the other, so that no batch is made of other requests the next time."""
    return [run(llm, prompt)[0] for prompt in prompts]


def cached(outputs: list[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


def sleep_and_wake(llm: Any, level: int) -> dict[str, int]:
    """Sleep, wake as vLLM's documentation has it, and give the bytes lost by their tag."""
    llm.sleep(level)
    if level == 1:
        llm.wake_up()
    else:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    return llm.collective_rpc("lost_since")[0]


def test_answers_and_chats_after_a_sleep(llm: Any) -> None:
    """At level 1, at level 2 with the weights loaded again, and at level 1 once more."""
    nothing = [0] * len(PROMPTS)
    first = each(llm, PROMPTS)
    assert cached(first) == nothing
    turns = [
        prompt + tokens_of(answer) + MORE for prompt, answer in zip(PROMPTS, first, strict=True)
    ]
    continued = each(llm, turns)
    assert min(cached(continued)) >= len(PROMPTS[0]) // 16 * 16
    assert llm.reset_prefix_cache()
    afresh = each(llm, turns)
    assert cached(afresh) == nothing
    for level in (1, 2, 1):
        lost = sleep_and_wake(llm, level)
        assert lost["kv_cache"] >= 200 << 20
        assert ("weights" in lost) == (level == 2)
        again = each(llm, turns)
        assert cached(again) == nothing
        check_alike(again, afresh)
        # Only a pool that is free as a whole is reset.
        assert llm.reset_prefix_cache()
        again = each(llm, PROMPTS)
        assert cached(again) == nothing
        check_alike(again, first)
        again = each(llm, turns)
        assert cached(again) == cached(continued)
        check_alike(again, continued)
