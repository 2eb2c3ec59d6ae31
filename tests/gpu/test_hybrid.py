"""Gemma and gpt-oss on a GPU: CASCADE beside FlashAttention, whose pages overlay its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from e2e.support import cascade_manager_of, engine, impls_of
from e2e.tiny import (
    random_prompt,
    save_gemma2,
    save_gemma3,
    save_gemma4,
    save_gpt_oss,
    save_llama4,
)
from gpu.probe import watched

pytestmark = pytest.mark.gpu

CASCADE = {
    "cache_tokens": 256,
    "num_sub_caches": 4,
    "newest_share": 0.0,
    "num_sink_tokens": 16,
    "stride": 128,
    "selection_window": 64,
}
OF_GEMMA = ["model.layers.1.self_attn.attn", "model.layers.4.self_attn.attn"]
# A random model of five layers, which of them attend in full, and what serves it without CASCADE:
# FlashAttention-3 takes no heads of 512 channels.
MODELS = {
    "gemma2": (
        partial(save_gemma2, head_dim=64),
        ["model.layers.1.self_attn.attn", "model.layers.3.self_attn.attn"],
        "FLASH_ATTN",
    ),
    "gemma3": (partial(save_gemma3, head_dim=64), OF_GEMMA, "FLASH_ATTN"),
    # Heads of 512 channels in the layers that attend in full, of 256 in the others.
    "gemma4": (save_gemma4, OF_GEMMA, "TRITON_ATTN"),
    # All experts: rounding a router's logits would choose others of less than all.
    "gpt_oss": (
        partial(save_gpt_oss, num_hidden_layers=5, num_experts_per_tok=4, head_dim=64),
        ["model.layers.1.attn.attn", "model.layers.3.attn.attn"],
        "FLASH_ATTN",
    ),
}
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
    """All tokens of each request, and log-probabilities of those that were asked for."""

    tokens: list[list[int]]
    logprobs: torch.Tensor


def generate(llm: Any, lengths: list[int], prompt_logprobs: bool = True) -> Results:
    """Greedy answers to random prompts.

    Args:
        llm: An engine.
        lengths: Tokens of each prompt.
        prompt_logprobs: Whether to ask for those too; vLLM looks up no prefix then.
    """
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
    given, tokens = [], []
    for output in outputs:
        answer = output.outputs[0]
        tokens.append([*output.prompt_token_ids, *answer.token_ids])
        steps = [*(output.prompt_logprobs or [None])[1:], *answer.logprobs]
        pairs = zip(steps, tokens[-1][-len(steps) :], strict=True)
        given += [step[token].logprob for step, token in pairs]
    logprobs = torch.tensor(given)
    assert logprobs.isfinite().all()
    return Results(tokens, logprobs)


def mean_error(model: str, found: Results) -> float:
    """Of the log-probabilities of all tokens, against transformers in float64."""
    own = Path(model) / "transformers"
    exact_model = AutoModelForCausalLM.from_pretrained(
        own if own.exists() else model,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    exact = []
    with torch.inference_mode():
        for tokens in found.tokens:
            given = torch.tensor([tokens])
            logprobs = exact_model(given).logits[0, :-1].log_softmax(-1)
            exact.append(logprobs.gather(1, given[0, 1:, None])[:, 0])
    return float((found.logprobs - torch.cat(exact)).abs().mean())


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


@pytest.mark.parametrize("model_type", list(MODELS))
def test_cascade_beside_flash_attention(tmp_path: Path, model_type: str) -> None:
    """Within the budget as exact as vLLM's own attention; past it only CASCADE's layers drop."""
    save, full, other = MODELS[model_type]
    model = save(tmp_path)
    with open_engine(model, None, attention_backend=other, **OPTIONS) as llm:
        others = [type(impl).__name__ for impl in impls_of(llm)]
        theirs = mean_error(model, generate(llm, WITHIN))
    with open_engine(
        model,
        {**CASCADE, "trace_tokens": True},
        worker_extension_cls="vllm_cascade.trace.WorkerExtension",
        **OPTIONS,
    ) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        with watched() as steps:
            ours = mean_error(model, generate(llm, WITHIN))
        replays = steps.replays
        first = generate(llm, BEYOND, prompt_logprobs=False)
        # Now vLLM has these prefixes in the cache of the sliding-window layers.
        again = generate(llm, BEYOND, prompt_logprobs=False)
        found = {
            each["num_tokens"]: each["layers"] for each in llm.collective_rpc("kept_tokens")[0]
        }
    print(f"{impls}: mean error of log-probabilities {ours:.5f}; {others}: {theirs:.5f}")
    assert impls.count("CascadeImpl") == 2
    assert impls.count("FlashAttentionImpl") == 3
    assert replays >= ANSWER - 1
    # Both round to bfloat16 as often.
    assert ours <= 1.2 * theirs
    assert again.tokens == first.tokens
    # The last to end, so its pages are whole.
    layers = found[BEYOND[-1] + ANSWER - 1]
    assert list(layers) == full
    for heads in map(torch.tensor, layers.values()):
        assert (heads[:, :16] == torch.arange(16)).all()
        assert (heads[:, -1] == BEYOND[-1] + ANSWER - 2).all()
        assert heads.shape[1] <= 16 + 256 + 3 * (64 - 16) + 128


def test_gemma4_with_larger_pages_of_windows(tmp_path: Path) -> None:
    """As in the real model: two of CASCADE's blocks take the memory of one with a window."""
    model = save_gemma4(tmp_path, num_attention_heads=8, num_key_value_heads=4)
    with open_engine(model, None, attention_backend="TRITON_ATTN", **OPTIONS) as llm:
        theirs = mean_error(model, generate(llm, WITHIN))
    with open_engine(model, CASCADE, **OPTIONS) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        spec = cascade_manager_of(llm).kv_cache_spec
        ours = mean_error(model, generate(llm, WITHIN))
        first = generate(llm, BEYOND, prompt_logprobs=False)
        again = generate(llm, BEYOND, prompt_logprobs=False)
    print(f"{impls}: mean error of log-probabilities {ours:.5f}; vLLM's own: {theirs:.5f}")
    assert impls.count("CascadeImpl") == 2
    assert spec.parts == 2
    assert ours <= 1.2 * theirs
    assert again.tokens == first.tokens


def test_llama4_beside_chunks(tmp_path: Path) -> None:
    """In float32 and eagerly: rounding chooses other experts, and chunks have no graphs."""
    model = save_llama4(tmp_path, head_dim=64)
    options = {"dtype": "float32", "enforce_eager": True}
    with open_engine(model, None, **options) as llm:
        theirs = mean_error(model, generate(llm, WITHIN))
    with open_engine(model, CASCADE, **options) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        ours = mean_error(model, generate(llm, WITHIN))
        first = generate(llm, BEYOND, prompt_logprobs=False)
        again = generate(llm, BEYOND, prompt_logprobs=False)
    print(f"{impls}: mean error of log-probabilities {ours:.6f}; vLLM's own: {theirs:.6f}")
    assert impls.count("CascadeImpl") == 2
    assert ours <= max(1.2 * theirs, 1e-5)
    assert again.tokens == first.tokens
