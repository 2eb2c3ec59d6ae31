"""Options settled for a model, or the error that they raise, with what its message offers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from vllm_cascade.structure.config import CascadeConfig, ConfigError
from vllm_cascade.structure.options import NO_EFFECT, CascadeOptions
from vllm_cascade.structure.resolve import resolve

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
