"""Finds alone: what goes wrong with a real model's keys, values, attention and tokens.

Against stock attention under the budget, and against the whole-model oracle beyond it.
"""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from e2e.oracle import REACH, check_past_reach
from e2e.support import book_tokens, engine, model_folder
from e2e.tiny import save_first_layers

pytestmark = pytest.mark.model

# Shorter than a block, one block and one token more, and past a step's tokens.
LENGTHS = [5, 128, 129, 240]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def test_under_budget_equals_cpu_attn() -> None:
    """Every answer is the same token for token: at or below the budget nothing is approximate."""
    prompts = [{"prompt_token_ids": book_tokens(n, start=100 * n)} for n in LENGTHS]
    answers = []
    for cascade in (None, {"cache_tokens": 1024, "num_sub_caches": 2, "stride": 256}):
        with engine(cascade, max_model_len=2048, max_num_batched_tokens=200) as llm:
            outputs = llm.generate(prompts, greedy(16), use_tqdm=False)
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def first_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_first_layers(tmp_path_factory.mktemp("first"), model_folder(), 8)


@pytest.mark.parametrize("policy", ["distinct", "blend", "paper"])
def test_beyond_budget_equals_oracle(first_layers: str, policy: str) -> None:
    """Twice past the reach, every kept set and every log-probability is the oracle's.

    In layers with and without attention sinks. test_streaming.py runs the whole model.
    """
    check_past_reach(policy, book_tokens, first_layers, num_tokens=2 * REACH + 40)
