"""Options, the values they come to, and what is said of those that cannot work.

Every value that a message offers is applied, and has to work.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from config_rules import levels, rules_hold, smallest_number
from vllm_cascade.structure.config import CascadeConfig, ConfigError, Model
from vllm_cascade.structure.options import NO_EFFECT, PRESETS, WEIGHTS, CascadeOptions
from vllm_cascade.structure.resolve import resolve
from vllm_cascade.structure.search import search

quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SHORT = {"block_size": 16, "max_model_len": 8192, "position_limit": 8192}


def settle(options: dict[str, Any], **model: int) -> CascadeConfig:
    """Parse and resolve, for an 8192-position model unless told otherwise."""
    return resolve(CascadeOptions.parse(options), **{**SHORT, **model})


def refusal(options: dict[str, Any], **model: int) -> ConfigError:
    """The error that `options` raise."""
    with pytest.raises(ConfigError) as caught:
        settle(options, **model)
    return caught.value


def amended(options: dict[str, Any], error: ConfigError) -> dict[str, Any]:
    """`options` with what the message of `error` offers."""
    offer = re.search(
        r"(?:Nearest: ([^\s;]+)|Leave it out)(?:; and leave out ([^;]+))?(?:; or|$)", str(error)
    )
    assert offer, str(error)
    dropped = [error.field, *(offer[2] or "").split(", ")]
    kept = {name: value for name, value in options.items() if name not in dropped}
    return kept | ({error.field: json.loads(offer[1])} if offer[1] else {})


def with_effect(options: dict[str, Any]) -> dict[str, Any]:
    """`options` but for those that change nothing beside the others."""
    without = set(NO_EFFECT[options["policy"]])
    if options.get("num_sub_caches") == 1:
        without |= set(NO_EFFECT["window"]) - {"num_sub_caches"}
    return {name: value for name, value in options.items() if name not in without}


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


# What cannot work.


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"num_sink_tokens": -1}, {}),
        ({"num_sink_tokens": 10}, {}),
        ({"num_sink_tokens": 10}, {"block_size": 128}),
        ({"num_sink_tokens": 100_000}, {}),
        ({"num_sink_tokens": 8192}, {}),
        ({"cache_tokens": 0}, {}),
        ({"cache_tokens": -5}, {}),
        ({"cache_tokens": 100}, {}),
        ({"cache_tokens": 50, "num_sub_caches": 4}, {}),
        ({"cache_tokens": 8192}, {}),
        ({"cache_tokens": 10**30}, {}),
        ({"cache_tokens": 10**30}, {"block_size": 128, "position_limit": 131_072}),
        ({"cache_tokens": 1024, "num_sub_caches": 8, "stride": 512}, {}),
        ({"stride": 0}, {}),
        ({"stride": -64}, {}),
        ({"stride": 100}, {}),
        ({"stride": 10**9}, {}),
        ({"stride": 2048, "cache_tokens": 512, "num_sub_caches": 4}, {}),
        ({"num_sub_caches": 0}, {}),
        ({"num_sub_caches": 64}, {"block_size": 128}),
        ({"num_sub_caches": 10**9}, {}),
        ({"num_sub_caches": 10**9, "cache_tokens": 4096}, {}),
        ({"num_sub_caches": 2, "policy": "window"}, {}),
        ({"selection_window": 1}, {}),
        ({"selection_window": 48}, {}),
        ({"selection_window": 8192}, {}),
        ({"selection_window": 3 * 10**9}, {}),
        ({"selection_window": 256, "stride": 128}, {}),
        ({"policy": "blend", "score_decay": 1.5}, {}),
        ({"policy": "blend", "score_decay": 0.5}, {}),
        ({"policy": "blend", "score_decay": 0.9, "stride": 1024}, {}),
        ({"policy": "paper", "score_decay": 1e-300}, {"block_size": 128}),
        ({"key_weight": -0.5}, {}),
        ({"value_weight": -0.5}, {}),
        ({"newest_share": 2}, {}),
        ({"stride": 100, "num_sink_tokens": 10}, {}),
        ({"stride": 64}, {}),
        (
            {
                "policy": "blend",
                "cache_tokens": 16,
                "num_sub_caches": 5,
                "stride": 7,
                "score_decay": 0.1,
            },
            {},
        ),
    ],
)
def test_a_broken_rule_names_field_value_and_a_value_that_works(
    options: dict[str, Any], model: dict[str, int]
) -> None:
    error = refusal(options, **model)
    assert error.field in options
    assert f"{error.field!r} = {options[error.field]!r}" in str(error)
    settle(amended(options, error), **model)


def test_each_limit_is_exact() -> None:
    given_options = {
        "policy": "blend",
        "cache_tokens": 1024,  # sub-caches of 256 tokens
        "num_sub_caches": 4,
        "newest_share": 0.0,
        "stride": 512,
        "selection_window": 64,
        "score_decay": math.exp(math.log(1e-3) / 512) + 1e-12,
    }
    places = 64 + 1024 + 512 + 3 * (64 - 16)
    config = settle(given_options, position_limit=places)
    assert config.max_places == places
    for model, changes, field in [
        ({"position_limit": places - 1}, {}, "stride"),  # which forbids a smaller budget
        ({}, {"cache_tokens": 1023}, "stride"),
        ({}, {"stride": 576, "score_decay": 0.9999}, "stride"),
        ({}, {"score_decay": given_options["score_decay"] - 1e-9}, "score_decay"),
    ]:
        error = refusal(given_options | changes, **{"position_limit": places} | model)
        assert error.field == field


@given(
    block=st.sampled_from([16, 32, 64, 128]),
    positions=st.integers(1024, 40_000),
    longest=st.integers(1, 100_000),
    options=st.fixed_dictionaries(
        {"policy": st.sampled_from(["distinct", "blend", "paper"])},
        optional={
            "num_sub_caches": st.integers(1, 100),
            "newest_share": st.floats(0.0, 1.5),
            "num_sink_tokens": st.integers(0, 50_000),
            "cache_tokens": st.integers(-10, 50_000),
            "stride": st.one_of(st.integers(-10, 5000), st.integers(1, 80).map(lambda n: n * 64)),
            "selection_window": st.one_of(st.integers(2, 9000), st.sampled_from([16, 1024, 4096])),
            "score_decay": st.floats(0.01, 1.0),
        },
    ),
)
@quick
def test_any_refusal_blames_what_was_set_and_offers_what_works(
    block: int, positions: int, longest: int, options: dict[str, Any]
) -> None:
    model = {"block_size": block, "max_model_len": longest, "position_limit": positions}
    options = with_effect(options)
    try:
        settle(options, **model)
        return
    except ConfigError as caught:
        error = caught
    if error.field == "block_size":  # the defaults fail too: the model is to blame
        with pytest.raises(ConfigError):
            settle({"policy": options["policy"]}, **model)
        return
    assert error.field in options
    settle(amended(options, error), **model)
    if fitting := re.search(r"; or keep what was given .*--block-size (\d+)$", str(error)):
        settle(options, **{**model, "block_size": int(fitting[1])})


def test_options_for_smaller_blocks_may_be_kept() -> None:
    options = {"cache_tokens": 1024, "structure": "fixed"}
    error = refusal(options, block_size=128, max_model_len=20_000)
    assert str(error).endswith(
        "Nearest: 1152; or keep what was given and start vLLM with --block-size 64"
    )
    settle(options, block_size=64, max_model_len=20_000)
    assert "block-size" not in str(refusal({"cache_tokens": 63}, block_size=16))


# Values of every option that some policy takes, and that none takes.
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "structure": st.sampled_from(["fixed", "elastic"]),
    "num_sub_caches": st.sampled_from(["auto", 1, 2, 4]),
    "newest_share": st.sampled_from([0.0, 0.25, 0.5]),
    "selection_window": st.sampled_from([2, 64, 128]),
    "score_weight": st.sampled_from([0, 0.5, 2]),
    "key_weight": st.sampled_from([0, 0.5, 2]),
    "value_weight": st.sampled_from([0, 0.5, 2]),
    "score_power": st.sampled_from([0.5, 2]),
    "score_reduction": st.sampled_from(["max", "mean"]),
    "score_decay": st.sampled_from([0.9999, 1.0]),
    "num_sink_tokens": st.sampled_from([0, 64]),
    "cache_tokens": st.sampled_from([1024, 2048]),
    "stride": st.sampled_from([128, 256]),
}
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "num_sub_caches": st.integers(-3, 0) | st.integers(40, 10**6),
    "newest_share": st.floats(-3, -0.01) | st.floats(1.01, 1e308),
    "selection_window": st.integers(-5, 1) | st.integers(129, 5000),
    **dict.fromkeys(("score_weight", "key_weight", "value_weight"), st.floats(-9, -0.01)),
    "score_power": st.floats(-3, 0),
    "score_decay": st.floats(-1, 0.5) | st.floats(1.1, 9),
    "num_sink_tokens": st.integers(-5, -1) | st.integers(65, 10**6),
    "cache_tokens": st.integers(-5, 63) | st.integers(8000, 10**9),
    "stride": st.integers(-5, 127) | st.integers(1025, 10**6),
}


@given(
    policy=st.sampled_from([*PRESETS]),
    options=st.fixed_dictionaries({}, optional=RIGHT),
    wrong=st.one_of(
        *(st.tuples(st.just(name), values | RIGHT[name]) for name, values in WRONG.items())
    ),
)
@settings(quick, max_examples=400)
def test_what_a_refusal_advises_is_not_refused(
    policy: str, options: dict[str, Any], wrong: tuple[str, Any]
) -> None:
    """One option goes wrong beside any that are right: by its value, or without effect.

    Where it would have an effect, a value that is wrong is told of then.
    """
    model = {"block_size": 16, "max_model_len": 100_000, "position_limit": 8192}

    def error_of(given: dict[str, Any]) -> ConfigError | None:
        try:
            settle(given, **model)
        except ConfigError as error:
            return error
        return None

    options = {"policy": policy, **options}
    options.pop(wrong[0], None)
    assume(error_of(options) is None)
    options |= dict([wrong])
    error = error_of(options)
    if error is None:
        return
    said = str(error)
    advised = 0
    if "Nearest: " in said:
        advised += 1
        assert error_of(amended(options, error)) is None, said
    # Else another option has lost its effect by the one that went wrong, perhaps not alone.
    if "eave it out" in said and error.field == wrong[0]:
        advised += 1
        without = {name: value for name, value in options.items() if name != error.field}
        assert error_of(without) is None, said
    for other in re.findall(r"\"(\w+)\"", said.partition("take policy")[2]):
        assert "no effect" not in str(error_of({**options, "policy": other})), (said, other)
    if "num_sub_caches 2 or more" in said:
        advised += 1
        assert "no effect" not in str(error_of({**options, "num_sub_caches": 2})), said
    if "score_weight a value above 0" in said:
        advised += 1
        assert "no effect" not in str(error_of({**options, "score_weight": 0.5})), said
    if "Give one of them a value above 0" in said:
        names = re.findall(r"\w+_weight", said.partition("choose tokens by: ")[2])
        advised += 1
        # Beside an option of scores it has to be theirs.
        assert any(error_of({**options, name: 0.5}) is None for name in names), said
    assert advised, said


@given(
    field=st.sampled_from(["num_sink_tokens", "cache_tokens", "num_sub_caches", "stride"]),
    value=st.integers(1, 4000),
    number=st.integers(1, 6),
)
@quick
def test_the_value_offered_is_the_nearest(field: str, value: int, number: int) -> None:
    given_options = {"num_sub_caches": number} | {field: value}
    model = {"block_size": 32, "max_model_len": 2048, "position_limit": 2048}

    def works(candidate: int) -> bool:
        options = CascadeOptions.parse(given_options | {field: candidate})
        return isinstance(search(options, Model(**model)), CascadeConfig)

    assume(not works(value))
    error = refusal(given_options, **model)
    assert error.field == field
    offered = amended(given_options, error)[field]
    step = {"num_sub_caches": 1, "stride": 64}.get(field, 32)  # nothing between can be better
    least = 0 if field == "num_sink_tokens" else step
    grid = sorted(range(least, 2 * value + offered, step), key=lambda other: abs(other - value))
    nearer = [other for other in grid if abs(other - value) < abs(offered - value)]
    assert not any(map(works, nearer[:4] + nearer[-24:]))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"policy": "blend", "num_sub_caches": 64, "score_decay": 0.9999}, "num_sub_caches"),
        ({"policy": "blend", "num_sub_caches": 2, "score_decay": 0.5}, "score_decay"),
        ({"selection_window": 16, "stride": 100}, "stride"),
        ({"cache_tokens": 2048, "num_sink_tokens": 12_800}, "num_sink_tokens"),
    ],
)
def test_the_innocent_are_not_blamed(options: dict[str, Any], field: str) -> None:
    assert refusal(options, block_size=128).field == field


def test_several_culprits_are_all_named() -> None:
    error = refusal({"num_sink_tokens": 10, "stride": 100})
    assert error.field == "num_sink_tokens"
    assert str(error).endswith("Nearest: 16; and leave out stride")


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ({"block_size": 128, "max_model_len": 512, "position_limit": 512}, "block_size"),
        ({"block_size": 4096}, "block_size"),
        ({"block_size": 65_536}, "block_size"),
        ({"block_size": 96}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"max_model_len": 1 << 20, "position_limit": 448}, "max_model_len"),
    ],
)
def test_a_model_that_no_options_fit_says_what_flag_would_help(
    model: dict[str, int], fix: str
) -> None:
    error = refusal({}, **model)
    offer = re.search(r"Start vLLM with --([a-z-]+) (\d+)$", str(error))
    assert offer, str(error)
    assert offer[1].replace("-", "_") == fix
    settle({}, **{**model, fix: int(offer[2])})


def test_a_model_too_small_for_any_block_size_is_told_so() -> None:
    assert "another attention backend" in str(refusal({}, position_limit=128))


@pytest.mark.parametrize("name", ["cache_token", "sinks", "", "Policy", 7])
def test_an_unknown_option_is_named_with_those_that_exist(name: object) -> None:
    error = refusal({name: 1})
    assert error.field == str(name)
    for known in ("policy", "cache_tokens", "num_sub_caches", "trace_tokens"):
        assert known in str(error)


@pytest.mark.parametrize("given", [None, [], "blend", 5])
def test_options_must_be_an_object(given: Any) -> None:
    with pytest.raises(ConfigError, match="must be a JSON object"):
        CascadeOptions.parse(given)


INTEGERS = ("cache_tokens", "num_sub_caches", "num_sink_tokens", "stride", "selection_window")
REALS = ("key_weight", "value_weight", "newest_share", "score_weight", "score_power", "score_decay")


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in INTEGERS for value in (True, False, 512.0, "512", [1], {}, math.nan)]
    + [("num_sub_caches", "Auto"), ("cache_tokens", "auto")]
    + [
        (name, value)
        for name in REALS
        for value in (True, "1", [], math.nan, math.inf, -math.inf, 10**400)
    ]
    + [("score_power", 0), ("score_power", -1.0), ("score_decay", 0), ("score_decay", -0.5)]
    + [("policy", value) for value in ("Blend", "", 1, True, [], {})]
    + [("score_reduction", value) for value in ("sum", 1, False, [])]
    + [("trace_tokens", value) for value in (0, 1, "true", [], 1.0)],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(field: str, value: object) -> None:
    # Of a policy under which every option has an effect.
    with pytest.raises(ConfigError) as caught:
        CascadeOptions.parse({"policy": "blend", field: value})
    assert caught.value.field == field
    assert f"{field!r} = {value!r}: " in str(caught.value)


# What cannot have an effect.

# Of each option a value that would be right elsewhere, and one that would be wrong everywhere.
VALUES: dict[str, tuple[Any, Any]] = {
    "num_sub_caches": (2, -1),
    "newest_share": (0.25, 7),
    "selection_window": (128, 3),
    "score_weight": (1, -1),
    "key_weight": (0.5, "much"),
    "value_weight": (1, -0.5),
    "score_power": (2, 0),
    "score_reduction": ("mean", "sum"),
    "score_decay": (0.9999, 2),
    "structure": ("elastic", "loose"),
}
WHY = {
    "distinct": 'policy "distinct" does not look at attention scores',
    "window": 'policy "window" never chooses between tokens',
    "alone": "a single sub-cache drops its oldest tokens and never chooses between tokens. Leave "
    "it out, or give num_sub_caches 2 or more",
    "unscored": "score_weight is 0, so no scores are kept. Leave it out, or give score_weight a "
    "value above 0",
}


@pytest.mark.parametrize("which", [0, 1], ids=["right", "wrong"])
@pytest.mark.parametrize(
    ("policy", "name"),
    [(policy, name) for policy, names in NO_EFFECT.items() for name in names],
)
def test_a_policy_refuses_options_without_effect(policy: str, name: str, which: int) -> None:
    """Before it looks at the value: nobody mends what has to go."""
    value = VALUES[name][which]
    error = refusal({"policy": policy, name: value})
    assert error.field == name
    if name == "num_sub_caches":
        assert str(error).endswith(
            'policy "window" has exactly one sub-cache, unlike the other policies. Nearest: 1'
        )
        return
    # Where it would have one. What a model has to tell is told there.
    is_served = which == 0 or name in ("newest_share", "selection_window")
    others = [f'"{other}"' for other in PRESETS if name not in NO_EFFECT[other] and is_served]
    instead = f"Leave it out, or take policy {' or '.join(others)}" if others else "Leave it out"
    said = f"cascade option {name!r} = {value!r}: would have no effect: {WHY[policy]}. {instead}"
    assert str(error) == said


@pytest.mark.parametrize("policy", ["distinct", "blend", "paper"])
@pytest.mark.parametrize("name", sorted(VALUES.keys() - {"num_sub_caches", "structure"}))
def test_one_sub_cache_refuses_options_without_effect(policy: str, name: str) -> None:
    value = VALUES[name][0]
    error = refusal({"policy": policy, "num_sub_caches": 1, name: value})
    assert error.field == name
    # What would have no effect in several either is told so.
    why = WHY[policy] if name in NO_EFFECT[policy] else WHY["alone"]
    assert f"would have no effect: {why}" in str(error)


@pytest.mark.parametrize("name", ["score_power", "score_reduction", "score_decay"])
@pytest.mark.parametrize(
    "options", [{"policy": "blend"}, {"policy": "paper", "value_weight": 1}], ids=str
)
def test_no_scores_refuse_what_makes_scores(options: dict[str, Any], name: str) -> None:
    value = VALUES[name][0]
    assert settle({**options, name: value}).needs_scores
    error = refusal({**options, "score_weight": 0, name: value})
    assert error.field == name
    assert str(error).endswith(f"would have no effect: {WHY['unscored']}")


def test_every_option_that_is_refused_somewhere_is_served_elsewhere() -> None:
    for name, (value, _) in VALUES.items():
        settle({"policy": "blend", name: value}, max_model_len=100_000)


def test_a_negative_weight_is_offered_what_decides() -> None:
    """0 is no offer where it would leave nothing to choose by, or another option without effect."""
    assert str(refusal({"key_weight": -1})).endswith("must be at least 0. Nearest: 0")
    for options in ({"policy": "paper"}, {"policy": "blend", "score_power": 3}):
        error = refusal({**options, "score_weight": -1})
        assert error.field == "score_weight"
        assert str(error).endswith("Give a value above 0, or leave it out")
        settle({**options, "score_weight": 0.5})
        settle(options)


def test_one_sub_cache_is_not_offered_to_who_sets_what_it_ignores() -> None:
    assert str(refusal({"num_sub_caches": 0})).endswith("Nearest: 1")
    assert str(refusal({"num_sub_caches": 0, "key_weight": 0.5})).endswith("Nearest: 2")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"key_weight": 0, "value_weight": 0}, "key_weight"),
        ({"policy": "blend", "key_weight": 0, "value_weight": 0, "score_weight": 0}, None),
        ({"policy": "paper", "score_weight": 0}, "score_weight"),
        ({"policy": "paper", "score_weight": 0, "value_weight": 0}, None),
    ],
    ids=str,
)
def test_something_has_to_decide(options: dict[str, Any], field: str | None) -> None:
    error = refusal(options)
    assert error.field in options
    assert field in (None, error.field)
    weights = "key_weight, value_weight" if "policy" not in options else ", ".join(WEIGHTS)
    assert f"choose tokens by: {weights} are all 0" in str(error)
    assert str(error).endswith("Give one of them a value above 0")
    settle({**options, error.field: 0.5})


@pytest.mark.parametrize("given", [{}, {"num_sub_caches": 1}, {"num_sub_caches": "auto"}])
def test_the_window_policy_has_one_sub_cache(given: dict[str, Any]) -> None:
    config = settle({"policy": "window", **given}, max_model_len=10**6)
    assert config.num_sub_caches == 1
    assert config.reach == config.num_sink_tokens + config.sub_cache_tokens[0]


def test_an_error_survives_a_pickle() -> None:
    error = refusal({"stride": 100})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field) == (str(error), "stride")
    assert isinstance(again, ValueError)
