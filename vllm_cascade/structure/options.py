"""What a user may ask of the cascade, whatever the model is.

Source: Willette et al., arXiv 2406.17808, for policy "paper"; StreamingLLM, arXiv 2309.17453, for
policy "window"; KeyDiff, arXiv 2504.15364, for the distinctiveness of keys; the rest is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vllm_cascade.structure.config import ELASTIC, FIXED, ConfigError

# How attention becomes a score, where pages keep scores.
SCORE_KNOBS = ("score_power", "score_reduction", "score_decay")
WEIGHTS = ("score_weight", "key_weight", "value_weight")
_BY_SCORE = {"score_power": 1.0, "score_reduction": "max", "score_decay": 0.9999999}
_BY_KIND = {"selection_window": 128, "key_weight": 1.0, "value_weight": 1.0, "newest_share": 0.25}
_PLAIN = {"selection_window": 2, "key_weight": 0.0, "value_weight": 0.0, "newest_share": 0.0}

# policy -> the knobs it presets; a knob that the user sets wins.
PRESETS: dict[str, dict[str, Any]] = {
    "distinct": {
        **_BY_KIND,
        **_BY_SCORE,
        "score_weight": 0.0,
        "score_power": 2.0,
        "structure": ELASTIC,
    },
    "blend": {**_BY_KIND, **_BY_SCORE, "score_weight": 1.0, "score_power": 2.0, "structure": FIXED},
    "paper": {**_PLAIN, **_BY_SCORE, "score_weight": 1.0, "structure": FIXED},
    "window": {**_PLAIN, **_BY_SCORE, "score_weight": 0.0, "structure": FIXED},
}
_CHOICE = ("newest_share", "selection_window", *WEIGHTS, *SCORE_KNOBS)
# policy -> the options that have no effect under this policy. To give one of them is an error.
NO_EFFECT: dict[str, tuple[str, ...]] = {
    "distinct": ("score_weight", *SCORE_KNOBS),
    "blend": (),
    "paper": (),
    "window": ("structure", "num_sub_caches", *_CHOICE),
}
_WHY_NOT = {
    "distinct": 'policy "distinct" does not look at attention scores',
    "window": 'policy "window" never chooses between tokens',
}


@dataclass(frozen=True, slots=True)
class CascadeOptions:
    """The options as the user gave them; None and ``"auto"`` stand for "not set".

    `CascadeConfig` describes the fields. ``"auto"`` for ``num_sub_caches`` becomes the smallest
    number whose reach covers the longest request. A number stands for a fixed structure.
    """

    policy: str = "distinct"
    cache_tokens: int | None = None
    structure: str | None = None
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
            The options; each has the right type, and a value that some model could be run with.

        Raises:
            ConfigError: An option is unknown, or no model could be run with its value.
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
            ConfigError: No model could be run with a value, or a value would have no effect.
        """
        _one_of("policy", self.policy, tuple(PRESETS))
        # First: for a value out of range, the checks below would name a nearest value, which this
        # check would refuse as well.
        self._check_effect()
        if self.structure is not None:
            _one_of("structure", self.structure, (FIXED, ELASTIC))
        if self.score_reduction is not None:
            _one_of("score_reduction", self.score_reduction, ("max", "mean"))
        if not isinstance(self.trace_tokens, bool):
            raise ConfigError(
                "trace_tokens", self.trace_tokens, "must be true or false", "Give one of the two"
            )
        # Other rules for a number depend on the model: `resolve` checks them.
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
        """Refuse a value below `least`; offer `least`, unless other options forbid that value."""
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
        """Refuse an option that would have no effect."""
        if self.policy == "window" and self.num_sub_caches not in ("auto", 1):
            raise ConfigError(
                "num_sub_caches",
                self.num_sub_caches,
                'policy "window" has exactly one sub-cache, unlike the other policies',
                "Nearest: 1",
            )
        if self.structure == ELASTIC and self.num_sub_caches != "auto":
            raise ConfigError(
                "num_sub_caches",
                self.num_sub_caches,
                "would have no effect: an elastic structure has as many levels as a request's "
                "length asks for",
                'Leave it out, or give structure "fixed"',
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
        """What a user can do with an option that has no effect under this policy."""
        others = [other for other in PRESETS if name not in NO_EFFECT[other]]
        served = [f'"{other}"' for other in others if replace(self, policy=other)._is_right]
        return f"Leave it out{', or take policy ' * bool(served)}{' or '.join(served)}"

    def _check_weights(self) -> None:
        """Refuse weights that are all 0, and score knobs where the weight of scores is 0."""
        if self.policy != "window" and not any(self.preset(name) for name in WEIGHTS):
            names = [name for name in WEIGHTS if name not in NO_EFFECT[self.policy]]
            name = next(name for name in names if getattr(self, name) is not None)
            raise ConfigError(
                name,
                getattr(self, name),
                f"leaves nothing to choose tokens by: {', '.join(names)} are all 0",
                "Give one of them a value above 0",
            )
        if not self.preset("score_weight"):
            for name in SCORE_KNOBS:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        name,
                        getattr(self, name),
                        "would have no effect: score_weight is 0, so no scores are kept",
                        "Leave it out, or give score_weight a value above 0",
                    )

    def preset(self, name: str) -> Any:
        """Give an option's value: the user's if the user set one, otherwise the policy's.

        Args:
            name: An option that `PRESETS` has.
        """
        given = getattr(self, name)
        if name == "structure" and given is None and self.num_sub_caches != "auto":
            return FIXED
        return PRESETS[self.policy][name] if given is None else given

    def names_set(self, names: Sequence[str]) -> list[str]:
        """List the options among `names` that the user set to another value than the default."""
        return [name for name in names if getattr(self, name) != getattr(CascadeOptions(), name)]

    def without(self, names: Sequence[str]) -> CascadeOptions:
        """Copy these options, with the options in `names` not set."""
        defaults = CascadeOptions()
        return replace(self, **{name: getattr(defaults, name) for name in names})

    def replaced(self, name: str, value: object) -> CascadeOptions:
        """Copy these options, with another value for one of them.

        Args:
            name: The option.
            value: Its new value, of the right type.

        Returns:
            The copy, not checked.
        """
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
