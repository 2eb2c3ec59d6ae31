"""The caches to compare, as the command line names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.structure.config import ConfigError
from vllm_cascade.structure.options import NO_EFFECT, PRESETS, CascadeOptions

FULL = "full"


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache to measure, under its name in the results.

    Attributes:
        label: The cache as the command line names it, with swept values added.
        cascade: The cascade's options as in ``additional_config``; None for vLLM's own attention.
    """

    label: str
    cascade: dict[str, Any] | None = field(hash=False)


def parse_caches(
    specs: Sequence[str], shared: Mapping[str, Any], sweep: Mapping[str, Sequence[Any]]
) -> list[Cache]:
    """Read caches from the command line, and cross each cascade with all swept values.

    Args:
        specs: "full", or a policy and its options: "blend:cache_tokens=2048,stride=256".
        shared: Options of every cascade; a cache's own options win. A policy under which an option
            has no effect does not get the option.
        sweep: Option to values. A policy under which an option has no effect is not crossed with
            the option's values.

    Returns:
        The caches in the order of `specs`.

    Raises:
        CommandError: A cache is unknown or given twice, or no cascade takes a value.
    """
    caches = [
        cache
        for spec in specs
        for cache in ([_full(spec)] if _is_full(spec) else _swept(spec, shared, sweep))
    ]
    labels = [cache.label for cache in caches]
    for label in labels:
        if labels.count(label) > 1:
            raise CommandError(f"cache {label!r} is given twice: leave one out")
    return caches


def parse_options(text: str) -> dict[str, Any]:
    """Read options from a text of the form "name=value,name=value".

    Args:
        text: The options; a value is JSON, or a plain word.

    Raises:
        CommandError: A part has no "=", or a name is given twice.
    """
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name in options:
            why = "is given twice" if equals else "is no name=value"
            raise CommandError(f"{part!r} {why}: write options as name=value,name=value")
        options[name] = _value(value)
    return options


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read swept options from `texts`, each of the form "name=value,value".

    Raises:
        CommandError: A text has no values, or names an option twice or one that no cascade has.
    """
    sweep: dict[str, list[Any]] = {}
    known = [f.name for f in fields(CascadeOptions)]
    for text in texts:
        name, _, values = text.partition("=")
        if name not in known or not values or name in sweep or name == "policy":
            raise CommandError(
                f"--sweep {text!r}: write name=value,value, each name once, of {', '.join(known)} "
                "but policy, which is a cache's name"
            )
        sweep[name] = [_value(value) for value in values.split(",")]
    return sweep


def _is_full(spec: str) -> bool:
    return spec.partition(":")[0] == FULL


def _full(spec: str) -> Cache:
    if spec != FULL:
        raise CommandError(f"cache {spec!r}: full attention has no options; write {FULL!r}")
    return Cache(FULL, None)


def _swept(spec: str, shared: Mapping[str, Any], sweep: Mapping[str, Sequence[Any]]) -> list[Cache]:
    policy, _, rest = spec.partition(":")
    if policy not in PRESETS:
        raise CommandError(
            f"no cache {policy!r}: choose from {', '.join((FULL, *PRESETS))}, options after a colon"
        )
    common = {name: shared[name] for name in shared if name not in NO_EFFECT[policy]}
    names = [name for name in sweep if name not in NO_EFFECT[policy]]
    caches = []
    for values in product(*(sweep[name] for name in names)):
        point = dict(zip(names, values, strict=True))
        own = parse_options(rest)
        for name in point:
            if name in own:
                raise CommandError(f"cache {spec!r} sets {name}, which --sweep varies")
        if "policy" in own or "policy" in common:
            raise CommandError("policy is a cache's name: do not give it as an option")
        cascade = {"policy": policy, **common, **own, **point}
        shown = ",".join(filter(None, [rest, *(f"{k}={v}" for k, v in point.items())]))
        label = f"{policy}:{shown}" if shown else policy
        try:
            CascadeOptions.parse(cascade)
        except ConfigError as error:
            raise CommandError(f"cache {label!r}: {error}") from error
        caches.append(Cache(label, cascade))
    return caches


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
