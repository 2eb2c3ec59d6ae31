"""Drafters with a KV cache on a device: eager, with graphs, compiled. By vLLM's model runner V2.

Finds what `e2e.test_drafters` finds on a CPU. Here each draft step is planned on the device, and a
CUDA graph may have several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.support import cascade_manager_of, core_of, engine, impls_of, runner_of
from e2e.test_drafters import save_configs, save_eagle, speculative
from e2e.test_speculative import (
    ANSWER,
    MODEL,
    NUM_DRAFTS,
    OPTIONS,
    PROMPTS,
    Counts,
    preempt_at,
    run,
    tokens_of,
)
from e2e.tiny import CASCADE, ELASTIC, LLAMA, random_prompt, save_llama
from gpu.probe import watched
from gpu.test_speculative import MODES
from vllm_cascade.structure.layout import Layout

pytestmark = pytest.mark.gpu
SHAPE = {**MODEL, "head_dim": 64}
# Some at a boundary, some just before one, some behind it.
FEW = PROMPTS[::5]


class Proposals:
    """What an engine's drafter has proposed behind each text."""

    def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = runner_of(llm)
        states, original = runner.req_states, runner.speculator.propose
        self.by_text: dict[tuple[int, ...], list[int]] = {}

        def propose(batch: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = original(batch, *args, **kwargs)
            if kwargs.get("dummy_run"):
                return drafts
            num_sampled = args[4].tolist()
            for row, index in enumerate(batch.idx_mapping.tolist()):
                # vLLM has none drafted where each request has its last token.
                if num_sampled[row] and drafts[row, 0] >= 0:
                    length = int(states.total_len.gpu[index])
                    text = states.all_token_ids.gpu[index, :length].tolist()
                    self.by_text[tuple(text)] = drafts[row].tolist()
            return drafts

        monkeypatch.setattr(runner.speculator, "propose", propose)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **SHAPE)


@pytest.fixture(scope="module")
def plain(model: str) -> list[list[int]]:
    """Greedy answers without drafts."""
    with engine(ELASTIC, model, **OPTIONS) as llm:
        return [tokens_of(each) for each in run(llm, PROMPTS)]


def num_late(layout: Layout) -> int:
    """Count the drafts at boundaries and behind them where all others are right."""
    late = 0
    for prompt in PROMPTS:
        first, end = len(prompt), len(prompt) + ANSWER - 1
        while first < end:
            together = min(1 + NUM_DRAFTS, layout.most_together(first, first))
            late += 1 + NUM_DRAFTS - together
            first += together
    return late


@pytest.mark.parametrize("preempt", [False, True], ids=["in order", "preempted"])
def test_the_model_itself_is_always_right(
    model: str, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch, preempt: bool
) -> None:
    drafter = speculative("draft_model", model)
    with engine(ELASTIC, model, speculative_config=drafter, **OPTIONS) as llm:
        assert core_of(llm).vllm_config.use_v2_model_runner
        assert len(impls_of(llm)) == 2 * LLAMA["num_hidden_layers"]
        counts = Counts(llm, monkeypatch)
        preempt_at(llm, (10, 30) if preempt else (), monkeypatch)
        found = [tokens_of(each) for each in run(llm, PROMPTS)]
        manager = cascade_manager_of(llm)
        assert not manager.req_to_blocks and not manager._progress
    late, rejected = num_late(manager._layout), counts.drafts - counts.accepted
    print(f"{rejected} of {counts.drafts} drafts rejected; {late} late")
    assert found == plain
    # Preempted requests come to boundaries from elsewhere.
    assert 0 < rejected <= (1.25 if preempt else 1) * late
    assert counts.accepted > len(PROMPTS) * ANSWER * 0.7


@pytest.mark.parametrize("mode", list(MODES))
def test_eagle(
    model: str, plain: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Its answers are the model's; its proposals depend on the text alone."""
    options = {**OPTIONS, "speculative_config": speculative("eagle", save_eagle(tmp_path, **SHAPE))}
    with engine(ELASTIC, model, **options | MODES[mode]) as llm:
        proposals = Proposals(llm, monkeypatch)
        with watched() as steps:
            found = [tokens_of(each) for each in run(llm, PROMPTS)]
        assert found == plain
        assert (steps.replays > 0) == (mode != "eager")
        check_text_alone(llm, proposals, found)


def check_text_alone(llm: Any, proposals: Proposals, answers: list[list[int]]) -> None:
    """Token by token, as a prompt in one piece, and in pieces."""
    texts = [[*p, *a] for p, a in zip(PROMPTS, answers, strict=True)][::5]
    prompts = [tokens[:-number] for tokens in texts for number in (1, 2, 17, 40)]
    by_token = proposals.by_text
    for batch in (512, 48):
        llm.reset_prefix_cache()
        core_of(llm).scheduler.max_num_scheduled_tokens = batch
        proposals.by_text = {}
        # What another request held may have been drafted with another next token.
        run(llm, prompts, max_tokens=8, skip_reading_prefix_cache=True)
        both = by_token.keys() & proposals.by_text.keys()
        differing = [len(text) for text in both if by_token[text] != proposals.by_text[text]]
        print(f"batch {batch}: {len(both)} texts met twice, {len(differing)} with other proposals")
        assert len(both) > len(FEW) * 8
        assert not differing


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_as_with_vllms_own_attention_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model = save_llama(tmp_path / "model", **SHAPE)
    save = {"draft_model": lambda folder, **shape: save_llama(folder, seed=5, **shape)}
    drafter = save.get(method, save_eagle)(tmp_path / "drafter", **SHAPE)
    prompts, found = [random_prompt(70 + n, seed=n) for n in range(12)], []
    for cascade, backend in ((None, {"attention_backend": "TRITON_ATTN"}), (CASCADE, {})):
        with (
            monkeypatch.context() as patch,
            engine(
                cascade,
                model,
                speculative_config=speculative(method, drafter),
                **OPTIONS,
                **backend,
            ) as llm,
        ):
            proposals = Proposals(llm, patch)
            run(llm, prompts, max_tokens=20)
            found.append(proposals.by_text)
    both = found[0].keys() & found[1].keys()
    differing = [text for text in both if found[0][text] != found[1][text]]
    print(f"{len(both)} texts, {len(differing)} with other proposals")
    # The other kernel multiplies float32 as TF32: which of two near equals is ahead may differ.
    assert len(both) > 5 * len(prompts) and len(differing) <= len(both) // 50


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_other_drafters_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With vLLM's dummy weights: heads that take several layers' states, and layers of a model."""
    drafter = save_configs(tmp_path, method, head_dim=SHAPE["head_dim"])
    options = {**OPTIONS, "load_format": "dummy", **MODES["graphs"]}
    with engine(ELASTIC, str(tmp_path), **options) as llm:
        expected = [tokens_of(each) for each in run(llm, PROMPTS)]
    with engine(ELASTIC, str(tmp_path), speculative_config=drafter, **options) as llm:
        assert len(impls_of(llm)) == LLAMA["num_hidden_layers"] + 1
        proposals = Proposals(llm, monkeypatch)
        found = [tokens_of(each) for each in run(llm, PROMPTS)]
        print(f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(found)} equal")
        assert found == expected
        check_text_alone(llm, proposals, found)
