"""Finds alone: layers of CASCADE and of vLLM that disturb each other in one model.

Random models of a few layers; whatever is not CASCADE's is compared with vLLM's own backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm import SamplingParams

from e2e.support import KeptLog, core_of, engine, impls_of
from e2e.tiny import (
    random_prompt,
    save_gemma2,
    save_gemma3,
    save_gemma4,
    save_gpt_oss,
    save_random,
)

CASCADE = {
    "cache_tokens": 256,
    "num_sub_caches": 4,
    "newest_share": 0.0,
    "num_sink_tokens": 32,
    "stride": 128,
    "selection_window": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
# Four to eight times the budget, and below it.
LENGTHS = [2100, 150, 1333]
ANSWER = 40


def save(folder: Path, model_type: str) -> str:
    """A random model of one of the architectures."""
    if model_type == "gemma2":
        return save_gemma2(folder)
    if model_type == "gemma3_text":
        return save_gemma3(folder)
    if model_type == "gemma4_text":
        # Pages of the layers with a window are as large as two of CASCADE's.
        return save_gemma4(folder, num_attention_heads=8, num_key_value_heads=4)
    if model_type == "gpt_oss":
        return save_gpt_oss(folder)
    return save_random(folder, model_type, **EXPERTS)


class Answer(NamedTuple):
    """A request's greedy tokens, and log-probabilities of all that were asked for."""

    request: str
    tokens: list[int]
    logprobs: torch.Tensor


def generate(
    llm: Any,
    prompts: list[list[int]],
    prompt_logprobs: bool = True,
    preempt_at: tuple[int, ...] = (),
) -> list[Answer]:
    """Run prompts together, step by step.

    Args:
        llm: An engine.
        prompts: Token ids.
        prompt_logprobs: Whether to ask for those too; vLLM looks up no prefix then.
        preempt_at: Steps before which all running requests are preempted.
    """
    sampling = SamplingParams(
        temperature=0,
        max_tokens=ANSWER,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
    )
    requests = [f"{i}{'p' * prompt_logprobs}" for i in range(len(prompts))]
    for request, prompt in zip(requests, prompts, strict=True):
        llm.llm_engine.add_request(request, {"prompt_token_ids": prompt}, sampling)
    outputs, step = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        if step in preempt_at:
            llm.reset_prefix_cache(reset_running_requests=True)
        outputs |= {output.request_id: output for output in llm.llm_engine.step()}
        step += 1
    answers = []
    for output in map(outputs.__getitem__, requests):
        tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        given = [step[token].logprob for step, token in zip(steps, tokens, strict=True)]
        if prompt_logprobs:
            pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            given += [step[token].logprob for step, token in pairs]
        answers.append(Answer(output.request_id, tokens, torch.tensor(given)))
    return answers


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    """The same tokens with the same log-probabilities."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.tokens == other.tokens
        num = min(len(mine.logprobs), len(other.logprobs))
        torch.testing.assert_close(mine.logprobs[:num], other.logprobs[:num], rtol=0, atol=1e-4)


class HybridLog(KeptLog):
    """What CASCADE's layers alone held; they are one group here."""

    def __init__(self, llm: Any) -> None:
        from vllm_cascade.attention.impl import CascadeImpl
        from vllm_cascade.kv_cache.manager import CascadeManager

        managers = core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
        (self._manager,) = (m for m in managers if isinstance(m, CascadeManager))
        self._impls = [impl for impl in impls_of(llm) if isinstance(impl, CascadeImpl)]
        self._on_gpu = False
        self.config = self._impls[0].config
        self.kept = {}


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe"]
)
def test_under_the_budget_as_vllm(tmp_path: Path, model_type: str) -> None:
    model = save(tmp_path, model_type)
    prompts = [random_prompt(n, seed=n) for n in (5, 63, 130, 240)]
    sides = []
    for cascade in (None, CASCADE):
        with engine(
            cascade, model, block_size=32, max_num_batched_tokens=200, skip_tokenizer_init=True
        ) as llm:
            kinds = [type(impl).__name__ for impl in impls_of(llm)]
            sides.append(generate(llm, prompts))
    windows = model_type != "qwen3_moe"
    assert "CascadeImpl" in kinds
    assert ("CPUAttentionBackendImpl" in kinds) == windows
    assert_same(sides[1], sides[0])


@pytest.fixture(scope="module", params=["gemma2", "gemma3_text"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp(request.param), request.param)


class Played(NamedTuple):
    """Answers, and boundary -> kept tokens [layers, heads, kept] of each."""

    answers: list[Answer]
    kept: list[dict[int, torch.Tensor]]


@pytest.fixture(scope="module", params=["distinct", "blend"])
def policy(request: pytest.FixtureRequest) -> str:
    """With pages as large as those of the other layers, and with larger ones."""
    return request.param


@pytest.fixture(scope="module")
def alone(hybrid: str, policy: str) -> Played:
    """Prompts one after the other, each in one chunk."""
    return play(hybrid, policy, max_num_batched_tokens=4096, max_num_seqs=1)


def play(model: str, policy: str, preempt_at: tuple[int, ...] = (), **options: Any) -> Played:
    """Run the prompts; then again, when vLLM has their prefixes in the cache of other layers."""
    with engine(
        {**CASCADE, "policy": policy, "trace_tokens": True},
        model,
        block_size=32,
        skip_tokenizer_init=True,
        **options,
    ) as llm:
        log = HybridLog(llm)
        prompts = [random_prompt(n, seed=n) for n in LENGTHS]
        with log.recording():
            answers = generate(llm, prompts, not preempt_at, preempt_at)
            assert_same(generate(llm, prompts, prompt_logprobs=False), answers)
        pool = core_of(llm).scheduler.kv_cache_manager.block_pool
        assert pool.enable_caching
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return Played(answers, [log.of(answer.request) for answer in answers])


def test_past_the_budget(alone: Played) -> None:
    """Full-attention layers keep a cascade's tokens, each head its own."""
    sinks, stride = CASCADE["num_sink_tokens"], CASCADE["stride"]
    # Of all but the last sub-cache, a group less a block may be waiting.
    budget = sinks + CASCADE["cache_tokens"] + 3 * (64 - 32)
    for length, boundaries in zip(LENGTHS, alone.kept, strict=True):
        assert len(boundaries) == max(0, (length + ANSWER - 1 - sinks) // stride - 2)
        for k, kept in boundaries.items():
            assert kept.shape[:2] == (2, 2)
            assert kept.shape[2] <= budget
            assert (kept[..., :sinks] == torch.arange(sinks)).all()
            assert (kept[..., -1] == sinks + k * stride - 1).all()
            assert (kept.diff(dim=-1) > 0).all()
    layers = alone.kept[0][16]
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[:, 0], layers[:, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 300},
        {
            "max_num_batched_tokens": 300,
            "preempt_at": (3, 9, 30),
            # Too few for the blocks of all groups of three requests.
            "max_model_len": 2400,
            "num_gpu_blocks_override": 60,
        },
    ],
    ids=["chunks", "preempted"],
)
def test_together_as_alone(
    hybrid: str, policy: str, alone: Played, options: dict[str, Any]
) -> None:
    played = play(hybrid, policy, **options)
    assert_same(played.answers, alone.answers)
    for mine, other in zip(played.kept, alone.kept, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)


def test_windows_alone_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="CASCADE cannot serve sliding-window layers alone"),
        engine(CASCADE, save_gemma3(tmp_path, layer_types=["sliding_attention"] * 5)),
    ):
        pass
