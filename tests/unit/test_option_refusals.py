"""What is said of options that cannot work: every value that a message offers has to work."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from settling import amended, quick, refusal, settle, with_effect
from vllm_cascade.structure.config import CascadeConfig, ConfigError, Model
from vllm_cascade.structure.options import PRESETS, CascadeOptions
from vllm_cascade.structure.search import search

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
