"""An answer depends on its prompt alone: not on the run, the batch, or what pages held before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from e2e.support import engine, poisoned
from e2e.tiny import CASCADE, random_prompt, save_llama

pytestmark = pytest.mark.gpu

LENGTHS = [1200, 30, 205, 700, 144]
ANSWER = 100


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with engine(
        CASCADE,
        save_llama(tmp_path_factory.mktemp("llama"), head_dim=64),
        enforce_eager=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [2, 8],
        },
        block_size=16,
        max_model_len=4096,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        num_gpu_blocks_override=2000,
        # Else a prompt that came before goes on from what its blocks held.
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ) as llm:
        yield llm


def answers(llm: Any, lengths: list[int]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens and their log-probabilities."""
    outputs = llm.generate(
        [{"prompt_token_ids": random_prompt(n, seed=n)} for n in lengths],
        SamplingParams(
            temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False, logprobs=0
        ),
        use_tqdm=False,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for step, token in zip(given, chosen, strict=True)]
        for chosen, given in zip(tokens, (o.outputs[0].logprobs for o in outputs), strict=True)
    ]
    assert all(torch.tensor(each).isfinite().all() for each in logprobs)
    return tokens, logprobs


def test_same_batch_twice(llm: Any) -> None:
    assert answers(llm, LENGTHS) == answers(llm, LENGTHS)


def test_alone_as_in_a_batch(llm: Any) -> None:
    together, _ = answers(llm, LENGTHS)
    for length, expected in zip(LENGTHS, together, strict=True):
        assert answers(llm, [length])[0] == [expected], length


def test_pages_full_of_nan(llm: Any) -> None:
    """Every page holds NaN before the engine starts and when it is handed out."""
    expected = answers(llm, LENGTHS)
    with poisoned(llm):
        assert answers(llm, LENGTHS) == expected
