"""What is logged of a configuration that is served: of prefixes, and of a policy that changed."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_cascade.support.resolved import resolve_options
from vllm_cascade.support.states import leave_states
from vllm_cascade.support.validate import log_prefix_caching, validate


def test_prefix_caching_is_left_on_and_logged_once(served, said):
    served.cache_config.enable_prefix_caching = True
    validate(served)
    validate(served)
    assert sum("Prefix caching with CASCADE" in message for message in said) == 1
    assert served.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("options", "changed", "former"),
    [
        (
            {},
            "ranks values as well and compares 128 neighbours, not 64",
            '"value_weight": 0, "selection_window": 64',
        ),
        ({"selection_window": 64}, "ranks values as well", '"value_weight": 0'),
        ({"value_weight": 0}, "compares 128 neighbours, not 64", '"selection_window": 64'),
    ],
    ids=str,
)
def test_who_asks_for_blend_is_told_once_what_it_has_become(
    served, said, forget_once, options, changed, former
):
    served.model_config.max_model_len = 100_000
    served.additional_config = {"cascade": {"policy": "blend", **options}}
    validate(served)
    validate(served)
    (message,) = [message for message in said if "blend" in message]
    assert message == (
        f'Policy "blend" now {changed}. Its former rule comes back with {former} in the '
        "cascade's options."
    )
    # As it says.
    served.additional_config["cascade"] |= json.loads(f"{{{former}}}")
    config = resolve_options(served)
    assert (config.score_weight, config.key_weight, config.value_weight) == (1, 1, 0)
    assert config.selection_window == 64
    said.clear()
    forget_once()
    validate(served)
    assert not said


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "distinct"},
        {"policy": "paper"},
        {"policy": "blend", "value_weight": 1, "selection_window": 128},
        {"policy": "blend", "num_sub_caches": 1},
        {"policy": "blend", "num_sub_caches": 2, "cache_tokens": 3584, "max_model_len": 3000},
    ],
    ids=str,
)
def test_others_are_told_nothing_of_blend(served, said, forget_once, options):
    """Nor is who has said what it should be, or for whom it never chooses."""
    served.model_config.max_model_len = options.pop("max_model_len", 100_000)
    served.additional_config = {"cascade": options}
    validate(served)
    assert not said


def test_prefix_caching_never_hits_beside_other_backends(said):
    log_prefix_caching(
        SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            model_config=None,
            attention_config=SimpleNamespace(backend_per_kind={"full_attention": "CASCADE"}),
        )
    )
    assert sum("never hits" in message for message in said) == 1


@pytest.mark.parametrize("caches", [True, False])
def test_prefix_caching_is_turned_off_beside_states(served, said, caches):
    served.model_config.attn_type = "hybrid"
    cache = served.cache_config
    cache.enable_prefix_caching, cache.user_specified_block_size = caches, False
    validate(served)
    leave_states(served)
    assert (cache.enable_prefix_caching, cache.mamba_cache_mode) == (False, "none")
    assert cache.mamba_block_size == served.model_config.max_model_len
    (line,) = (message for message in said if "layers with states" in message)
    assert ("Prefix caching is off" in line) == caches
    assert not any("requests share whole blocks" in message for message in said)
