"""Finds alone: a cut, batch, order of arrival or preemption after which other tokens are kept.

A random model of three layers. Every block is full of NaN when it is handed out, and every request
of every schedule is replayed by the float64 oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import KeptLog, cascade_manager_of, core_of, engine, poisoned
from e2e.tiny import CASCADE, by_policy, random_prompt, save_llama
from reference.cascade import CascadeParameters
from reference.llama import Llama
from vllm_cascade.structure.layout import build_layout

TRACED = CASCADE | {"trace_tokens": True}
LENGTHS = [2100, 700, 30, 1333, 288, 209, 1024]
ANSWER = 70


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@dataclass
class Played:
    """One schedule's requests: all their tokens, what was given for them, and what was kept."""

    config: Any
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    kept: list[dict[int, torch.Tensor]] = field(default_factory=list)
    concurrency: float = 0.0
    preemptions: int = 0
    most_running: int = 0


def play(
    model: str,
    prompts: list[list[int]],
    *,
    policy: str = "distinct",
    preempt_at: tuple[int, ...] = (),
    prompt_logprobs: bool = True,
    answer_tokens: int = ANSWER,
    **options: Any,
) -> Played:
    """Run prompts together, step by step; at the steps `preempt_at` everything is preempted."""
    options = {"max_num_batched_tokens": 4096, "max_num_seqs": 8, **options}
    sampling = SamplingParams(
        temperature=0,
        max_tokens=answer_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
    )
    with engine(
        by_policy(policy, TRACED),
        model,
        block_size=16,
        max_model_len=4096,
        skip_tokenizer_init=True,
        **options,
    ) as llm:
        log = KeptLog(llm)
        scheduler, played = core_of(llm).scheduler, Played(log.config)
        played.concurrency = core_of(llm).vllm_config.cache_config.kv_cache_max_concurrency
        with log.recording(), poisoned(llm), pytest.MonkeyPatch.context() as patch:
            original = scheduler._preempt_request

            def counted(*args: Any, **kwargs: Any) -> Any:
                played.preemptions += 1
                return original(*args, **kwargs)

            patch.setattr(scheduler, "_preempt_request", counted)
            for i, prompt in enumerate(prompts):
                llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
            outputs, step = {}, 0
            while llm.llm_engine.has_unfinished_requests():
                if step in preempt_at:
                    llm.reset_prefix_cache(reset_running_requests=True)
                for output in llm.llm_engine.step():
                    outputs[output.request_id] = output
                played.most_running = max(played.most_running, len(scheduler.running))
                step += 1
        for i, prompt in enumerate(prompts):
            output = outputs[str(i)]
            answer = output.outputs[0]
            tokens = [*prompt, *answer.token_ids]
            given = [*(output.prompt_logprobs or [None] * len(prompt))[1:], *answer.logprobs]
            played.tokens.append(tokens)
            played.logprobs.append(
                torch.tensor(
                    [
                        float("nan") if step is None else step[token].logprob
                        for step, token in zip(given, tokens[1:], strict=True)
                    ],
                    dtype=torch.float64,
                )
            )
            played.kept.append(log.of(str(i)))
        manager = cascade_manager_of(llm)
        assert not manager.req_to_blocks and not manager._progress
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return played


def check(model: str, played: Played) -> None:
    """Every request of a schedule against the oracle."""
    oracle, windows, ties = Llama.from_folder(model), 0, 0
    parameters = CascadeParameters.like(played.config)
    for tokens, logprobs, kept in zip(played.tokens, played.logprobs, played.kept, strict=True):
        run = oracle.run(tokens, parameters, forced=kept)
        assert not run.comparison.unexplained
        assert kept.keys() <= run.kept.keys()
        seen = logprobs.isfinite()
        assert int(seen.sum()) >= ANSWER
        torch.testing.assert_close(logprobs[seen], run.logprobs[seen], rtol=0, atol=1e-3)
        windows += run.comparison.windows
        ties += len(run.comparison.differing)
        merged = [k for k in run.kept if k * parameters.stride > parameters.cache_tokens]
        assert len(kept) >= len(merged) - 1
    assert windows > 0
    assert ties <= 0.005 * windows


PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]


# Those of `distinct` in larger steps are in the tests below.
@pytest.mark.parametrize(
    ("max_num_batched_tokens", "policy"),
    [(256, "distinct"), (256, "paper"), (1000, "blend"), (4096, "blend"), (4096, "paper")],
)
def test_chunks(model: str, max_num_batched_tokens: int, policy: str) -> None:
    played = play(model, PROMPTS, policy=policy, max_num_batched_tokens=max_num_batched_tokens)
    assert played.preemptions == 0
    check(model, played)


def test_long_answers(model: str) -> None:
    """Decode alone fills the budget ten times over; what it thins out is what prefill would."""
    prompts = [random_prompt(n, seed=n) for n in (30, 77)]
    played = play(model, prompts, answer_tokens=1400)
    check(model, played)
    layout = build_layout(played.config)
    for tokens, kept in zip(played.tokens, played.kept, strict=True):
        assert len(tokens) > 6 * layout.num_unmoved
        assert len(kept) > 18
        assert layout.parts(len(tokens))["level 3"] > 0


def test_order_of_arrival(model: str) -> None:
    played = play(model, PROMPTS[::-1], max_num_batched_tokens=333)
    check(model, played)


def test_alone(model: str) -> None:
    played = play(model, PROMPTS, max_num_seqs=1)
    assert played.most_running == 1
    check(model, played)


def test_preempted_by_a_small_pool(model: str) -> None:
    """Prompts that have merged once and grow while they answer do not all fit."""
    prompts = [random_prompt(n, seed=n) for n in (210, 213, 216, 219, 222)]
    held_at_first = -(-222 // 16)
    played = play(
        model, prompts, num_gpu_blocks_override=1 + 5 * held_at_first, prompt_logprobs=False
    )
    assert played.preemptions > 0
    check(model, played)


@pytest.mark.parametrize("policy", ["distinct", "blend"])
def test_preempted_in_the_middle_of_prefill_and_decode(model: str, policy: str) -> None:
    """Pages that are handed out again hold other tokens, and other scores where there are any."""
    played = play(
        model,
        PROMPTS,
        policy=policy,
        max_num_batched_tokens=500,
        preempt_at=(3, 11, 40),
        prompt_logprobs=False,
    )
    assert played.preemptions >= 6
    check(model, played)


def test_kept_tokens_is_what_the_pages_hold(model: str) -> None:
    """The documented way to read kept tokens, after generation, against the log of merges."""
    with engine(
        TRACED,
        model,
        block_size=16,
        max_model_len=4096,
        skip_tokenizer_init=True,
        worker_extension_cls="vllm_cascade.trace.WorkerExtension",
    ) as llm:
        log = KeptLog(llm)
        with log.recording():
            output = llm.generate(
                {"prompt_token_ids": random_prompt(1000, seed=5)},
                SamplingParams(temperature=0, max_tokens=2, detokenize=False),
                use_tqdm=False,
            )[0]
        (found,) = llm.collective_rpc("kept_tokens")[0]
        boundary, kept = max(log.of(output.request_id).items())
    assert found["num_tokens"] == 1001
    since = list(range(TRACED["num_sink_tokens"] + boundary * TRACED["stride"], 1001))
    assert len(found["layers"]) == len(kept) == 3
    for layer, heads in enumerate(found["layers"].values()):
        assert heads == [[*head, *since] for head in kept[layer].tolist()]


def test_kept_tokens_needs_the_trace(model: str) -> None:
    with (
        engine(
            CASCADE,
            model,
            block_size=16,
            max_model_len=512,
            skip_tokenizer_init=True,
            worker_extension_cls="vllm_cascade.trace.WorkerExtension",
        ) as llm,
        pytest.raises(ValueError, match="trace_tokens"),
    ):
        llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=2, detokenize=False))
        llm.collective_rpc("kept_tokens")


def test_pool_with_room_for_k_budgets_runs_k(model: str) -> None:
    with engine(TRACED, model, block_size=16, max_model_len=4096, skip_tokenizer_init=True) as llm:
        max_blocks = build_layout(KeptLog(llm).config).max_blocks
    for k in (1, 3):
        prompts = [random_prompt(600 + n, seed=n) for n in range(k + 2)]
        played = play(
            model,
            prompts,
            max_num_batched_tokens=300,
            num_gpu_blocks_override=k * max_blocks + 1,
            prompt_logprobs=False,
        )
        assert played.most_running == k
        assert k <= played.concurrency < k + 1 / max_blocks + 1e-6
        assert played.preemptions == 0
        check(model, played)
