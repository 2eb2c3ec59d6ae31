"""Finds alone: blocks shared by requests whose tokens begin alike, against vLLM's own sharing.

What two requests share must be what each would have computed, whatever the others do next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from e2e.support import cascade_manager_of, core_of, engine
from e2e.tiny import ELASTIC, prompt_without_ties, save_llama

MODEL = {"vocab_size": 2048, "tie_word_embeddings": False, "head_dim": 32}
BLOCK = 32
# Multiples of this block, which vLLM's own attention takes too; nothing moves up to here.
OPTIONS = ELASTIC | {"num_sink_tokens": 32, "cache_tokens": 256}
UNMOVED = 351
LONG_CHUNK = 128
# No token twice: which of two equal keys is kept is a matter of rounding.
TEXT = prompt_without_ties(1240, seed=1, neighbours=1240, vocab_size=MODEL["vocab_size"])
TEXTS = [TEXT[:620], TEXT[620:]]
SYSTEM, REST = TEXTS[0][:200], TEXTS[1]


def start(model: str, cascade: dict[str, Any] | None = OPTIONS, **options: Any) -> Any:
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 6, **options}
    # A long prompt leaves room in its steps for others.
    options = {"long_prefill_token_threshold": LONG_CHUNK, **options}
    options = {"enable_prefix_caching": True, **options}
    return engine(
        cascade,
        model,
        block_size=BLOCK,
        max_model_len=1024,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module")
def shared_llm(model: str) -> Iterator[Any]:
    """Of the tests that come first: an engine does not run on once another has been started."""
    with start(model) as llm:
        assert cascade_manager_of(llm)._prefix.num_tokens == UNMOVED
        yield llm


@pytest.fixture
def llm(shared_llm: Any) -> Any:
    assert shared_llm.reset_prefix_cache()
    return shared_llm


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        presence_penalty=2,
    )


def run(llm: Any, prompts: list[Any], max_tokens: list[int] | int) -> list[Any]:
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    given = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in prompts]
    return llm.generate(given, [sampling(length) for length in lengths], use_tqdm=False)


def cached(outputs: list[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


def check_alike(outputs: list[Any], expected: list[Any]) -> None:
    for number, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        (mine,), (other,) = ours.outputs, theirs.outputs
        assert list(mine.token_ids) == list(other.token_ids), number
        pairs = zip(mine.logprobs, other.logprobs, mine.token_ids, strict=True)
        for step, against, token in pairs:
            assert abs(step[token].logprob - against[token].logprob) < 1e-4, number


def most_used(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose last element is the most blocks that were in use after a step's scheduling."""
    scheduler, found = core_of(llm).scheduler, [0]
    pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule

    def counted(*args: Any) -> Any:
        output = schedule(*args)
        found.append(max(found[-1], pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()))
        return output

    monkeypatch.setattr(scheduler, "schedule", counted)
    return found


def test_a_request_that_may_come_to_the_boundary_gets_copies(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[*SYSTEM, *REST[start : start + 40]] for start in range(0, 160, 40)]
    run(llm, prompts[:1], 8)
    used = most_used(llm, monkeypatch)
    outputs = run(llm, prompts[1:], 200)
    assert cached(outputs) == [192] * 3
    # The originals are free again after the copies are made.
    assert used[-1] >= 3 * (350 // BLOCK)
    # Each has come to the boundary, and what they began with is still there.
    assert cached(run(llm, prompts[:1], 8)) == [224]
    assert llm.reset_prefix_cache()
    check_alike(outputs, [run(llm, [prompt], 200)[0] for prompt in prompts[1:]])


def test_a_holder_that_comes_to_the_boundary(llm: Any) -> None:
    """A request that stays below it goes on from the holder's blocks, and outlives the boundary."""
    prompts, lengths = [TEXTS[0], [*TEXTS[0][:200], *REST[:20]]], [4, 60]
    outputs = run(llm, prompts, lengths)
    assert cached(outputs) == [0, LONG_CHUNK]
    assert llm.reset_prefix_cache()
    check_alike(outputs, [run(llm, [p], n)[0] for p, n in zip(prompts, lengths, strict=True)])


def test_the_first_part_of_a_document(llm: Any) -> None:
    """It is found after the document's own request has moved it, and by longer requests too."""
    run(llm, [TEXTS[0]], 4)
    prompts = [[*TEXTS[0][:300], *REST[:20]], [*TEXTS[0][:500], *REST[:20]]]
    outputs = [run(llm, [prompt], 4)[0] for prompt in prompts]
    # What the step wrote that came to the boundary is gone.
    assert cached(outputs) == [256, 288]
    assert llm.reset_prefix_cache()
    check_alike(outputs, [run(llm, [prompt], 4)[0] for prompt in prompts])


@pytest.mark.parametrize("max_tokens", [4, 300], ids=["shared", "copied"])
def test_several_answers_to_a_prompt(
    llm: Any, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    """They come at once; one computes the prompt, the others wait a step for its blocks."""
    scheduler, computed = core_of(llm).scheduler, list[int]()
    schedule = scheduler.schedule

    def counted(*args: Any) -> Any:
        output = schedule(*args)
        computed.extend(output.num_scheduled_tokens.values())
        return output

    monkeypatch.setattr(scheduler, "schedule", counted)
    # Each answer ends with its first token, however many it may have.
    every = list(range(MODEL["vocab_size"]))
    several = SamplingParams(n=6, max_tokens=max_tokens, stop_token_ids=every, detokenize=False)
    llm.generate([{"prompt_token_ids": SYSTEM[:120]}], several, use_tqdm=False)
    assert computed == [120] + [120 - 96] * 5


def test_salts_keep_apart(llm: Any) -> None:
    prompts = [{"prompt_token_ids": SYSTEM, "cache_salt": salt} for salt in ("one", "two", "one")]
    assert cached([run(llm, [prompt], 4)[0] for prompt in prompts]) == [0, 0, 192]


def holders_of(manager: Any, requests: dict[str, Any]) -> dict[int, list[Any]]:
    """Block -> the requests that hold it."""
    held = defaultdict(list)
    for name, row in manager.req_to_blocks.items():
        for block in row:
            held[block.block_id].append(requests[name])
    return held


def mixed(number: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Prompts that begin alike, below and beyond the boundary, and lengths of answers."""
    random = Random(seed)
    prompts, lengths = [], []
    for _ in range(number):
        text, other = random.sample(TEXTS, 2)
        shared, own = random.choice([40, 64, 100, 200, 330, 500]), random.randint(1, 60)
        place = random.randrange(500)
        prompts.append([*text[:shared], *other[place : place + own]])
        lengths.append(random.choice([1, 4, 12, 30]))
    return prompts, lengths


def test_events_tell_what_is_there(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = cascade_manager_of(llm).block_pool
    monkeypatch.setattr(pool, "enable_kv_cache_events", True)
    events, take = [], pool.take_events

    def take_events() -> list[Any]:
        events.extend(taken := take())
        return taken

    monkeypatch.setattr(pool, "take_events", take_events)
    stored: defaultdict[Any, int] = defaultdict(int)
    prompts, lengths = mixed(30, seed=1)
    run(llm, prompts, lengths)
    pool.take_events()
    for event in events:
        if isinstance(event, BlockStored):
            assert len(event.token_ids) == BLOCK * len(event.block_hashes)
        for block_hash in getattr(event, "block_hashes", ()):
            stored[block_hash] += 1 if isinstance(event, BlockStored) else -1
        assert isinstance(event, BlockStored | BlockRemoved)
    found = [block for block in pool.blocks if block.block_hash is not None and block.ref_cnt == 0]
    mapped = pool.cached_block_hash_to_block
    there = [block for block in found if mapped.contain(block.block_hash, block.block_id)]
    assert sum(stored.values()) == len(there) > 10
    assert llm.reset_prefix_cache()
    pool.take_events()
    assert isinstance(events[-1], AllBlocksCleared)
    assert cached(run(llm, [SYSTEM], 1)) == [0]


def test_hits_and_blocks_as_vllm(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt before many questions, all of which stay within the budget."""
    prompts = [[*SYSTEM, *REST[start : start + 40]] for start in range(0, 480, 40)]

    def served(cascade: dict[str, Any] | None) -> tuple[list[Any], list[Any], int]:
        with start(model, cascade, long_prefill_token_threshold=0) as llm:
            used = most_used(llm, monkeypatch)
            return run(llm, prompts, 8), run(llm, prompts, 8), used[-1]

    outputs, again, used = served(OPTIONS)
    expected, theirs_again, theirs_used = served(None)
    assert cached(outputs) == cached(expected) == [0] + [192] * (len(prompts) - 1)
    assert cached(again) == cached(theirs_again) == [224] * len(prompts)
    assert used == theirs_used
    check_alike(outputs, expected)
    check_alike(again, expected)


@pytest.mark.parametrize("caches", [2, 9], ids=["small-pool", "large-pool"])
def test_whatever_the_others_do(model: str, monkeypatch: pytest.MonkeyPatch, caches: int) -> None:
    """Requests of all kinds in one batch, with preemption where the pool is small."""
    prompts, lengths = mixed(70, seed=caches)
    with start(model, enable_prefix_caching=False) as llm:
        expected = run(llm, prompts, lengths)
        most = cascade_manager_of(llm)._layout.max_blocks
    with start(model, num_gpu_blocks_override=caches * most + 1) as llm:
        scheduler, manager = core_of(llm).scheduler, cascade_manager_of(llm)
        schedule, prefix, num_shared = scheduler.schedule, manager._prefix, [0]

        def checked(*args: Any) -> Any:
            output = schedule(*args)
            for holders in holders_of(manager, scheduler.requests).values():
                if len(holders) > 1:
                    num_shared[0] += 1
                    assert not any(prefix.may_outgrow(request) for request in holders)
            return output

        monkeypatch.setattr(scheduler, "schedule", checked)
        outputs = run(llm, prompts, lengths)
        check_alike(outputs, expected)
        again = run(llm, prompts, lengths)
        check_alike(again, expected)
        assert num_shared[0] > 100 and sum(cached(again)) > sum(cached(outputs)) > 2000
        assert not prefix._private and not manager.req_to_blocks and not manager._progress
        pool = manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
