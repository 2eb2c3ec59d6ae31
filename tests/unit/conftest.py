"""Fixtures of several files: a small model, a configuration for vLLM, and what is logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reference.llama import Llama, random_tensors
from small_model import NUM_TOKENS, TINY


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(TINY, seed=0)


@pytest.fixture(scope="module")
def model(tensors) -> Llama:
    return Llama(TINY, tensors)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=generator).tolist()


class FakeModel(SimpleNamespace):
    """As much of vLLM's `ModelConfig` as is asked."""

    def get_sliding_window(self):
        return self.sliding_window

    def get_total_num_kv_heads(self):
        return 2

    def get_head_size(self):
        return self.head_size

    def using_transformers_backend(self):
        return self.model_impl == "transformers"


@pytest.fixture
def served(monkeypatch):
    """A configuration that CASCADE serves, for a test to spoil."""
    from transformers import LlamaConfig

    from vllm_cascade import plugin
    from vllm_cascade.support import resolved
    from vllm_cascade.support import validate as validation

    plugin.register()
    monkeypatch.setattr(validation, "rotary_limit", lambda model_config: 4096)
    monkeypatch.setattr(resolved, "position_limit", lambda model_config: 4096)
    text = LlamaConfig(max_position_embeddings=4096)
    model = FakeModel(
        runner_type="generate",
        attn_type="decoder",
        head_size=64,
        use_mla=False,
        model_impl="vllm",
        sliding_window=None,
        attention_chunk_size=None,
        uses_alibi=False,
        uses_mrope=False,
        multimodal_config=None,
        is_mm_prefix_lm=False,
        rswa_window=None,
        hf_text_config=text,
        dtype=torch.float32,
        max_model_len=4096,
        original_max_model_len=None,
    )
    cascade = plugin.register_name()
    return SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=cascade, backend_per_kind={}, use_non_causal=False
        ),
        additional_config={},
        device_config=SimpleNamespace(device_type="cpu"),
        use_v2_model_runner=True,
        model_config=model,
        cache_config=SimpleNamespace(
            block_size=128,
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            kv_sharing_fast_prefill=False,
            enable_prefix_caching=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )


@pytest.fixture
def said(monkeypatch):
    """What vLLM's logger prints."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    # vLLM's own logger prints what is logged below it, and nothing else.
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def forget_once():
    """vLLM's logger remembers what it has warned of; it forgets here, and whenever called."""
    from vllm.logger import _print_warning_once

    _print_warning_once.cache_clear()
    return _print_warning_once.cache_clear
