"""Speculative decoding on a device: both model runners, with and without graphs, in step and not.

The drafts of `e2e.test_speculative` begin and end at every distance from a boundary. With
asynchronous scheduling the host does not know how many of them were accepted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from e2e.support import cascade_manager_of, core_of, engine, runner_of
from e2e.test_speculative import (
    ANSWER,
    MODEL,
    NGRAM,
    NUM_DRAFTS,
    OPTIONS,
    PROMPTS,
    Counts,
    Drafter,
    preempt_at,
    run,
    tokens_of,
)
from e2e.tiny import CASCADE, save_llama
from gpu.probe import watched

pytestmark = pytest.mark.gpu
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [4, 8, 16, 32, 64, 128, 256],
    },
}
MODES = {"eager": {"enforce_eager": True}, "graphs": GRAPHS, "compiled": {"enforce_eager": False}}
# Runner, method and mode; the method for the device alone goes with asynchronous scheduling.
CASES = [
    ("v2", "ngram_gpu", "eager"),
    ("v2", "ngram_gpu", "graphs"),
    ("v2", "ngram_gpu", "compiled"),
    ("v2", "ngram", "graphs"),
    ("v1", "ngram", "eager"),
    ("v1", "ngram", "graphs"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), head_dim=64, **MODEL)


@pytest.fixture(scope="module")
def plain(model: str) -> list[list[int]]:
    """Prompts with the answers that are given without drafts."""
    with engine(CASCADE, model, **OPTIONS) as llm:
        found = run(llm, PROMPTS)
    return [[*p, *tokens_of(each)] for p, each in zip(PROMPTS, found, strict=True)]


def script(llm: Any, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a runner's drafter draft as `Drafter` does."""
    runner = runner_of(llm)
    if not hasattr(runner, "speculator"):
        monkeypatch.setattr(runner.drafter, "propose", Drafter(answers).propose)
        return
    speculator, states = runner.speculator, runner.req_states
    original, calls = speculator.propose, 0
    # Prompts differ in length.
    known = torch.full((1024, 1024 + NUM_DRAFTS), 0, device=runner.device)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        known[len(prompt), : len(answer)] = torch.tensor(answer, device=runner.device)
    prompt_len = torch.zeros(runner.max_num_reqs, dtype=torch.long, device=runner.device)

    def propose(input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        drafts = original(input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return drafts
        calls += 1
        rows = input_batch.idx_mapping.long()
        prompt_len.copy_(torch.from_numpy(states.prompt_len.np).long())
        ahead = torch.arange(NUM_DRAFTS, device=drafts.device)
        at = states.total_len.gpu[rows].long()[:, None] + ahead
        found = known[prompt_len[rows][:, None], at.clamp(max=known.shape[1] - 1)]
        num_right = (calls + torch.arange(len(rows), device=drafts.device)) % (NUM_DRAFTS + 1)
        is_wrong = ahead >= num_right[:, None]
        drafts.copy_((found + is_wrong) % MODEL["vocab_size"])
        return drafts

    monkeypatch.setattr(speculator, "propose", propose)


@pytest.mark.parametrize(("runner", "method", "mode"), CASES, ids="-".join)
def test_drafts_change_no_token(
    model: str,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    runner: str,
    method: str,
    mode: str,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "v2")))
    speculative = {**NGRAM, "method": method}
    with engine(
        CASCADE, model, speculative_config=speculative, **{**OPTIONS, **MODES[mode]}
    ) as llm:
        core = core_of(llm)
        assert core.vllm_config.use_v2_model_runner == (runner == "v2")
        if method == "ngram_gpu":
            assert type(core.scheduler).__name__.startswith("Async")
        counts = Counts(llm, monkeypatch)
        script(llm, plain, monkeypatch)
        with watched() as steps:
            found = run(llm, PROMPTS)
        manager = cascade_manager_of(llm)
        assert not manager.req_to_blocks and not manager._progress
    # The first model runner has no graphs of rows with drafts from the host.
    assert (steps.replays > 0) == (mode != "eager" and runner == "v2")
    if steps.replays:
        # Rows keep their drafts at boundaries too.
        assert steps.replays > 0.9 * steps.decodes
    assert 0.2 * counts.drafts < counts.accepted < 0.8 * counts.drafts
    assert counts.accepted > len(PROMPTS) * ANSWER / 4
    for prompt, answer, ours in zip(PROMPTS, plain, found, strict=True):
        assert [*prompt, *tokens_of(ours)] == answer


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_vllms_own_drafter(model: str, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    """Of a text that repeats itself, with asynchronous scheduling, and preempted."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "v2")))
    prompts = [(text[:90] * 5)[: 300 + n] for n, text in enumerate(PROMPTS[:16])]
    with engine(CASCADE, model, **OPTIONS) as llm:
        expected = [tokens_of(each) for each in run(llm, prompts)]
    speculative = {**NGRAM, "method": "ngram_gpu"}
    # The first model runner compiles this drafter, whatever the model has.
    how = GRAPHS if runner == "v2" else MODES["compiled"]
    with engine(CASCADE, model, speculative_config=speculative, **{**OPTIONS, **how}) as llm:
        assert type(core_of(llm).scheduler).__name__.startswith("Async")
        preempt_at(llm, (15, 30), monkeypatch)
        found = [tokens_of(each) for each in run(llm, prompts)]
    assert found == expected
