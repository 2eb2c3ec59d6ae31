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

__all__ = ["PRESETS", "CascadeConfig", "CascadeOptions", "ConfigError"]

DEFAULT_CACHE_TOKENS = 16_384
DEFAULT_STRIDE = 1_024
# A shorter one makes prefill slow; it is taken only where nothing longer fits.
LEAST_DEFAULT_STRIDE = 256
DEFAULT_SINK_TOKENS = 64

# policy -> the knobs it presets; a knob that the user sets wins.
PRESETS: dict[str, dict[str, Any]] = {
    "blend": {"score_power": 2.0, "key_weight": 1.0, "selection_window": 64, "newest_share": 0.25},
    "paper": {"score_power": 1.0, "key_weight": 0.0, "selection_window": 2, "newest_share": 0.0},
    "window": {"score_power": 1.0, "key_weight": 0.0, "selection_window": 2, "newest_share": 0.0},
}


@dataclass(frozen=True, slots=True)
class CascadeOptions:
    """The options as the user gave them; None, and ``"auto"``, stand for "not set".

    The fields are those of `CascadeConfig`; ``num_sub_caches`` ``"auto"`` is the smallest number
    whose reach covers the longest request.
    """

    policy: str = "blend"
    cache_tokens: int | None = None
    num_sub_caches: int | Literal["auto"] = "auto"
    newest_share: float | None = None
    num_sink_tokens: int | None = None
    stride: int | None = None
    selection_window: int | None = None
    score_power: float | None = None
    key_weight: float | None = None
    score_reduction: str = "max"
    score_decay: float = 0.9999999
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
        options._check()
        return options

    def _check(self) -> None:
        _one_of("policy", self.policy, tuple(PRESETS))
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
            _integer("num_sub_caches", self.num_sub_caches, at_least=1)
        _real("score_power", self.score_power, above=0.0)
        _real("key_weight", self.key_weight, at_least=0.0)
        _real("newest_share", self.newest_share, at_least=0.0, at_most=1.0)
        _real("score_decay", self.score_decay, above=0.0, at_most=1.0)
        if self.policy == "window":
            self._check_window_policy()

    def _check_window_policy(self) -> None:
        if self.num_sub_caches not in ("auto", 1):
            raise ConfigError(
                "num_sub_caches",
                self.num_sub_caches,
                'policy "window" has exactly one sub-cache, unlike "blend" and "paper"',
                "Nearest: 1",
            )
        for name in ("newest_share", "selection_window", "score_power", "key_weight"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    name,
                    getattr(self, name),
                    'would have no effect: policy "window" never chooses between tokens',
                    'Leave it out, or take policy "blend" or "paper"',
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

    @property
    def _window(self) -> int:
        return self.selection_window or int(PRESETS[self.policy]["selection_window"])

    @property
    def _newest_share(self) -> float:
        preset = float(PRESETS[self.policy]["newest_share"])
        return preset if self.newest_share is None else float(self.newest_share)

    def _config(
        self, model: Model, sinks: int, budget: int, sub_caches: int, stride: int
    ) -> CascadeConfig:
        preset = PRESETS[self.policy]
        power = preset["score_power"] if self.score_power is None else self.score_power
        weight = preset["key_weight"] if self.key_weight is None else self.key_weight
        return CascadeConfig(
            policy=self.policy,
            block_size=model.block_size,
            cache_tokens=budget,
            num_sub_caches=sub_caches,
            newest_share=self._newest_share,
            num_sink_tokens=sinks,
            stride=stride,
            selection_window=self._window,
            score_power=float(power),
            key_weight=float(weight),
            score_reduction=self.score_reduction,
            score_decay=float(self.score_decay),
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
