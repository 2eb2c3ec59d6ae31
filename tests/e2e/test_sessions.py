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

MODEL = {"vocab_size": 2048, "tie_word_embeddings": False}
TEXT = prompt_without_ties(600, seed=4, neighbours=600, vocab_size=MODEL["vocab_size"])
FIRST, MORE, ANSWER = 400, 90, 8
STRIDE = CASCADE["stride"]


@pytest.fixture(scope="module", params=["distinct", "blend"])
def llm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Any]:
    model = save_llama(tmp_path_factory.mktemp("llama"), **MODEL)
    with engine(
        by_policy(request.param, CASCADE),
        model,
        block_size=16,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        max_num_seqs=80,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    ) as llm:
        yield llm


def add(llm: Any, name: str, tokens: list[int], max_tokens: int, *, resumable: bool = True) -> None:
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
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
            stepped, executed = self._core.step()
            self._core.post_step(executed)
            assert executed
            for output in stepped[0].outputs:
                self.tokens[output.request_id] += output.new_token_ids
                # The first column is that of the token sampled.
                self.logprobs[output.request_id] += output.new_logprobs.logprobs[:, 0].tolist()


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
