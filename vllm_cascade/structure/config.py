"""A complete configuration of the cascade, and the rules that a valid one keeps.

Pure Python: imports neither torch nor vLLM, so that a configuration can be checked anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from vllm_cascade.structure.levels import Levels

MIN_DECAY_PER_STRIDE = 1e-3
FIXED, ELASTIC = "fixed", "elastic"


class ConfigError(ValueError):
    """An option that cannot work; the message says why not, and what would work.

    Args:
        field: The option's name.
        value: The value given.
        why: What is wrong with the value.
        instead: What the user can give or do instead, as a sentence without its full stop.
    """

    def __init__(self, field: str, value: object, why: str, instead: str) -> None:
        super().__init__(field, value, why, instead)  # a pickle calls the class with these four
        self.field = field

    def __str__(self) -> str:
        field, value, why, instead = self.args
        return f"cascade option {field!r} = {value!r}: {why}. {instead}"


class Fault(NamedTuple):
    """A rule that a configuration breaks.

    Args:
        field: The option to blame.
        value: Its value.
        why: The rule, as the second half of a sentence about the value.
    """

    field: str
    value: object
    why: str


class Model(NamedTuple):
    """What the configuration has to fit: the model, and how vLLM serves the model.

    Args:
        block_size: Tokens in a KV block.
        max_model_len: Most tokens a request may have.
        position_limit: Positions the model itself was made for.
        has_one_block_size: Whether blocks cannot be smaller.
    """

    block_size: int
    max_model_len: int
    position_limit: int
    has_one_block_size: bool = False


def shares(blocks: int, num_sub_caches: int, newest_share: float) -> tuple[int, int]:
    """Cut a budget into sub-caches.

    Args:
        blocks: The budget, in blocks.
        num_sub_caches: Number of sub-caches, at least 1.
        newest_share: Share of the budget that the newest sub-cache gets; an equal share if that
            is more.

    Returns:
        Blocks of the newest sub-cache, and blocks of each other one. The second number is 0 if
        there is one sub-cache, or if the budget is too small to give each other one a block.
    """
    others = num_sub_caches - 1
    if not others:
        return blocks, 0
    newest = max(int(min(newest_share, 1.0) * blocks), -(-blocks // num_sub_caches))
    older = (blocks - newest) // others
    return blocks - others * older, older


def spanned(newest: int, older: int, num_sub_caches: int) -> int:
    """Measure the text that full sub-caches span: sub-cache i keeps one of 2**i tokens.

    Args:
        newest: Size of the newest sub-cache, in blocks or tokens.
        older: Size of each other one, in the same unit; 0 if there is none.
        num_sub_caches: Number of sub-caches.

    Returns:
        The span, in the same unit.

    Source: Willette et al., arXiv 2406.17808; sub-caches of unequal size are ours.
    """
    return newest + older * ((1 << num_sub_caches) - 2)


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """A complete, valid configuration for one model.

    Args:
        policy: Name of the preset the knobs came from.
        block_size: Tokens in a KV block.
        cache_tokens: Budget of all sub-caches together, in tokens; sinks come on top.
        num_sub_caches: Number of sub-caches; of an elastic structure, the most levels that a
            request can come to.
        newest_share: Share of the budget that the newest tokens have, 0 to 1. The newest of fixed
            sub-caches has an equal share if that is more.
        num_sink_tokens: Number of sinks: a request's first tokens, never evicted.
        stride: Tokens between two boundaries.
        selection_window: Number of neighbouring tokens of which half survive a merge.
        score_weight: Weight of the rank of a token's attention score; 0 where no score is kept.
        key_weight: Weight of the rank of the token's key by distinctiveness.
        value_weight: Weight of the rank of the token's value by distinctiveness.
        score_power: Exponent on the attention probability in a key's score.
        score_reduction: "max" or "mean": how a query's heads that share a KV head are combined.
        score_decay: Factor on a score for each token that follows.
        trace_tokens: Whether the pages record each kept token's index.
        max_model_len: Most tokens a request may have.
        structure: "fixed": sub-caches of fixed sizes, the last of which drops its oldest tokens.
            "elastic": levels as large as the request's length asks for, of which none drops.
    """

    policy: str
    block_size: int
    cache_tokens: int
    num_sub_caches: int
    newest_share: float
    num_sink_tokens: int
    stride: int
    selection_window: int
    score_weight: float
    key_weight: float
    value_weight: float
    score_power: float
    score_reduction: str
    score_decay: float
    trace_tokens: bool
    max_model_len: int
    structure: str = FIXED

    @property
    def is_elastic(self) -> bool:
        """Whether levels take the place of fixed sub-caches."""
        return self.structure == ELASTIC

    @property
    def unit_tokens(self) -> int:
        """Tokens of a group that survive its merge."""
        return self.group_tokens // 2

    @property
    def capacity_units(self) -> int:
        """Whole units that the budget has room for."""
        return self.cache_tokens // self.unit_tokens

    @property
    def newest_units(self) -> int:
        """Whole units of the newest tokens, which an elastic structure leaves as they are."""
        return int(self.newest_share * self.cache_tokens) // self.unit_tokens

    @property
    def levels(self) -> Levels:
        """An elastic structure, counted in units."""
        stride = self.stride // self.unit_tokens
        return Levels(stride, self.newest_units, self.capacity_units, self.num_sub_caches)

    @property
    def most_units(self) -> int:
        """The most units that the longest request of an elastic structure holds between strides."""
        boundaries = (self.max_model_len - 1 - self.first_boundary) // self.stride + 1
        return self.levels.most_held(boundaries) if boundaries > 0 else self.capacity_units

    @property
    def stays_in_budget(self) -> bool:
        """Whether an elastic structure never holds more than the budget after a boundary."""
        return self.most_units == self.capacity_units

    @property
    def sub_cache_tokens(self) -> tuple[int, ...]:
        """Tokens in each fixed sub-cache, the newest first; together the budget's whole blocks.

        The newest sub-cache has `newest_share` of the budget, or an equal share if that is more.
        The others divide the rest equally, and the newest one takes the blocks left over.
        """
        newest, older = self._sizes
        return newest, *((self.num_sub_caches - 1) * (older,))

    @property
    def _sizes(self) -> tuple[int, int]:
        """Tokens in the newest sub-cache and in each other one."""
        blocks = self.cache_tokens // self.block_size
        newest, older = shares(blocks, self.num_sub_caches, self.newest_share)
        return newest * self.block_size, older * self.block_size

    @property
    def smallest_sub_cache_tokens(self) -> int:
        """Tokens in the smallest sub-cache."""
        newest, older = self._sizes
        return older if self.num_sub_caches > 1 else newest

    @property
    def total_tokens(self) -> int:
        """Tokens that sinks and the budget's whole blocks or units hold."""
        if self.is_elastic:
            return self.num_sink_tokens + self.capacity_units * self.unit_tokens
        newest, older = self._sizes
        return self.num_sink_tokens + newest + (self.num_sub_caches - 1) * older

    @property
    def first_boundary(self) -> int:
        """Tokens at the first grid point at which the cache is overfull."""
        filling = (self.total_tokens - self.num_sink_tokens) // self.stride
        return self.num_sink_tokens + (filling + 1) * self.stride

    @property
    def group_tokens(self) -> int:
        """Tokens that leave a sub-cache or level together."""
        return max(self.selection_window, 2 * self.block_size)

    @property
    def max_places(self) -> int:
        """The most logical places that a request can use, those of the current stride included."""
        if self.is_elastic:
            waiting = (self.most_units - self.capacity_units) * self.unit_tokens
        else:
            waiting = (self.num_sub_caches - 1) * (self.group_tokens - self.block_size)
        return self.total_tokens + self.stride + waiting

    @property
    def reach(self) -> int:
        """Tokens of text that the cache spans where each fixed sub-cache is just full.

        A request spans a little more: the current stride, and tokens that wait for a full group.
        An elastic structure spans the longest request.
        """
        if self.is_elastic:
            return self.max_model_len
        return self.num_sink_tokens + spanned(*self._sizes, self.num_sub_caches)

    @property
    def chooses(self) -> bool:
        """Whether any request can come to a choice between tokens.

        A single sub-cache drops its oldest tokens without a choice. A request that fits into
        sinks and sub-caches drops no token.
        """
        return self.num_sub_caches > 1 and self.max_model_len > self.total_tokens

    @property
    def needs_scores(self) -> bool:
        """Whether choices look at attention scores; only then do pages hold a score a token."""
        return self.chooses and self.score_weight > 0

    def summary(self) -> str:
        """The configuration in one line, for a log."""
        choice = ""
        sub_caches = "" if self.is_elastic else f"num_sub_caches={self.num_sub_caches} "
        if self.num_sub_caches > 1:
            choice = (
                f"selection_window={self.selection_window} score_weight={self.score_weight:g} "
                f"key_weight={self.key_weight:g} value_weight={self.value_weight:g} "
            )
            if self.score_weight:
                choice += (
                    f"score_power={self.score_power:g} score_reduction={self.score_reduction} "
                    f"score_decay={self.score_decay!r} "
                )
        return (
            f"policy={self.policy} cache_tokens={self.cache_tokens} structure={self.structure} "
            f"{sub_caches}newest_share={self.newest_share:g} "
            f"num_sink_tokens={self.num_sink_tokens} stride={self.stride} {choice}"
            f"block_size={self.block_size} reach={self.reach} tokens"
        )


def broken_rule(config: CascadeConfig, position_limit: int) -> Fault | None:
    """Find the first rule of a valid configuration that `config` breaks.

    Args:
        config: A complete configuration.
        position_limit: Positions the model itself was made for.

    Returns:
        The field to blame, its value and the reason; None if `config` is valid.
    """
    block, group, stride = config.block_size, config.group_tokens, config.stride
    if config.num_sink_tokens % block:
        return Fault(
            "num_sink_tokens",
            config.num_sink_tokens,
            f"must be a multiple of the block size, {block}",
        )
    if config.newest_share > 1:
        return Fault("newest_share", config.newest_share, "must be at most 1")
    if config.selection_window < 2 or config.selection_window & (config.selection_window - 1):
        return Fault(
            "selection_window", config.selection_window, "must be a power of two, at least 2"
        )
    if (fault := _too_small(config)) is not None:
        return fault
    if stride < group or stride % group:
        return Fault(
            "stride",
            stride,
            f"must be a multiple of {group}, the larger of selection_window and two blocks",
        )
    if (fault := _too_long(config)) is not None:
        return fault
    if stride * math.log(config.score_decay) < math.log(MIN_DECAY_PER_STRIDE):
        return Fault(
            "score_decay",
            config.score_decay,
            f"wears a score down to less than {MIN_DECAY_PER_STRIDE:g} within a stride of {stride}",
        )
    if config.max_places > position_limit:
        return Fault(
            "cache_tokens",
            config.cache_tokens,
            f"needs {config.max_places} positions (with {config.num_sink_tokens} sinks, a stride "
            f"of {stride} and groups of {group}), but the model has {position_limit}",
        )
    return None


def _too_small(config: CascadeConfig) -> Fault | None:
    """What there is not enough budget for, if anything."""
    block, group = config.block_size, config.group_tokens
    if not config.is_elastic:
        if config.smallest_sub_cache_tokens >= block:
            return None
        why = f"no whole block of {block} tokens for each of {config.num_sub_caches} sub-caches"
        return Fault("cache_tokens", config.cache_tokens, f"leaves {why}")
    if config.capacity_units < 2:
        return Fault("cache_tokens", config.cache_tokens, f"leaves no group of {group} tokens")
    if config.capacity_units - config.newest_units < 2:
        return Fault(
            "newest_share",
            config.newest_share,
            f"leaves no group of {group} of {config.cache_tokens} tokens to choose from",
        )
    return None


def _too_long(config: CascadeConfig) -> Fault | None:
    """What a stride has to fit, if it does not."""
    if config.is_elastic:
        room = (config.capacity_units - config.newest_units) * config.unit_tokens
        if config.stride > room:
            why = f"must not exceed the {room} tokens that the newest ones leave of the budget"
            return Fault("stride", config.stride, why)
    elif config.stride > 2 * config.smallest_sub_cache_tokens:
        size = config.smallest_sub_cache_tokens
        why = f"must not exceed two of the smallest sub-caches, of {size} tokens each"
        return Fault("stride", config.stride, why)
    return None
