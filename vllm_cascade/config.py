"""What a user may ask of the cascade, and the values it comes to for one model.

Pure Python: imports neither torch nor vLLM, so that a configuration can be checked anywhere.
Source of the method: Willette et al., arXiv 2406.17808.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vllm_cascade.refusal import MIN_BLOCK_SIZE, refusal
from vllm_cascade.rules import (
    CascadeConfig,
    ConfigError,
    Fault,
    Model,
    broken_rule,
    shares,
    spanned,
)

__all__ = ["NO_EFFECT", "PRESETS", "CascadeConfig", "CascadeOptions", "ConfigError"]

DEFAULT_CACHE_TOKENS = 16_384
DEFAULT_STRIDE = 1_024
# A shorter one makes prefill slow; it is taken only where nothing longer fits.
LEAST_DEFAULT_STRIDE = 256
DEFAULT_SINK_TOKENS = 64

# How attention becomes a score, where scores are kept.
SCORE_KNOBS = ("score_power", "score_reduction", "score_decay")
WEIGHTS = ("score_weight", "key_weight", "value_weight")
_BY_SCORE = {"score_power": 1.0, "score_reduction": "max", "score_decay": 0.9999999}
_BY_KIND = {"selection_window": 128, "key_weight": 1.0, "value_weight": 1.0, "newest_share": 0.25}
_PLAIN = {"selection_window": 2, "key_weight": 0.0, "value_weight": 0.0, "newest_share": 0.0}

# policy -> the knobs it presets; a knob that the user sets wins.
PRESETS: dict[str, dict[str, Any]] = {
    "distinct": {**_BY_KIND, **_BY_SCORE, "score_weight": 0.0, "score_power": 2.0},
    "blend": {**_BY_KIND, **_BY_SCORE, "score_weight": 1.0, "score_power": 2.0},
    "paper": {**_PLAIN, **_BY_SCORE, "score_weight": 1.0},
    "window": {**_PLAIN, **_BY_SCORE, "score_weight": 0.0},
}
_CHOICE = ("newest_share", "selection_window", *WEIGHTS, *SCORE_KNOBS)
# policy -> the options that change nothing under it, so that giving one is an error.
NO_EFFECT: dict[str, tuple[str, ...]] = {
    "distinct": ("score_weight", *SCORE_KNOBS),
    "blend": (),
    "paper": (),
    "window": ("num_sub_caches", *_CHOICE),
}
_WHY_NOT = {
    "distinct": 'policy "distinct" does not look at attention scores',
    "window": 'policy "window" never chooses between tokens',
}


@dataclass(frozen=True, slots=True)
class CascadeOptions:
    """The options as the user gave them; None, and ``"auto"``, stand for "not set".

    The fields are those of `CascadeConfig`; ``num_sub_caches`` ``"auto"`` is the smallest number
    whose reach covers the longest request.
    """

    policy: str = "distinct"
    cache_tokens: int | None = None
    num_sub_caches: int | Literal["auto"] = "auto"
    newest_share: float | None = None
    num_sink_tokens: int | None = None
    stride: int | None = None
    selection_window: int | None = None
    score_weight: float | None = None
    key_weight: float | None = None
    value_weight: float | None = None
    score_power: float | None = None
    score_reduction: str | None = None
    score_decay: float | None = None
    trace_tokens: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> CascadeOptions:
        """Read the mapping under ``"cascade"`` of vLLM's ``--additional-config``.

        Args:
            given: Option name to value, as JSON gives them; null stands for "not set".

        Returns:
            The options, each of the right type and by itself in range.

        Raises:
            ConfigError: An unknown option, or a value no model could be run with.
        """
        if not isinstance(given, Mapping):
            raise ConfigError("cascade", given, "must be a JSON object", 'Give {"cascade": {...}}')
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    str(name), given[name], "no such option", f"Known: {', '.join(known)}"
                )
        options = cls(**{name: value for name, value in given.items() if value is not None})
        options.check()
        return options

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            ConfigError: A value no model could be run with, or one that would have no effect.
        """
        _one_of("policy", self.policy, tuple(PRESETS))
        # First, or a value out of range would be told of another that is refused as well.
        self._check_effect()
        if self.score_reduction is not None:
            _one_of("score_reduction", self.score_reduction, ("max", "mean"))
        if not isinstance(self.trace_tokens, bool):
            raise ConfigError(
                "trace_tokens", self.trace_tokens, "must be true or false", "Give one of the two"
            )
        # What else a number has to be depends on the model: `resolve` tells.
        _integer("cache_tokens", self.cache_tokens)
        _integer("stride", self.stride)
        _integer("num_sink_tokens", self.num_sink_tokens, at_least=0)
        _integer("selection_window", self.selection_window, at_least=2)
        if self.num_sub_caches != "auto":
            _integer("num_sub_caches", self.num_sub_caches)
            self._check_least("num_sub_caches", 1, "Nearest: 2")
        for name in WEIGHTS:
            _real(name, getattr(self, name))
            self._check_least(name, 0, "Give a value above 0, or leave it out")
        _real("score_power", self.score_power, above=0.0)
        _real("newest_share", self.newest_share, at_least=0.0)
        _real("score_decay", self.score_decay, above=0.0, at_most=1.0)
        self._check_weights()

    def _check_least(self, name: str, least: int, otherwise: str) -> None:
        """Refuse a value below `least`, and offer that one unless other options forbid it."""
        value = getattr(self, name)
        if value is not None and value < least:
            taken = self.replaced(name, least)._is_right
            instead = f"Nearest: {least}" if taken else otherwise
            raise ConfigError(name, value, f"must be at least {least}", instead)

    @property
    def _is_right(self) -> bool:
        """Whether nothing is wrong whatever the model is."""
        try:
            self.check()
        except ConfigError:
            return False
        return True

    def _check_effect(self) -> None:
        """Refuse an option that would change nothing."""
        if self.policy == "window" and self.num_sub_caches not in ("auto", 1):
            raise ConfigError(
                "num_sub_caches",
                self.num_sub_caches,
                'policy "window" has exactly one sub-cache, unlike the other policies',
                "Nearest: 1",
            )
        told: list[tuple[tuple[str, ...], str, str | None]] = [
            (NO_EFFECT[self.policy], _WHY_NOT.get(self.policy, ""), None)
        ]
        if self.num_sub_caches == 1 and not isinstance(self.num_sub_caches, bool):
            alone = "a single sub-cache drops its oldest tokens and never chooses between tokens"
            told.append((_CHOICE, alone, "Leave it out, or give num_sub_caches 2 or more"))
        for names, why, instead in told:
            for name in names:
                value = getattr(self, name)
                if name != "num_sub_caches" and value is not None:
                    raise ConfigError(
                        name,
                        value,
                        f"would have no effect: {why}",
                        instead or self._elsewhere(name),
                    )

    def _elsewhere(self, name: str) -> str:
        """What to do with an option that has no effect under this policy."""
        others = [other for other in PRESETS if name not in NO_EFFECT[other]]
        served = [f'"{other}"' for other in others if replace(self, policy=other)._is_right]
        return f"Leave it out{', or take policy ' * bool(served)}{' or '.join(served)}"

    def _check_weights(self) -> None:
        """Refuse weights with which nothing, or not what the user set, decides."""
        if self.policy != "window" and not any(self._preset(name) for name in WEIGHTS):
            names = [name for name in WEIGHTS if name not in NO_EFFECT[self.policy]]
            name = next(name for name in names if getattr(self, name) is not None)
            raise ConfigError(
                name,
                getattr(self, name),
                f"leaves nothing to choose tokens by: {', '.join(names)} are all 0",
                "Give one of them a value above 0",
            )
        if not self._preset("score_weight"):
            for name in SCORE_KNOBS:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        name,
                        getattr(self, name),
                        "would have no effect: score_weight is 0, so no scores are kept",
                        "Leave it out, or give score_weight a value above 0",
                    )

    def resolve(self, *, block_size: int, max_model_len: int, position_limit: int) -> CascadeConfig:
        """Settle every option for one model.

        What is not set becomes: sinks 64, rounded up to a block; then the largest
        ``cache_tokens`` up to 16,384 in whole blocks, and for it the largest ``stride`` up to
        1,024 (one block and one group where these are larger), with which every rule holds; of
        strides those below 256 only if nothing else is valid. What is set is taken as it is, or
        refused.

        Args:
            block_size: Tokens in a KV block.
            max_model_len: Most tokens a request may have.
            position_limit: Positions the model itself was made for.

        Returns:
            A valid configuration.

        Raises:
            ConfigError: Something the user set breaks a rule, or nothing valid is left; names
                the field, the value and the nearest valid value.
        """
        if block_size < 1 or block_size & (block_size - 1):
            raise ConfigError(
                "block_size",
                block_size,
                "must be a power of two",
                f"Start vLLM with --block-size {max(MIN_BLOCK_SIZE, _power(block_size))}",
            )
        model = Model(block_size, max_model_len, position_limit)
        found = self.search(model)
        if isinstance(found, CascadeConfig):
            return found
        raise refusal(self, model, found)

    def search(self, model: Model) -> CascadeConfig | list[Fault]:
        """Find the best valid configuration for `model`.

        Args:
            model: What it has to fit; its block size is a power of two.

        Returns:
            The configuration, or the first fault found in each field that had any.
        """
        strides = self.strides(model)
        if self.stride is None:
            longer = [stride for stride in strides if stride >= LEAST_DEFAULT_STRIDE]
            found = self._search(model, longer)
            if isinstance(found, CascadeConfig):
                return found
        return self._search(model, strides)

    def _search(self, model: Model, strides: Sequence[int]) -> CascadeConfig | list[Fault]:
        faults: dict[str, Fault] = {}
        for sinks, budget, sub_caches in self._budgets(model):
            if isinstance(sub_caches, Fault):
                faults.setdefault(sub_caches.field, sub_caches)
                continue
            best = None
            for stride in strides:
                config = self._config(model, sinks, budget, sub_caches, stride)
                fault = broken_rule(config, model.position_limit)
                if fault is not None:
                    faults.setdefault(fault.field, fault)
                    break  # no rule gets easier with a longer stride
                best = config
            if best is not None:
                return best
        return list(faults.values())

    def _budgets(self, model: Model) -> Iterator[tuple[int, int, int | Fault]]:
        """Sinks, `cache_tokens` and its number of sub-caches, best first."""
        block = model.block_size
        sinks = self.num_sink_tokens
        if sinks is None:
            sinks = _up(DEFAULT_SINK_TOKENS, block)
        # No budget fits into fewer positions than it has tokens.
        largest = min(DEFAULT_CACHE_TOKENS, model.position_limit) // block * block or block
        budgets: Sequence[int] = range(largest, 0, -block)
        if self.cache_tokens is not None:
            budgets = [self.cache_tokens]
        for budget in budgets:
            yield sinks, budget, self._sub_caches(model, sinks, budget)

    def _sub_caches(self, model: Model, sinks: int, budget: int) -> int | Fault:
        if self.policy == "window":
            return 1
        if self.num_sub_caches != "auto":
            return self.num_sub_caches
        block = model.block_size
        for number in range(1, budget // block + 1):
            newest, older = shares(budget // block, number, self._newest_share)
            if number > 1 and not older:
                break
            if sinks + block * spanned(newest, older, number) >= model.max_model_len:
                return number
        return Fault(
            "cache_tokens",
            budget,
            f"no number of sub-caches reaches {model.max_model_len} tokens from so small a budget "
            f"in blocks of {block}",
        )

    def strides(self, model: Model) -> Sequence[int]:
        """Strides to try, in ascending order."""
        if self.stride is not None:
            return [self.stride]
        group = max(self._window, 2 * model.block_size)
        return range(group, DEFAULT_STRIDE + 1, group) or [group]

    def _preset(self, name: str) -> Any:
        """What an option comes to: as the user set it, or the policy's value."""
        given = getattr(self, name)
        return PRESETS[self.policy][name] if given is None else given

    @property
    def _window(self) -> int:
        return int(self._preset("selection_window"))

    @property
    def _newest_share(self) -> float:
        return float(self._preset("newest_share"))

    def _config(
        self, model: Model, sinks: int, budget: int, sub_caches: int, stride: int
    ) -> CascadeConfig:
        return CascadeConfig(
            policy=self.policy,
            block_size=model.block_size,
            cache_tokens=budget,
            num_sub_caches=sub_caches,
            newest_share=self._newest_share,
            num_sink_tokens=sinks,
            stride=stride,
            selection_window=self._window,
            score_weight=float(self._preset("score_weight")),
            key_weight=float(self._preset("key_weight")),
            value_weight=float(self._preset("value_weight")),
            score_power=float(self._preset("score_power")),
            score_reduction=str(self._preset("score_reduction")),
            score_decay=float(self._preset("score_decay")),
            trace_tokens=self.trace_tokens,
            max_model_len=model.max_model_len,
        )

    def names_set(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that the user set to something else than the default."""
        return [name for name in names if getattr(self, name) != getattr(CascadeOptions(), name)]

    def without(self, names: Sequence[str]) -> CascadeOptions:
        """These options with `names` not set."""
        defaults = CascadeOptions()
        return replace(self, **{name: getattr(defaults, name) for name in names})

    def replaced(self, name: str, value: object) -> CascadeOptions:
        """These options with `name` set to `value`, of the right type."""
        changed: dict[str, Any] = {name: value}
        return replace(self, **changed)


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(field, value, "no such choice", f"Choose one of {', '.join(allowed)}")


def _integer(field: str, value: object, *, at_least: int | None = None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(field, value, "must be a whole number", "Give one, or leave it out")
    if at_least is not None and value < at_least:
        raise ConfigError(field, value, f"must be at least {at_least}", f"Nearest: {at_least}")


def _real(
    field: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    if value is None:
        return
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not abs(value) <= sys.float_info.max  # false for NaN, and for integers past a float
    ):
        raise ConfigError(field, value, "must be a finite number", "Give one, or leave it out")
    if above is not None and value <= above:
        raise ConfigError(
            field, value, f"must be above {above:g}", "Give such a number, or leave it out"
        )
    if at_least is not None and value < at_least:
        raise ConfigError(field, value, f"must be at least {at_least:g}", f"Nearest: {at_least:g}")
    if at_most is not None and value > at_most:
        raise ConfigError(field, value, f"must be at most {at_most:g}", f"Nearest: {at_most:g}")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _power(value: int) -> int:
    """The power of two nearest to `value`."""
    below = 1 << max(0, value.bit_length() - 1)
    return below if value - below < 2 * below - value else 2 * below
