"""Finds alone: a boundary that used a draft which was rejected, or a draft computed behind one.

A random model, and drafts of which the test chooses how many are right, so that they begin and end
at every distance from a boundary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import cascade_manager_of, core_of, engine, poisoned, runner_of
from e2e.test_schedules import LENGTHS, check, play
from e2e.test_sessions import Outputs, add
from e2e.tiny import CASCADE, prompt_without_ties, random_prompt, save_llama

pytestmark = pytest.mark.model
# Untied, and no token twice: which of two equal keys is kept is a matter of rounding.
MODEL = {"vocab_size": 2048, "tie_word_embeddings": False}
STRIDE, NUM_DRAFTS = CASCADE["stride"], 3
TEXT = prompt_without_ties(500, seed=4, neighbours=500, vocab_size=MODEL["vocab_size"])
ANSWER = STRIDE + 20
NGRAM = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 3}
OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
    "max_num_seqs": STRIDE,
    "skip_tokenizer_init": True,
}
# Before the first boundary, and past it, at every distance from one.
PROMPTS = [TEXT[: 130 + 3 * offset] for offset in range(STRIDE)]


def sampling(**options: Any) -> SamplingParams:
    options = {"max_tokens": ANSWER, "ignore_eos": True, "logprobs": 0, **options}
    return SamplingParams(temperature=0, detokenize=False, **options)


def run(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, sampling(**options), use_tqdm=False)


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprobs_of(output: Any) -> torch.Tensor:
    (answer,) = output.outputs
    return torch.tensor(
        [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    )


class Drafter:
    """Drafts of which 0, 1, 2 or all are right, in turn and otherwise for each request.

    Args:
        answers: Prompt and greedy answer of each request.
        prompts: Number of tokens of each prompt.
    """

    def __init__(self, answers: list[list[int]]) -> None:
        self._by_start = {tuple(tokens[:100]): [] for tokens in answers}
        for tokens in answers:
            self._by_start[tuple(tokens[:100])].append(tokens)
        self.calls = 0

    def propose(
        self,
        num_speculative_tokens: int,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        self.calls += 1
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            if not sampled:
                drafts.append([])
                continue
            number = int(num_tokens_no_spec[row])
            tokens = token_ids_cpu[row, :number].tolist()
            (known,) = {
                tuple(answer[number : number + num_speculative_tokens])
                for answer in self._by_start[tuple(tokens[:100])]
                if answer[:number] == tokens
            } or {()}
            num_right = (self.calls + row) % (num_speculative_tokens + 1)
            wrong = [(token + 1) % MODEL["vocab_size"] for token in known[num_right:]]
            drafts.append([*known[:num_right], *wrong])
        return drafts


class Counts:
    """What the scheduler had computed together: rows with drafts, and drafts accepted."""

    def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler = core_of(llm).scheduler
        original = scheduler.make_spec_decoding_stats
        self.drafts = self.accepted = 0

        def make_spec_decoding_stats(*args: Any, **kwargs: Any) -> Any:
            self.drafts += kwargs["num_draft_tokens"]
            self.accepted += kwargs["num_accepted_tokens"]
            return original(*args, **kwargs)

        monkeypatch.setattr(scheduler, "make_spec_decoding_stats", make_spec_decoding_stats)


def preempt_at(llm: Any, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an engine preempt all that runs before the steps of these numbers."""
    step, number = llm.llm_engine.step, 0

    def stepped() -> Any:
        nonlocal number
        number += 1
        if number in steps:
            llm.reset_prefix_cache(reset_running_requests=True)
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", stepped)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module")
def plain(model: str) -> list[Any]:
    """The answers without drafts."""
    with engine(CASCADE, model, **OPTIONS) as llm:
        return run(llm, PROMPTS)


@pytest.mark.parametrize("preempt", [False, True], ids=["in order", "preempted"])
def test_every_distance_from_a_boundary(
    model: str, plain: list[Any], monkeypatch: pytest.MonkeyPatch, preempt: bool
) -> None:
    answers = [[*p, *tokens_of(each)] for p, each in zip(PROMPTS, plain, strict=True)]
    with engine(CASCADE, model, speculative_config=NGRAM, **OPTIONS) as llm:
        counts = Counts(llm, monkeypatch)
        monkeypatch.setattr(runner_of(llm).drafter, "propose", Drafter(answers).propose)
        preempt_at(llm, (20, 45) if preempt else (), monkeypatch)
        with poisoned(llm):
            found = run(llm, PROMPTS)
        manager = cascade_manager_of(llm)
        assert not manager.req_to_blocks and not manager._progress
    assert 0.3 * counts.drafts < counts.accepted < 0.7 * counts.drafts
    assert counts.accepted > len(PROMPTS) * ANSWER / 4
    for ours, theirs in zip(found, plain, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        torch.testing.assert_close(logprobs_of(ours), logprobs_of(theirs), rtol=0, atol=1e-4)


def test_what_is_remembered(model: str, plain: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request goes on from an answer, wherever a boundary lies and whatever drafts came after it.

    The first row is a single token, to which vLLM adds as many drafts that are none.
    """
    answers = [[*p, *tokens_of(each)] for p, each in zip(PROMPTS, plain, strict=True)]
    more = [[*tokens[: len(tokens) - n % 3], 7 + n] for n, tokens in enumerate(answers)]
    with engine(CASCADE, model, **OPTIONS) as llm:
        expected = run(llm, more, max_tokens=20)
    with engine(
        CASCADE, model, speculative_config=NGRAM, enable_prefix_caching=True, **OPTIONS
    ) as llm:
        drafter = Drafter(answers)
        monkeypatch.setattr(runner_of(llm).drafter, "propose", drafter.propose)
        # Every third ends one token earlier, and drafts that are right come after its last token.
        given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        ends = [sampling(max_tokens=ANSWER - n % 3) for n in range(len(PROMPTS))]
        llm.generate(given, ends, use_tqdm=False)
        found = run(llm, more, max_tokens=20)
    for prompt, ours, theirs in zip(more, found, expected, strict=True):
        assert len(prompt) - 2 <= ours.num_cached_tokens < len(prompt)
        assert tokens_of(ours) == tokens_of(theirs)
        torch.testing.assert_close(logprobs_of(ours), logprobs_of(theirs), rtol=0, atol=1e-4)


def test_turns_of_sessions(model: str, plain: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn's input comes right behind its answer's end, not behind drafts that were right."""

    def turns(llm: Any) -> dict[str, list[int]]:
        names = [str(n) for n in range(len(PROMPTS))]
        outputs = Outputs(llm)
        for name, prompt in zip(names, PROMPTS, strict=True):
            add(llm, name, prompt, 6)
        outputs.step(names, 6)
        for name in names:
            add(llm, name, TEXT[400:440], 12)
        outputs.step(names, 18)
        for name in names:
            add(llm, name, [0], 1, resumable=False)
        return dict(outputs.tokens)

    with engine(CASCADE, model, **OPTIONS) as llm:
        expected = turns(llm)
    answers = [[*p, *tokens_of(each)] for p, each in zip(PROMPTS, plain, strict=True)]
    with engine(CASCADE, model, speculative_config=NGRAM, **OPTIONS) as llm:
        counts = Counts(llm, monkeypatch)
        monkeypatch.setattr(runner_of(llm).drafter, "propose", Drafter(answers).propose)
        assert turns(llm) == expected
    assert counts.accepted > 2 * len(PROMPTS)


def test_acceptance_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with vLLM's own attention, by vLLM's own drafter, of a model that repeats itself."""
    model = save_llama(tmp_path, head_dim=32)
    prompts = [random_prompt(12, seed=n) * 5 for n in range(8)]
    found = []
    # Blocks that vLLM's own backend takes, too.
    options = OPTIONS | {"block_size": 32}
    for cascade in (None, CASCADE | {"num_sink_tokens": 32}):
        with (
            monkeypatch.context() as patch,
            engine(cascade, model, speculative_config=NGRAM, **options) as llm,
        ):
            counts = Counts(llm, patch)
            answers = [tokens_of(each) for each in run(llm, prompts, max_tokens=80)]
            found.append((answers, counts.drafts, counts.accepted))
    assert found[0] == found[1]
    assert found[0][2] > 20


@pytest.mark.parametrize("preempt_at", [(), (6, 14)], ids=["in order", "preempted"])
def test_what_is_kept(model: str, preempt_at: tuple[int, ...]) -> None:
    """The drafter that vLLM has, chunked prompts, all against the float64 oracle."""
    prompts = [random_prompt(100, seed=n) * (n // 100 + 1) for n in LENGTHS[:5]]
    played = play(
        model,
        prompts,
        max_num_batched_tokens=300,
        preempt_at=preempt_at,
        prompt_logprobs=False,
        speculative_config=NGRAM,
    )
    assert (played.preemptions > 0) == bool(preempt_at)
    check(model, played)
