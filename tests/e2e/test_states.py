"""Finds alone: layers with states beside CASCADE, several of its blocks in one of vLLM's.

Random models of a few layers, of a convolution or of Mamba-2 beside full attention.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from e2e.oracle import check_past_reach
from e2e.support import cascade_manager_of, core_of, engine, impls_of, poisoned
from e2e.test_hybrid import Answer, assert_same, generate
from e2e.tiny import prompt_without_ties, random_prompt
from e2e.tiny_states import save_lfm2, save_nemotron_h
from reference.lfm2 import Lfm2
from vllm_cascade.commands.plan import make_plan
from vllm_cascade.structure.config import ConfigError
from vllm_cascade.support.unsupported import UnsupportedError

CASCADE = {
    "cache_tokens": 512,
    "num_sub_caches": 4,
    "num_sink_tokens": 64,
    "stride": 128,
    "selection_window": 64,
    "trace_tokens": True,
}
# The rotary operator of vLLM's CPU build rotates the queries of LFM2, [num_tokens, num_heads,
# head_size], wrongly; PyTorch's operations do not.
PYTORCH = {"compilation_config": {"custom_ops": ["none"]}}
SHORT_STEPS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 200}
# vLLM makes groups of as many layers each: three of those that attend, with a row of blocks each.
GROUPS = {"num_hidden_layers": 8, "layer_types": ["conv", *["full_attention"] * 3] * 2}
SAVE = {
    "lfm2": save_lfm2,
    "nemotron_h": save_nemotron_h,
    "groups": partial(save_lfm2, **GROUPS),
}


@pytest.mark.parametrize("model_type", SAVE)
def test_under_the_budget_as_vllm(tmp_path: Path, model_type: str) -> None:
    model = SAVE[model_type](tmp_path)
    prompts = [random_prompt(n, seed=n) for n in (5, 63, 340)]
    sides: list[list[Answer]] = []
    for cascade in (None, CASCADE):
        options = {"block_size": 64, "max_model_len": 1024, **SHORT_STEPS, **PYTORCH}
        with engine(cascade, model, **options) as llm:
            kinds = {type(impl).__name__ for impl in impls_of(llm)}
            sides.append(generate(llm, prompts))
    assert kinds == {"CascadeImpl"}
    assert_same(sides[1], sides[0])


@pytest.mark.parametrize(("policy", "block_size"), [("distinct", 64), ("blend", 320)])
def test_past_the_reach_as_the_oracle(tmp_path: Path, policy: str, block_size: int) -> None:
    """With a block of CASCADE's in one of vLLM's, and with five; and what pages hold beside."""
    save_lfm2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = Lfm2(json.loads((tmp_path / "config.json").read_text()), tensors)
    check_past_reach(
        policy,
        lambda num_tokens: prompt_without_ties(num_tokens, seed=1),
        str(tmp_path),
        model,
        first=lambda llm: check_blocks(llm, block_size),
        cascade=CASCADE,
        num_tokens=3900,
        block_size=block_size,
        skip_tokenizer_init=True,
    )


def check_blocks(llm: Any, block_size: int) -> None:
    """CASCADE's blocks stay small, and vLLM's are as large as asked."""
    spec = cascade_manager_of(llm).kv_cache_spec
    assert (spec.config.block_size, spec.block_size) == (64, block_size)
    assert impls_of(llm)[0].config == spec.config


def test_schedules_do_not_matter(tmp_path: Path) -> None:
    """Chunks, batches and preemption, where a state and three blocks of CASCADE's are one block."""
    model, cascade = save_nemotron_h(tmp_path), CASCADE | {"trace_tokens": False}
    prompts = [random_prompt(n, seed=n) for n in (1100, 150, 777)]
    shape = {"max_model_len": 1400, "block_size": 64}
    played = []
    for options, preempt_at in (
        ({"max_num_seqs": 1, "max_num_batched_tokens": 4096}, ()),
        ({"max_num_batched_tokens": 170}, (3, 9, 20)),
        # Five blocks of 192 tokens hold a long request, and a sixth its state.
        ({"max_num_batched_tokens": 300, "num_gpu_blocks_override": 9}, ()),
    ):
        with (
            engine(cascade, model, skip_tokenizer_init=True, **shape, **options) as llm,
            poisoned(llm),
        ):
            spec = cascade_manager_of(llm).kv_cache_spec
            answers = generate(llm, prompts, prompt_logprobs=not preempt_at, preempt_at=preempt_at)
            played.append(answers)
            pool = core_of(llm).scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            assert not pool.enable_caching
        assert (spec.parts, spec.block_size) == (3, 192)
        assert spec.max_blocks * spec.block_size < 1100
    plan = make_plan(model, cascade, dtype="float32", **shape)
    assert (plan.block_size, plan.max_blocks) == (spec.block_size, spec.max_blocks)
    assert plan.layer_bytes == spec.max_blocks * spec.page_size_bytes
    # Of each of two layers, with a block for the states.
    assert plan.request_bytes == 2 * (spec.max_blocks + 1) * spec.page_size_bytes
    assert "2 layers with states" in plan.as_text()
    assert_same(played[1], played[0])
    assert_same(played[2], played[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"block_size": 96}, "multiple of 64"),
        # Smaller blocks, which are not to be had, would allow it.
        ({"additional_config": {"cascade": {"stride": 64}}}, "Nearest: 128$"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "Leave out --speculative-config",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": save_lfm2(tmp_path), "skip_tokenizer_init": True, **options}
    with pytest.raises((UnsupportedError, ConfigError), match=named):
        EngineArgs(attention_backend="CASCADE", **arguments).create_engine_config()
