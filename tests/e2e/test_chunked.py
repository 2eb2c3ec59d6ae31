"""Finds alone: layers of chunked attention that disturb those of CASCADE, or are disturbed.

A random Llama 4: every other layer attends in chunks and is vLLM's, the others rotate nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.support import engine, impls_of, runner_of
from e2e.test_hybrid import CASCADE, LENGTHS, Played, assert_same, generate, play
from e2e.tiny import random_prompt, save_llama4
from vllm_cascade.support.rotation import RotationError

# A query's factor is 1 at this many places, which is as many as `CASCADE` has.
PLACES = 512
TUNED = {"override_generation_config": {"attn_temperature_tuning": True}}


def attentions_of(llm: Any) -> list[Any]:
    """The attention modules of an in-process engine's model, by layer."""
    return [layer.self_attn for layer in runner_of(llm).get_model().model.layers]


def test_under_the_budget_as_vllm(tmp_path: Path) -> None:
    model = save_llama4(tmp_path, floor_scale=PLACES + 1)
    prompts = [random_prompt(n, seed=n) for n in (5, 63, 64, 130, 240)]
    # Lets the last layers' queries have another factor than 1, in vLLM's engine alone.
    longer = [random_prompt(700, seed=1)]
    sides, kinds, tuned = [], [], []
    for cascade in (None, CASCADE):
        with engine(
            cascade,
            model,
            block_size=32,
            max_num_batched_tokens=200,
            skip_tokenizer_init=True,
            **TUNED,
        ) as llm:
            kinds.append([type(impl).__name__ for impl in impls_of(llm)])
            tuned.append([each.attn_temperature_tuning for each in attentions_of(llm)])
            sides.append(generate(llm, prompts))
            if cascade is None:
                with_factor = generate(llm, longer)
                for each in attentions_of(llm):
                    each.attn_temperature_tuning = False
                without = generate(llm, longer)
    assert kinds[1] == ["CPUAttentionBackendImpl", "CascadeImpl"] * 2
    assert tuned == [[False, True] * 2, [False] * 4]
    assert not torch.allclose(with_factor[0].logprobs, without[0].logprobs, rtol=0, atol=1e-3)
    assert_same(sides[1], sides[0])


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama4(tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module", params=["distinct", "blend"])
def policy(request: pytest.FixtureRequest) -> str:
    """With pages as large as those of the other layers, and with larger ones."""
    return request.param


@pytest.fixture(scope="module")
def alone(llama4: str, policy: str) -> Played:
    """Prompts one after the other, each in one chunk of the scheduler's."""
    return play(llama4, policy, max_num_batched_tokens=4096, max_num_seqs=1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 300},
        {
            "max_num_batched_tokens": 300,
            "preempt_at": (3, 9, 30),
            "max_model_len": 2400,
            "num_gpu_blocks_override": 60,
        },
    ],
    ids=["chunks", "preempted"],
)
def test_past_the_budget_together_as_alone(
    llama4: str, policy: str, alone: Played, options: dict[str, Any]
) -> None:
    played = play(llama4, policy, **options)
    assert_same(played.answers, alone.answers)
    assert [bool(kept) for kept in played.kept] == [n > CASCADE["cache_tokens"] for n in LENGTHS]
    for mine, other in zip(played.kept, alone.kept, strict=True):
        assert mine.keys() == other.keys()
        for k in mine:
            assert mine[k].shape[:2] == (2, 2)
            assert torch.equal(mine[k], other[k])


def test_layers_that_normalize_what_they_have_rotated_are_refused(tmp_path: Path) -> None:
    """Without chunks such layers would be CASCADE's."""
    model = save_llama4(tmp_path, attention_chunk_size=None)
    with (
        pytest.raises(RotationError, match=r"layers\.0\..*changes the rotated query or key"),
        engine(CASCADE, model, block_size=32, skip_tokenizer_init=True),
    ):
        pass


def test_through_the_transformers_backend_it_is_refused(llama4: str) -> None:
    """There vLLM makes chunked layers attend in full."""
    options = {"block_size": 32, "skip_tokenizer_init": True, "model_impl": "transformers"}
    with (
        pytest.raises(RotationError, match=r"from `self\.rotary_emb\("),
        engine(CASCADE, llama4, **options),
    ):
        pass
