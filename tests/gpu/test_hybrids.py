"""Models with states on a GPU: whole pages, pages that vLLM divides, and a fused rotation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.support import cascade_manager_of, impls_of
from e2e.test_states import CASCADE
from e2e.tiny_states import (
    save_falcon_h1,
    save_granite_hybrid,
    save_jamba,
    save_lfm2,
    save_nemotron_h,
    save_olmo_hybrid,
    save_qwen3_5,
    save_qwen3_next,
)
from gpu.probe import watched
from gpu.test_hybrid import ANSWER, BEYOND, OPTIONS, WITHIN, generate, mean_error, open_engine

pytestmark = pytest.mark.gpu

# Of heads of 64 channels, which kernels take.
WIDER = {
    "hidden_size": 256,
    "head_dim": 64,
    "conv_dim": 256,
    "block_dim": 256,
    "block_ff_dim": 256,
}
MODELS = {
    "lfm2": partial(save_lfm2, **WIDER),
    "nemotron_h": partial(save_nemotron_h, head_dim=64),
    "falcon_h1": partial(save_falcon_h1, head_dim=64),
    "granite": save_granite_hybrid,
    "jamba": save_jamba,
    "olmo_hybrid": save_olmo_hybrid,
    "qwen3_5": save_qwen3_5,
    # On a GPU it normalizes and rotates in one operator, which CASCADE switches off.
    "qwen3_next": save_qwen3_next,
}
# A state of theirs takes more than one of CASCADE's blocks.
DIVIDED = {"nemotron_h", "granite"}


@pytest.fixture
def loads_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell OLMo-Hybrid's loader which part of a convolution it is given: vLLM 0.33 does not."""
    from vllm.model_executor.layers.mamba.gdn import olmo_gdn_linear_attn as layer

    original = layer._make_fused_conv1d_weight_loader

    def made(*args: Any) -> Any:
        load = original(*args)
        return lambda param, weight: load(param, weight, weight.shard_id)

    monkeypatch.setattr(layer, "_make_fused_conv1d_weight_loader", made)


@pytest.mark.usefixtures("loads_convolutions")
@pytest.mark.parametrize("policy", ["distinct", "blend"])
@pytest.mark.parametrize("model_type", list(MODELS))
def test_cascade_beside_states(tmp_path: Path, model_type: str, policy: str) -> None:
    """Within the budget as exact as FlashAttention; past it the same with any schedule."""
    model = MODELS[model_type](tmp_path)
    # vLLM's own choice for gated delta nets needs FlashInfer.
    options = {**OPTIONS, "gdn_prefill_backend": "triton"}
    with open_engine(model, None, attention_backend="FLASH_ATTN", **options) as llm:
        theirs = mean_error(model, generate(llm, WITHIN))
    cascade = {**CASCADE, "policy": policy}
    extension = {"worker_extension_cls": "vllm_cascade.trace.WorkerExtension"}
    with open_engine(model, cascade, **extension, **options) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        manager = cascade_manager_of(llm)
        with watched() as steps:
            ours = mean_error(model, generate(llm, WITHIN))
        first = generate(llm, BEYOND, prompt_logprobs=False)
        again = generate(llm, BEYOND, prompt_logprobs=False)
        found = {
            each["num_tokens"]: each["layers"] for each in llm.collective_rpc("kept_tokens")[0]
        }
    print(
        f"{impls}; blocks of {manager.kv_cache_spec.block_size} tokens; mean error of "
        f"log-probabilities {ours:.5f}, FLASH_ATTN alone {theirs:.5f}; {steps.replays} replays"
    )
    assert impls.count("CascadeImpl") == 2
    assert manager.kv_cache_spec.parts > 1 or model_type not in DIVIDED
    assert not manager.enable_caching
    assert steps.replays >= ANSWER - 1
    # Both round to bfloat16 as often.
    assert ours <= 1.2 * theirs
    assert again.tokens == first.tokens
    # The last to end, so its pages are whole.
    layers = found[BEYOND[-1] + ANSWER - 1]
    assert len(layers) == 2
    sinks = CASCADE["num_sink_tokens"]
    for heads in map(torch.tensor, layers.values()):
        assert (heads[:, :sinks] == torch.arange(sinks)).all()
        assert (heads[:, -1] == BEYOND[-1] + ANSWER - 2).all()
        assert (heads.diff(dim=1) > 0).all()
        assert heads.shape[1] < BEYOND[-1]
