"""Keys and values in FP8 on a GPU: CUDA graphs, any cut, and vLLM's own FP8 beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import engine
from e2e.test_fp8 import save_scaled
from e2e.tiny import CASCADE, random_prompt, save_llama
from gpu.probe import compiled_anew, watched
from gpu.test_graphs import ANSWER, LENGTHS, OPTIONS, generate, graphs, play

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with FP8",
    ),
]

# Of the random models' keys and values few are beyond the range of any of these.
SCALES = torch.tensor([0.013, 0.021]), torch.tensor([0.017, 0.011])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With scales of each KV head, so that vLLM's `auto` is FP8."""
    return save_scaled(tmp_path_factory.mktemp("llama"), SCALES, head_dim=64)


@pytest.mark.parametrize("policy", ["distinct", "blend"])
def test_graphs_equal_eager(model: str, policy: str) -> None:
    answers, kept, replays = play(model, policy, enforce_eager=True)
    assert replays == 0
    found, found_kept, replays = play(model, policy, **graphs(*range(1, 9)))
    assert replays >= ANSWER - 1
    assert found == answers
    assert found_kept == kept


def test_nobody_waits(model: str) -> None:
    """For the device while a step is prepared, or for a kernel to be compiled."""
    with (
        compiled_anew() as compiled,
        engine(CASCADE, model, dtype="bfloat16", **OPTIONS, **graphs(1, 2, 4, 8)) as llm,
    ):
        assert "_write_kernel" in compiled
        compiled.clear()
        generate(llm)
        assert not compiled
        with watched(forbid_sync=True) as steps:
            generate(llm)
    assert steps.replays == steps.decodes > 0


def logprobs(
    cascade: dict[str, Any] | None, model: str, lengths: list[int], **options: Any
) -> torch.Tensor:
    """Of all prompts' tokens but the first of each."""
    given = OPTIONS | {"num_gpu_blocks_override": None, "max_model_len": 1024} | options
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    with engine(cascade, model, **given) as llm:
        prompts = [{"prompt_token_ids": random_prompt(n, seed=n)} for n in lengths]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return torch.tensor(
        [
            step[token].logprob
            for output in outputs
            for step, token in zip(
                output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
            )
        ]
    )


def test_a_prompt_may_be_cut_anywhere(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In float32, where matrices of other shapes differ little; also past boundaries."""
    plain = save_llama(tmp_path_factory.mktemp("plain"), head_dim=64)
    whole, again = (
        logprobs(CASCADE, model, LENGTHS, max_num_batched_tokens=tokens) for tokens in (2048, 128)
    )
    exact = logprobs(CASCADE, plain, LENGTHS, max_num_batched_tokens=2048)
    by_cut, by_fp8 = (whole - again).abs(), (whole - exact).abs()
    assert by_cut.median() < 0.05 * by_fp8.median()


def test_under_the_budget_as_near_as_vllms_own(model: str) -> None:
    """The distance from bfloat16 is at most that of FlashAttention with FP8, or little more."""
    lengths = [30, 100, 120, 130, 140, 144]
    flash = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
    exact = logprobs(None, model, lengths, **flash, kv_cache_dtype="bfloat16")
    theirs = logprobs(None, model, lengths, **flash)
    ours = logprobs(CASCADE, model, lengths, dtype="bfloat16")
    error, allowed = (ours - exact).abs(), (theirs - exact).abs()
    assert error.isfinite().all()
    assert 0 < error.median() <= 1.5 * allowed.median()
    assert error.mean() <= 1.5 * allowed.mean()
