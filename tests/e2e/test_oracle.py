"""The engine with a real model against stock attention and against the whole-model oracle."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from e2e.oracle import check_four_times_past_reach
from e2e.support import book_tokens, engine

pytestmark = pytest.mark.model

LENGTHS = [5, 17, 128, 129, 300, 777, 1024, 1500]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def test_under_budget_equals_cpu_attn() -> None:
    """Every answer is the same token for token: at or below the budget nothing is approximate."""
    prompts = [{"prompt_token_ids": book_tokens(n, start=100 * n)} for n in LENGTHS]
    answers = []
    for cascade in (None, {"cache_tokens": 2048, "num_sub_caches": 4, "stride": 256}):
        with engine(cascade, max_model_len=4096, max_num_batched_tokens=1000) as llm:
            outputs = llm.generate(prompts, greedy(24), use_tqdm=False)
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("policy", ["distinct", "blend", "paper"])
def test_beyond_budget_equals_oracle(policy: str) -> None:
    """Four times past the reach, every kept set and every log-probability is the oracle's."""
    check_four_times_past_reach(policy, book_tokens)
