"""Gemma 3 on a GPU: CASCADE beside FlashAttention, whose pages overlay its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm import SamplingParams

from e2e.support import engine, impls_of
from e2e.tiny import random_prompt, save_gemma3
from gpu.probe import watched

pytestmark = pytest.mark.gpu

CASCADE = {"cache_tokens": 256, "num_sub_caches": 4, "num_sink_tokens": 16, "stride": 128}
FULL = ["model.layers.1.self_attn.attn", "model.layers.4.self_attn.attn"]
# Several times the window of 64 tokens; with their answers within the budget, and far past it.
WITHIN = [5, 64, 130, 200]
BEYOND = [2100, 150, 1333]
ANSWER = 60
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
}


class Results(NamedTuple):
    """Greedy tokens of each answer, and log-probabilities of all prompts' tokens but the first."""

    answers: list[list[int]]
    logprobs: torch.Tensor


def generate(llm: Any, lengths: list[int], prompt_logprobs: bool = True) -> Results:
    """Answers to random prompts; vLLM looks up no prefix where prompts' own are asked for."""
    outputs = llm.generate(
        [{"prompt_token_ids": random_prompt(n, seed=n)} for n in lengths],
        SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
        ),
        use_tqdm=False,
    )
    given, answers = [], []
    for output in outputs:
        answers.append(list(output.outputs[0].token_ids))
        steps = zip(output.outputs[0].logprobs, answers[-1], strict=True)
        assert all(torch.tensor(step[token].logprob).isfinite() for step, token in steps)
        if prompt_logprobs:
            pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            given += [step[token].logprob for step, token in pairs]
    return Results(answers, torch.tensor(given))


def open_engine(model: str, cascade: dict[str, Any] | None, **options: Any) -> Any:
    """An engine that cuts prompts and runs them together."""
    return engine(
        cascade,
        model,
        max_model_len=4096,
        max_num_batched_tokens=300,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        **options,
    )


def test_cascade_beside_flash_attention(tmp_path: Path) -> None:
    """Within the budget as exact as FlashAttention alone; past it only CASCADE's layers drop."""
    model = save_gemma3(tmp_path, head_dim=64)
    with open_engine(model, None, attention_backend="TRITON_ATTN", dtype="float32") as llm:
        exact = generate(llm, WITHIN).logprobs
    with open_engine(model, None, attention_backend="FLASH_ATTN", **OPTIONS) as llm:
        theirs = (generate(llm, WITHIN).logprobs - exact).abs().mean()
    with open_engine(
        model,
        {**CASCADE, "trace_tokens": True},
        worker_extension_cls="vllm_cascade.trace.WorkerExtension",
        **OPTIONS,
    ) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        with watched() as steps:
            ours = (generate(llm, WITHIN).logprobs - exact).abs().mean()
        replays = steps.replays
        first = generate(llm, BEYOND, prompt_logprobs=False)
        # Now vLLM has these prefixes in the cache of the sliding-window layers.
        again = generate(llm, BEYOND, prompt_logprobs=False)
        found = {
            each["num_tokens"]: each["layers"] for each in llm.collective_rpc("kept_tokens")[0]
        }
    print(f"{impls}; mean error of log-probabilities {ours:.5f}, FLASH_ATTN alone {theirs:.5f}")
    assert impls.count("CascadeImpl") == 2
    assert impls.count("FlashAttentionImpl") == 3
    assert replays >= ANSWER - 1
    # Both round to bfloat16 as often.
    assert ours <= 1.2 * theirs
    assert again.answers == first.answers
    # The last to end, so its pages are whole.
    layers = found[BEYOND[-1] + ANSWER - 1]
    assert list(layers) == FULL
    for heads in map(torch.tensor, layers.values()):
        assert (heads[:, :16] == torch.arange(16)).all()
        assert (heads[:, -1] == BEYOND[-1] + ANSWER - 2).all()
        assert heads.shape[1] <= 16 + 256 + 3 * (64 - 16) + 128
