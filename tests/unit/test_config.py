"""What options come to that a user has not set, and that those that are set arrive."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_rules import levels, rules_hold, smallest_number
from settling import quick, settle, with_effect
from vllm_cascade.structure.config import ConfigError
from vllm_cascade.structure.options import PRESETS, CascadeOptions

# What "not set" comes to.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            {"block_size": 16, "max_model_len": 8192, "position_limit": 8192},
            {"cache_tokens": 7872, "num_sub_caches": 8, "num_sink_tokens": 64, "stride": 256},
        ),
        (
            {"block_size": 128, "max_model_len": 8192, "position_limit": 8192},
            {"cache_tokens": 7808, "num_sub_caches": 7, "num_sink_tokens": 128, "stride": 256},
        ),
        (
            {"block_size": 16, "max_model_len": 131_072, "position_limit": 131_072},
            {"cache_tokens": 16_384, "num_sub_caches": 12, "num_sink_tokens": 64, "stride": 1024},
        ),
        (
            {"block_size": 16, "max_model_len": 1_048_576, "position_limit": 131_072},
            {"cache_tokens": 16_384, "num_sub_caches": 15, "num_sink_tokens": 64, "stride": 1024},
        ),
        (
            {"block_size": 128, "max_model_len": 1_048_576, "position_limit": 8192},
            {"cache_tokens": 7808, "num_sub_caches": 14, "num_sink_tokens": 128, "stride": 256},
        ),
        (
            {"block_size": 128, "max_model_len": 2048, "position_limit": 2048},
            {"cache_tokens": 1664, "num_sub_caches": 5, "num_sink_tokens": 128, "stride": 256},
        ),
    ],
)
def test_defaults(model: dict[str, int], expected: dict[str, int]) -> None:
    config = settle({}, **model)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.reach >= config.max_model_len == model["max_model_len"]
    assert config.max_places <= model["position_limit"]
    assert (config.policy, config.structure) == ("distinct", "elastic")
    assert config.stays_in_budget
    assert (config.score_weight, config.key_weight, config.value_weight) == (0, 1, 1)
    assert config.selection_window == 128
    assert config.block_size == model["block_size"]
    assert config.trace_tokens is False


@given(
    block=st.sampled_from([16, 32, 64, 128, 256]),
    positions=st.integers(512, 20_000),
    longest=st.integers(1, 2**20),
    policy=st.sampled_from([*PRESETS]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "num_sub_caches": st.integers(1, 12),
            "newest_share": st.sampled_from([0.0, 0.25, 0.75]),
            "num_sink_tokens": st.sampled_from([0, 256, 1024]),
            "cache_tokens": st.integers(64, 20_000),
            "stride": st.sampled_from([64, 256, 512, 2048]),
            "selection_window": st.sampled_from([2, 16, 512]),
            "score_decay": st.sampled_from([0.99, 0.9999]),
        },
    ),
)
@quick
def test_defaults_are_the_largest_that_work(
    block: int, positions: int, longest: int, policy: str, options: dict[str, Any]
) -> None:
    options = with_effect({"policy": policy, **options})
    del options["policy"]
    sinks = options.get("num_sink_tokens", -(-64 // block) * block)
    window = options.get("selection_window", PRESETS[policy]["selection_window"])
    group = max(window, 2 * block)
    structure = options.get("structure", PRESETS[policy]["structure"])
    if "num_sub_caches" in options:
        structure = "fixed"
    step = group // 2 if structure == "elastic" else block
    budgets = [options["cache_tokens"]] if "cache_tokens" in options else range(16_384, 0, -step)
    strides = (
        [options["stride"]] if "stride" in options else range(1024 // group * group, 0, -group)
    )

    share = options.get("newest_share", PRESETS[policy]["newest_share"])
    floor = 0 if "stride" in options else 256

    def best(floor: int) -> tuple[int, int, int] | None:
        for cache in budgets:
            number = 1 if policy == "window" else options.get("num_sub_caches")
            number = number or smallest_number(cache, sinks, block, longest, share)
            if structure == "elastic":
                number = levels(longest, block, window)
            most = cache / 4 if structure == "elastic" and "stride" not in options else math.inf
            fit: list[tuple[int, int, int]] = []
            for stride in [s for s in strides if s >= floor] if number else ():
                if rules_hold(
                    block=block, sinks=sinks, cache=cache, number=number, stride=stride,
                    window=window, decay=options.get("score_decay", 0.9999999),
                    positions=positions, share=share, structure=structure, longest=longest,
                ):  # fmt: skip
                    fit.append((cache, number, stride))
            if fit:  # a quarter of the budget at most, if one of them is
                return next((found for found in fit if found[2] <= most), fit[-1])
        return None

    model = {"block_size": block, "max_model_len": longest, "position_limit": positions}
    try:
        config = settle({"policy": policy, **options}, **model)
    except ConfigError:
        assert best(floor) is best(0) is None
    else:
        assert (config.cache_tokens, config.num_sub_caches, config.stride) == (
            best(floor) or best(0)
        )
        assert config.num_sink_tokens == sinks
        assert config.selection_window == window


def test_a_group_larger_than_the_default_stride_sets_the_stride() -> None:
    assert settle({"selection_window": 2048}, position_limit=65_536).stride == 2048


def test_auto_is_the_smallest_number_whose_reach_covers_the_longest_request() -> None:
    given = {"cache_tokens": 2048, "stride": 256, "structure": "fixed"}
    config = settle(given | {"num_sub_caches": "auto"}, max_model_len=32_768)
    assert config == settle(given, max_model_len=32_768)
    assert config.reach >= 32_768
    fewer = replace(config, num_sub_caches=config.num_sub_caches - 1)
    assert fewer.reach < 32_768


def test_null_stands_for_not_set() -> None:
    names = CascadeOptions.__slots__
    assert CascadeOptions.parse(dict.fromkeys(names)) == CascadeOptions()


# Policy -> what it ranks by, how many neighbours it compares, and how large sub-cache 0 is.
KNOBS = {
    "distinct": {
        "score_weight": 0.0, "key_weight": 1.0, "value_weight": 1.0, "selection_window": 128,
        "newest_share": 0.25,
    },
    "blend": {
        "score_weight": 1.0, "key_weight": 1.0, "value_weight": 1.0, "selection_window": 128,
        "newest_share": 0.25, "score_power": 2.0, "score_reduction": "max",
        "score_decay": 0.9999999,
    },
    "paper": {
        "score_weight": 1.0, "key_weight": 0.0, "value_weight": 0.0, "selection_window": 2,
        "newest_share": 0.0, "score_power": 1.0, "score_reduction": "max",
        "score_decay": 0.9999999,
    },
}  # fmt: skip


@pytest.mark.parametrize("policy", [*KNOBS])
def test_a_policy_presets_its_knobs_and_a_set_knob_wins(policy: str) -> None:
    expected = KNOBS[policy]
    config = settle({"policy": policy})
    assert {name: getattr(config, name) for name in expected} == expected
    own: dict[str, float] = {
        "key_weight": 0.25, "value_weight": 3.0, "selection_window": 16, "newest_share": 0.5,
    }  # fmt: skip
    if policy != "distinct":
        own |= {"score_weight": 0.5, "score_power": 1.5}
    config = settle({"policy": policy, **own})
    assert {name: getattr(config, name) for name in own} == own


def test_every_option_reaches_the_configuration() -> None:
    given = {
        "policy": "paper",
        "cache_tokens": 1000,
        "structure": "fixed",
        "num_sub_caches": 3,
        "newest_share": 0.45,
        "num_sink_tokens": 32,
        "stride": 128,
        "selection_window": 8,
        "score_weight": 0.5,
        "score_power": 1,
        "key_weight": 2,
        "value_weight": 0.25,
        "score_reduction": "mean",
        "score_decay": 0.999,
        "trace_tokens": True,
    }
    config = settle(given)
    assert given.keys() == CascadeOptions.__dataclass_fields__.keys()
    assert {name: getattr(config, name) for name in given} == given
    assert isinstance(config.score_power, float)
    # 62 blocks of 16, of which 27 are the newest one's share, and one is left over.
    assert config.sub_cache_tokens == (448, 272, 272)
    assert config.group_tokens == 32
    assert config.max_places == 32 + 992 + 128 + 2 * (32 - 16)
    assert config.reach == 32 + 448 + 272 * (2 + 4)
    assert "stride=128" in config.summary()
    assert "\n" not in config.summary()


@pytest.mark.parametrize("policy", ["distinct", "blend", "paper"])
def test_scores_are_needed_only_where_they_choose(policy: str) -> None:
    def of(options: dict[str, Any], longest: int) -> tuple[bool, bool]:
        config = settle({"policy": policy, **options}, max_model_len=longest)
        return config.chooses, config.needs_scores

    scored = policy != "distinct"
    assert of({}, 100_000) == (True, scored)
    assert of({"num_sub_caches": 1}, 100_000) == (False, False)
    fits = {"cache_tokens": 4096, "num_sub_caches": 4}
    assert of(fits, 4096 + 64) == (False, False)
    assert of(fits, 4096 + 64 + 1) == (True, scored)
    if scored:
        assert of({"score_weight": 0, "key_weight": 1}, 100_000) == (True, False)


def test_a_window_never_chooses() -> None:
    config = settle({"policy": "window"}, max_model_len=100_000)
    assert (config.chooses, config.needs_scores) == (False, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["selection_window", "score_weight", "key_weight", "value_weight"]),
        ({"policy": "window"}, []),
        ({"num_sub_caches": 1}, []),
        (
            {"policy": "blend"},
            [
                "selection_window", "score_weight", "key_weight", "value_weight", "score_power",
                "score_reduction", "score_decay",
            ],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_summary_tells_what_decides(options: dict[str, Any], told: list[str]) -> None:
    summary = settle(options, max_model_len=100_000).summary()
    knobs = {*PRESETS["blend"]} - {"newest_share", "structure"}
    assert {name for name in knobs if f"{name}=" in summary} == set(told)
