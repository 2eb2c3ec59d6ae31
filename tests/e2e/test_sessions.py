"""Finds alone: a streaming session's next turn after vLLM took back tokens that had been computed.

With asynchronous scheduling a step is under way when a turn ends at a stop token, and vLLM drops
the step's token. A CPU has no asynchronous scheduling, so the test drops the token itself.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from e2e.support import cascade_manager_of, core_of, engine
from e2e.tiny import CASCADE, by_policy, prompt_without_ties, save_llama
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

MODEL = {"vocab_size": 2048, "tie_word_embeddings": False}
TEXT = prompt_without_ties(600, seed=4, neighbours=600, vocab_size=MODEL["vocab_size"])
FIRST, MORE, ANSWER = 400, 90, 8
STRIDE = CASCADE["stride"]


def start(model: str, policy: str, **options: Any) -> Any:
    return engine(
        by_policy(policy, CASCADE),
        model,
        block_size=16,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        max_num_seqs=80,
        skip_tokenizer_init=True,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module", params=["distinct", "blend"])
def llm(model: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    with start(model, request.param, enable_prefix_caching=False) as llm:
        yield llm


def add(
    llm: Any,
    name: str,
    tokens: list[int],
    max_tokens: int,
    *,
    resumable: bool = True,
    **options: Any,
) -> None:
    options = {"temperature": 0, "logprobs": 0, **options}
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)
    request = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(tokens),
        mm_features=None,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=resumable,
    )
    core = core_of(llm)
    core.add_request(*core.preprocess_add_request(request))


class Outputs:
    """What an engine gives each request.

    Args:
        llm: The engine, whose steps this object makes.
    """

    def __init__(self, llm: Any) -> None:
        self._core = core_of(llm)
        self.tokens, self.logprobs = defaultdict[str, list[int]](list), defaultdict(list)

    def step(self, names: list[str], num_tokens: int) -> None:
        """Step until each of the requests has been given `num_tokens` tokens in all."""
        while any(len(self.tokens[name]) < num_tokens for name in names):
            assert self.step_once()

    def step_once(self) -> bool:
        """Make one step, and tell whether it computed anything."""
        stepped, executed = self._core.step()
        self._core.post_step(executed)
        for output in stepped[0].outputs if stepped else ():
            self.tokens[output.request_id] += output.new_token_ids
            # The first column is that of the token sampled.
            self.logprobs[output.request_id] += output.new_logprobs.logprobs[:, 0].tolist()
        return executed


@pytest.mark.parametrize("is_queued", [True, False], ids=["queued", "late"])
def test_tokens_taken_back(llm: Any, monkeypatch: pytest.MonkeyPatch, is_queued: bool) -> None:
    """At every place of a stride; the next turn is there when a turn ends, or comes later.

    With scores each request begins again, whatever the place: fewer places do.
    """
    scheduler = core_of(llm).scheduler
    policy = cascade_manager_of(llm)._layout.config.policy
    handle, update = scheduler._handle_stopped_request, scheduler._update_request_as_session
    prompts, begun_again = dict[str, list[int]](), set[str]()

    def handle_stopped_request(request: Any) -> bool:
        if request.request_id in names and request.request_id not in prompts:
            request.num_output_placeholders = 1
        return handle(request)

    def update_request_as_session(session: Any, update_: Any) -> None:
        update(session, update_)
        prompts[session.request_id] = list(session.prompt_token_ids)
        if not session.num_computed_tokens:
            begun_again.add(session.request_id)

    monkeypatch.setattr(scheduler, "_handle_stopped_request", handle_stopped_request)
    monkeypatch.setattr(scheduler, "_update_request_as_session", update_request_as_session)
    lengths = range(FIRST, FIRST + STRIDE + 2, 1 if policy == "distinct" else 5)
    names = [f"{length}-{is_queued}" for length in lengths]
    for name, length in zip(names, lengths, strict=True):
        add(llm, name, TEXT[:length], 2)
    outputs = Outputs(llm)
    if not is_queued:
        outputs.step(names, 2)
    for name, length in zip(names, lengths, strict=True):
        add(llm, name, TEXT[length : length + MORE], ANSWER)
    outputs.step(names, 2 + ANSWER)
    for name in names:
        add(llm, name, [0], 1, resumable=False)
    assert not scheduler.requests and not cascade_manager_of(llm)._progress

    fresh = {name: f"fresh-{name}" for name in names}
    for name in names:
        add(llm, fresh[name], prompts[name], ANSWER, resumable=False)
    outputs.step(list(fresh.values()), ANSWER)
    for name, other in fresh.items():
        assert outputs.tokens[name][2:] == outputs.tokens[other], name
        ours, theirs = outputs.logprobs[name][2:], outputs.logprobs[other]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert len(begun_again) == (1 if policy == "distinct" else len(names))


@pytest.fixture(scope="module", params=["distinct", "blend", "without caching"])
def tight_llm(model: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """With a pool of one cache and a half."""
    caches = request.param in ("distinct", "blend")
    policy = request.param if caches else "distinct"
    parsed = CascadeOptions.parse(by_policy(policy, CASCADE))
    config = resolve(parsed, block_size=16, max_model_len=1024, position_limit=1024)
    most = build_layout(config).max_blocks
    options = {"enable_prefix_caching": caches, "num_gpu_blocks_override": 1 + 3 * most // 2}
    with start(model, policy, **options) as llm:
        yield llm


@pytest.mark.parametrize("is_queued", [True, False], ids=["queued", "late"])
def test_a_pool_for_fewer_sessions(
    tight_llm: Any, monkeypatch: pytest.MonkeyPatch, is_queued: bool
) -> None:
    """Of two sessions one loses its blocks, waits until the other one ends and begins again.

    As with vLLM's own attention, a session keeps its blocks between turns.
    """
    llm, scheduler = tight_llm, core_of(tight_llm).scheduler
    preempt, update = scheduler._preempt_request, scheduler._update_request_as_session
    preempted, asked = list[str](), list[tuple[str, list[int], int]]()
    # An answer past the budget, that takes a full cache; without a token twice.
    most = cascade_manager_of(llm)._layout.max_blocks
    long, options = 16 * most - 60, {"presence_penalty": 2}

    def preempt_request(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    def update_request_as_session(session: Any, update_: Any) -> None:
        update(session, update_)
        asked.append((session.request_id, list(session.prompt_token_ids), update_.max_tokens))

    def ask(name: str, start: int, length: int, max_tokens: int) -> None:
        tokens = TEXT[start : start + length]
        if name not in scheduler.requests:
            asked.append((name, tokens, max_tokens))
        add(llm, name, tokens, max_tokens, **options)

    def end(name: str) -> None:
        add(llm, name, [0], 1, resumable=False)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt_request)
    monkeypatch.setattr(scheduler, "_update_request_as_session", update_request_as_session)
    outputs = Outputs(llm)
    first, second = f"first-{is_queued}", f"second-{is_queued}"
    if is_queued:
        ask(first, 0, 60, long)
        ask(second, 300, 60, long)
        for turn in (1, 2):
            ask(first, 90 * turn, 90, ANSWER)
            ask(second, 300 + 90 * turn, 90, ANSWER)
        end(first)
        end(second)
        outputs.step([first], long + 2 * ANSWER)
        assert preempted == [second] and len(outputs.tokens[second]) < long
        outputs.step([second], long + 2 * ANSWER)
    else:
        half = 16 * (most // 2)
        ask(first, 0, half, ANSWER)
        outputs.step([first], ANSWER)
        ask(second, 300, 60, long)
        while outputs.step_once():
            pass
        assert preempted == [second] and len(outputs.tokens[second]) < long
        ask(first, half, 90, ANSWER)
        outputs.step([first], 2 * ANSWER)
        assert not outputs.step_once()
        end(first)
        outputs.step([second], long)
        ask(second, 390, 90, ANSWER)
        outputs.step([second], long + ANSWER)
        end(second)
    assert not scheduler.requests and not cascade_manager_of(llm)._progress

    done = dict.fromkeys((first, second), 0)
    for name, prompt, max_tokens in asked:
        assert llm.reset_prefix_cache()
        fresh = f"fresh-{name}-{len(prompt)}"
        add(llm, fresh, prompt, max_tokens, resumable=False, **options)
        outputs.step([fresh], max_tokens)
        turn = slice(done[name], done[name] + max_tokens)
        done[name] += max_tokens
        assert outputs.tokens[name][turn] == outputs.tokens[fresh], fresh
        ours, theirs = outputs.logprobs[name][turn], outputs.logprobs[fresh]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert done == {name: len(outputs.tokens[name]) for name in done}
