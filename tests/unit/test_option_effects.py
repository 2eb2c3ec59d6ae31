"""Options that would change nothing are refused, with what would."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from settling import refusal, settle
from vllm_cascade.structure.options import NO_EFFECT, PRESETS, WEIGHTS

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
