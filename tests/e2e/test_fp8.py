"""Finds alone: FP8 scales of a checkpoint that an engine loads, and uses otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from e2e.support import engine, impls_of, runner_of
from e2e.test_schedules import TRACED, play
from e2e.tiny import LLAMA, random_prompt, save_llama
from reference.fp8 import round_trip, stored
from vllm_cascade.attention import scales
from vllm_cascade.kernels.pages import Pages

# Within the budget, at its end, and far beyond it.
LENGTHS = [30, 150, 700, 1333]
PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]
# Of each KV head, keys' and values'. With powers of two a float32 engine computes the same bits.
SCALES = torch.tensor([2.0**-8, 2.0**-6]), torch.tensor([2.0**-7, 2.0**-8])
# What llm-compressor writes of a model whose keys and values alone are quantized.
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "attn_head",
        "symmetric": True,
        "dynamic": False,
    },
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def save_scaled(folder: Path, scales: tuple[torch.Tensor, torch.Tensor], **changes: Any) -> str:
    """Write a random Llama whose checkpoint has scales of each KV head.

    Args:
        folder: Where to.
        scales: [num_kv_heads] float32 of keys and of values, the same in every layer.
        changes: Fields of config.json that differ from `LLAMA`.

    Returns:
        The folder, for vLLM's `model`.
    """
    save_llama(folder, **changes, quantization_config=QUANTIZATION)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, scale in zip("kv", scales, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}_scale"] = scale.view(-1, 1, 1).clone()
        heads = LLAMA["num_attention_heads"]
        tensors[f"model.layers.{layer}.self_attn.q_scale"] = torch.ones(heads, 1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with scales."""
    return save_scaled(tmp_path_factory.mktemp("scaled"), SCALES)


def test_a_checkpoints_scales_and_any_cut(plain: str, scaled: str) -> None:
    """An engine in float32 that rounds keys and values as they arrive gives the same bits."""
    found = play(scaled, PROMPTS, max_num_batched_tokens=256)
    saturated = torch.zeros(2, dtype=torch.int64)
    write = Pages.write

    def rounded(pages: Pages, key: Any, value: Any, *args: Any) -> None:
        for part, (x, scale) in enumerate(zip((key, value), SCALES, strict=True)):
            saturated[part] += (stored(x, scale).float().abs() == 448).sum()
        write(pages, round_trip(key, SCALES[0]), round_trip(value, SCALES[1]), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pages, "write", rounded)
        expected = play(plain, PROMPTS, max_num_batched_tokens=256)
    assert saturated.min() > 0
    assert found.tokens == expected.tokens
    for r in range(len(PROMPTS)):
        assert torch.equal(found.logprobs[r].nan_to_num(), expected.logprobs[r].nan_to_num())
        assert found.kept[r].keys() == expected.kept[r].keys()
        assert all(torch.equal(found.kept[r][k], expected.kept[r][k]) for k in expected.kept[r])
    assert len(found.kept[-1]) > 15
    # A number that is rounded another way in float32 may be rounded to FP8's next one.
    whole = play(scaled, PROMPTS, max_num_seqs=1, kv_cache_dtype="fp8")
    for r in range(len(PROMPTS)):
        length = LENGTHS[r] - 1
        error = (whole.logprobs[r][:length] - found.logprobs[r][:length]).abs()
        assert error.median() < 1e-4 and (error > 0.02).float().mean() < 0.02


def test_half_the_bytes_and_a_warning_without_scales(plain: str) -> None:
    """In bfloat16: pages of one byte an element, token indices behind them."""
    options = {"block_size": 16, "max_model_len": 1024, "skip_tokenizer_init": True}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales, "log_of", lambda _: SimpleNamespace(warning_once=said.append))
        with engine(
            TRACED,
            plain,
            dtype="bfloat16",
            kv_cache_dtype="fp8_e4m3",
            worker_extension_cls="vllm_cascade.trace.WorkerExtension",
            **options,
        ) as llm:
            (output,) = llm.generate(
                {"prompt_token_ids": PROMPTS[2]},
                SamplingParams(temperature=0, max_tokens=4, detokenize=False, logprobs=0),
                use_tqdm=False,
            )
            (kept,) = llm.collective_rpc("kept_tokens")[0]
            (cache, *_), (impl, *_) = runner_of(llm).kv_caches, impls_of(llm)
            assert impl.pages.kv.dtype == torch.float8_e4m3fn
            assert impl.pages.kv.data_ptr() == cache.data_ptr()
            # Two KV heads of 16 channels, K and V: one byte each, then an int32 for each slot.
            assert cache.stride(0) * cache.element_size() == 2 * 16 * (2 * 16 + 4)
    assert kept["num_tokens"] == LENGTHS[2] + 3
    steps = [next(iter(step.values())).logprob for step in output.outputs[0].logprobs]
    assert torch.tensor(steps).isfinite().all()
    # Once for each layer; vLLM's logger prints it once.
    assert ["the checkpoint brings no scales" in each for each in said] == [True] * 3
