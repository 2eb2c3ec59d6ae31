"""Finds alone: a request that goes on in a finished one's blocks, and not as computed alone.

A random model of three layers, requests of several times the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import KeptLog, cascade_manager_of, core_of, engine
from e2e.tiny import ELASTIC, prompt_without_ties, random_prompt, save_llama
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

TRACED = ELASTIC | {"trace_tokens": True}
# No token twice, in answers either: which of two equal keys is kept is a matter of rounding.
SAMPLING = SamplingParams(
    temperature=0,
    max_tokens=20,
    ignore_eos=True,
    detokenize=False,
    logprobs=0,
    presence_penalty=2,
)
MODEL = {"vocab_size": 2048, "tie_word_embeddings": False}
CHUNK = 256
TEXT = prompt_without_ties(1060, seed=1, neighbours=1060, vocab_size=MODEL["vocab_size"])
PROMPT, TURNS = TEXT[:700], [TEXT[start : start + 90] for start in range(700, 1060, 90)]
MORE = TURNS[0]


def start(model: str, policy: str = "distinct", **options: Any) -> Any:
    options = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4, **options}
    return engine(
        TRACED | {"policy": policy},
        model,
        block_size=16,
        max_model_len=4096,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module", params=["distinct", "blend"])
def shared_llm(model: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """With plain pages, and with scores behind keys and values.

    Of the tests that come first: an engine does not run on once another has been started.
    """
    with start(model, request.param, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: Any) -> Any:
    assert shared_llm.reset_prefix_cache()
    return shared_llm


def run(llm: Any, *prompts: Any, sampling: SamplingParams = SAMPLING) -> list[Any]:
    given = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    return llm.generate(given, sampling, use_tqdm=False)


def test_an_answer_tells_what_was_evicted(llm: Any) -> None:
    """The tokens that are no longer held, of a request that went on from another as well."""
    held = [
        len(prompt) + SAMPLING.max_tokens - 1 - evicted_by(output)
        for prompt in (TEXT[:100], PROMPT, PROMPT + MORE)
        for output in run(llm, prompt)
    ]
    layout = cascade_manager_of(llm)._layout
    assert held == [layout.held(n + SAMPLING.max_tokens - 1)[1] for n in (100, 700, 790)]
    assert held[0] == 119


def evicted_by(output: Any) -> int:
    return output.kv_transfer_params["cascade_evicted_tokens"]


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprobs_of(output: Any) -> torch.Tensor:
    answer = output.outputs[0]
    steps = zip(answer.logprobs, answer.token_ids, strict=True)
    return torch.tensor([step[token].logprob for step, token in steps])


def check_alike(outputs: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(outputs, expected, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        torch.testing.assert_close(logprobs_of(ours), logprobs_of(theirs), rtol=0, atol=1e-4)


def check_pool(llm: Any) -> None:
    """Every block is free, and nothing is remembered of a request that has gone on."""
    pool = core_of(llm).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    manager = cascade_manager_of(llm)
    assert not manager.req_to_blocks and not manager._progress


def check_kept(log: KeptLog, outputs: list[Any], expected: list[Any]) -> None:
    """Both kept the same tokens at every boundary that they ran."""
    for ours, theirs in zip(outputs, expected, strict=True):
        kept, alone = log.of(ours.request_id), log.of(theirs.request_id)
        assert len(alone) >= len(kept) > 1
        assert all(torch.equal(kept[boundary], alone[boundary]) for boundary in kept)


def afresh(llm: Any, *prompts: Any) -> list[Any]:
    """The same requests, with nothing to go on from."""
    assert llm.reset_prefix_cache()
    outputs = run(llm, *prompts)
    assert [output.num_cached_tokens for output in outputs] == [0] * len(outputs)
    return outputs


def test_turns_of_a_chat(llm: Any) -> None:
    chat, outputs, prompts = PROMPT, [], []
    log = KeptLog(llm)
    with log.recording():
        for turn in range(4):
            (output,) = run(llm, chat)
            # The last token of an answer is computed only where a step was under way already.
            computed = len(chat) - len(MORE)
            assert output.num_cached_tokens in ((computed - 1, computed) if turn else (0,))
            outputs.append(output)
            prompts.append(chat)
            chat = [*chat, *tokens_of(output), *TURNS[turn]]
            check_pool(llm)
        expected = [afresh(llm, prompt)[0] for prompt in prompts]
    check_alike(outputs, expected)
    check_kept(log, outputs, expected)


def test_several_go_on_from_an_answer(llm: Any) -> None:
    """One takes its blocks over and leaves a copy to the next, in the same step."""
    (first,) = run(llm, PROMPT)
    begun = [*PROMPT, *tokens_of(first)]
    prompts = [[*begun, *MORE], [*begun, *MORE[5:]], PROMPT]
    log = KeptLog(llm)
    with log.recording():
        outputs = run(llm, *prompts)
        taken, copied, again = (output.num_cached_tokens for output in outputs)
        assert taken == copied >= len(begun) - 1 and again == CHUNK
        check_pool(llm)
        expected = [afresh(llm, prompt)[0] for prompt in prompts]
    check_alike(outputs, expected)
    check_kept(log, outputs, expected)


def test_prompts_that_begin_alike(llm: Any) -> None:
    """At once and later: all but the first go on from a copy that was made of one of them."""
    prompts = [PROMPT, PROMPT, [*PROMPT[:500], *MORE], PROMPT]
    log = KeptLog(llm)
    with log.recording():
        outputs = run(llm, *prompts[:3])
        outputs += run(llm, *prompts[3:])
        # Chunks are shorter where requests share a step.
        assert [output.num_cached_tokens >= CHUNK for output in outputs] == [False, *[True] * 3]
        check_pool(llm)
        expected = [afresh(llm, prompt)[0] for prompt in prompts]
    check_alike(outputs, expected)
    check_kept(log, outputs, expected)


def prime(llm: Any, prompt: list[int]) -> None:
    run(llm, prompt, sampling=SamplingParams(temperature=0, max_tokens=1, detokenize=False))


def test_many_go_on_from_a_prompt(llm: Any) -> None:
    """At once and later; each with further boundaries, which what was copied decides."""
    prime(llm, PROMPT)
    prompts = [[*PROMPT, *MORE[first:], *TURNS[1]] for first in range(5)]
    log = KeptLog(llm)
    with log.recording():
        outputs = run(llm, *prompts[:3])
        prime(llm, random_prompt(300, seed=9))
        outputs += run(llm, *prompts[3:])
        assert [output.num_cached_tokens for output in outputs] == [len(PROMPT)] * 5
        check_pool(llm)
        expected = [afresh(llm, prompt)[0] for prompt in prompts]
    check_alike(outputs, expected)
    check_kept(log, outputs, expected)


def test_the_longest_end_is_gone_on_from(llm: Any) -> None:
    (first,) = run(llm, PROMPT)
    (second,) = run(llm, PROMPT[:400])
    assert second.num_cached_tokens == CHUNK
    (third,) = run(llm, [*PROMPT, *tokens_of(first), *MORE])
    assert third.num_cached_tokens >= len(PROMPT)
    (fourth,) = run(llm, [*PROMPT[:400], *tokens_of(second), *MORE])
    assert 400 <= fourth.num_cached_tokens <= 420


@pytest.mark.parametrize(("place", "cached"), [(3, 0), (300, 256), (716, 256)])
def test_another_token_in_a_block_or_after_the_last(llm: Any, place: int, cached: int) -> None:
    (first,) = run(llm, PROMPT)
    prompt = [*PROMPT, *tokens_of(first), *MORE]
    prompt[place] = prompt[place] % 50 + 1 if prompt[place] % 50 + 1 != prompt[place] else 60
    (output,) = run(llm, prompt)
    assert output.num_cached_tokens == cached


def test_salts_and_skipping(llm: Any) -> None:
    (first,) = run(llm, {"prompt_token_ids": PROMPT, "cache_salt": "a"})
    prompt = [*PROMPT, *tokens_of(first), *MORE]
    assert run(llm, prompt)[0].num_cached_tokens == 0
    assert run(llm, {"prompt_token_ids": prompt, "cache_salt": "b"})[0].num_cached_tokens == 0
    scored = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    salted = {"prompt_token_ids": prompt, "cache_salt": "a"}
    (whole,) = run(llm, salted, sampling=scored)
    assert len(whole.prompt_logprobs) == len(prompt)
    assert run(llm, salted)[0].num_cached_tokens > 0


def test_a_request_that_was_aborted_in_its_prefill(llm: Any) -> None:
    llm.llm_engine.add_request("gone", {"prompt_token_ids": PROMPT}, SAMPLING)
    llm.llm_engine.step()
    (name,) = core_of(llm).scheduler.requests
    llm.llm_engine.abort_request([name], internal=True)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    (output,) = run(llm, PROMPT)
    assert output.num_cached_tokens >= 256
    check_alike([output], afresh(llm, PROMPT))


def test_an_answer_that_was_stopped(model: str) -> None:
    check_stopped(model, asynchronous=False)


def check_stopped(model: str, *, asynchronous: bool, **options: Any) -> None:
    """With async scheduling the next step, of the token that stops it, is under way by then."""
    with start(model, enable_prefix_caching=True, async_scheduling=asynchronous, **options) as llm:
        assert core_of(llm).scheduler.__class__.__name__.startswith("Async") == asynchronous
        (whole,) = run(llm, PROMPT)
        stop = SamplingParams(
            temperature=0, max_tokens=20, detokenize=False, stop_token_ids=tokens_of(whole)[7:8]
        )
        assert llm.reset_prefix_cache()
        (first,) = run(llm, PROMPT, sampling=stop)
        answer = tokens_of(first)
        assert len(answer) < 9 and answer == tokens_of(whole)[: len(answer)]
        prompt = [*PROMPT, *answer, *MORE]
        (output,) = run(llm, prompt)
        assert output.num_cached_tokens == len(PROMPT) + len(answer) - (not asynchronous)
        check_pool(llm)
        check_alike([output], afresh(llm, prompt))


# Of a request as these engines lay it out.
MOST = build_layout(
    resolve(CascadeOptions.parse(TRACED), block_size=16, max_model_len=4096, position_limit=1024)
).max_blocks


def test_blocks_that_others_took(model: str) -> None:
    """One request leaves a small pool's rest alone; several leave nothing to go on from."""
    with start(model, enable_prefix_caching=True, num_gpu_blocks_override=4 * MOST + 1) as llm:
        (first,) = run(llm, PROMPT)
        prompt = [*PROMPT, *tokens_of(first), *MORE]
        others = [random_prompt(500, seed=seed) for seed in (3, 4, 5, 6)]
        run(llm, others[0])
        (output,) = run(llm, prompt)
        assert output.num_cached_tokens > 0
        (again,) = run(llm, PROMPT)
        run(llm, *others)
        (late,) = run(llm, prompt)
        assert late.num_cached_tokens == 0 and tokens_of(again) == tokens_of(first)
        check_alike([output], [late])
        check_pool(llm)


def test_the_least_recently_used_gives_way(model: str) -> None:
    """Prompts are copied in a pool that ends of answers have filled long since."""
    with start(model, enable_prefix_caching=True, num_gpu_blocks_override=4 * MOST + 1) as llm:
        texts = [PROMPT, *(random_prompt(500, seed=seed) for seed in range(3, 9))]
        (expected,) = [run(llm, text)[0] for text in texts][-1:]
        (output,) = run(llm, texts[-1])
        assert output.num_cached_tokens == CHUNK
        (late,) = run(llm, texts[0])
        assert late.num_cached_tokens == 0
        check_pool(llm)
        check_alike([output], [expected])
        check_alike([late], afresh(llm, texts[0]))


def test_a_pool_without_room_for_a_copy(model: str) -> None:
    """A prompt's blocks are taken over then, and are gone for others."""
    with start(model, enable_prefix_caching=True, num_gpu_blocks_override=2 * MOST) as llm:
        prime(llm, PROMPT)
        prompts = [[*PROMPT, *MORE], [*PROMPT, *MORE[5:]]]
        outputs = run(llm, *prompts)
        assert [output.num_cached_tokens for output in outputs] == [len(PROMPT), 0]
        check_pool(llm)
        check_alike(outputs, [afresh(llm, prompt)[0] for prompt in prompts])


def test_off_where_prefix_caching_is(model: str) -> None:
    with start(model, enable_prefix_caching=False) as llm:
        (first,) = run(llm, PROMPT)
        (output,) = run(llm, [*PROMPT, *tokens_of(first), *MORE])
        assert not output.num_cached_tokens
        assert not cascade_manager_of(llm)._ends._ends
