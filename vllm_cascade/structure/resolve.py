"""Options settled for one model, or the option to blame and a value that would be valid.

Nothing is guessed: every value that a message names was tried and is valid.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from vllm_cascade.structure.config import (
    FIXED,
    MIN_DECAY_PER_STRIDE,
    CascadeConfig,
    ConfigError,
    Fault,
    Model,
)
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.search import search, strides

MIN_BLOCK_SIZE = 16  # vLLM's smallest

# The options that the rules bind.
BOUND = (
    "num_sink_tokens",
    "cache_tokens",
    "num_sub_caches",
    "newest_share",
    "stride",
    "selection_window",
    "score_decay",
)


# Each layer asks, and so do several other parts of an engine.
@lru_cache(maxsize=64)
def resolve(
    options: CascadeOptions,
    *,
    block_size: int,
    max_model_len: int,
    position_limit: int,
    has_one_block_size: bool = False,
) -> CascadeConfig:
    """Settle every option for one model.

    An option that the user set is taken as it is, or refused. The others become:

    - ``num_sink_tokens``: 64, rounded up to whole blocks;
    - ``cache_tokens``: the largest valid number of whole blocks up to 16,384 tokens, but at least
      one block;
    - ``stride``: the largest valid one up to 1,024 tokens for this budget, but at least one
      group; one below 256 only if no longer stride is valid with any budget.

    Args:
        options: What the user set.
        block_size: Tokens in a KV block.
        max_model_len: Most tokens a request may have.
        position_limit: Positions the model itself was made for.
        has_one_block_size: Whether blocks cannot be smaller, so that no refusal names a smaller
            size.

    Returns:
        A valid configuration.

    Raises:
        ConfigError: An option breaks a rule, or nothing valid is left; the message names the
            option, its value and the nearest valid value.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ConfigError(
            "block_size",
            block_size,
            "must be a power of two",
            f"Start vLLM with --block-size {max(MIN_BLOCK_SIZE, _power(block_size))}",
        )
    model = Model(block_size, max_model_len, position_limit, has_one_block_size)
    found = search(options, model)
    if isinstance(found, CascadeConfig):
        return found
    raise refusal(options, model, found)


def refusal(options: CascadeOptions, model: Model, faults: list[Fault]) -> ConfigError:
    """Explain why `options` leave no valid configuration for `model`.

    Args:
        options: Options with which `search` found nothing valid.
        model: The model that the options have to fit.
        faults: What `search` found wrong; at least one.

    Returns:
        An error that blames an option that the user set, or the model if the defaults fail too.
    """
    is_set = options.names_set(BOUND)
    bare = options.without(is_set)
    if not _works(bare, model):
        return _model_refusal(bare, model)
    reasons = {fault.field: fault.why for fault in faults}
    suspects = [name for name in reasons if name in is_set]
    suspects += [name for name in is_set if name not in reasons]
    # Usually one option is to blame. Where several are, the user has to leave the others out too.
    alone = (name for name in suspects if _works(options.without([name]), model))
    culprit = next(alone, suspects[0])
    others: list[str] = []
    for name in suspects:
        if _works(options.without([culprit, *others]), model):
            break
        if name != culprit:
            others.append(name)
    indirect = f"leaves no valid choice of the other options ({_told(faults[0])})"
    nearest = _nearest(options.without(others), culprit, model)
    instead = "Leave it out" if nearest is None else f"Nearest: {nearest}"
    if others:
        instead += f"; and leave out {', '.join(others)}"
    if fitting := _block_size_for(options, model):
        instead += f"; or keep what was given and start vLLM with --block-size {fitting}"
    return ConfigError(culprit, getattr(options, culprit), reasons.get(culprit, indirect), instead)


def _model_refusal(options: CascadeOptions, model: Model) -> ConfigError:
    """The refusal of a model that even the defaults do not fit."""
    found = search(options, model)
    assert not isinstance(found, CascadeConfig)
    why = (
        f"no budget works for a model of {model.position_limit} positions and requests of up to "
        f"{model.max_model_len} tokens ({_told(found[0])})"
    )
    instead = "This model is too small for CASCADE: serve it with another attention backend"
    if smaller := _block_size_for(options, model):
        instead = f"Start vLLM with --block-size {smaller}"
    else:
        longest = bisect_left(
            range(1, model.max_model_len),
            True,
            key=lambda length: not _works(options, model._replace(max_model_len=length)),
        )
        if longest:
            instead = f"Start vLLM with --max-model-len {longest}"
    return ConfigError("block_size", model.block_size, why, instead)


def _block_size_for(options: CascadeOptions, model: Model) -> int | None:
    """The largest of the smaller block sizes with which the options are valid, or None."""
    smaller = 0 if model.has_one_block_size else model.block_size // 2
    while smaller >= MIN_BLOCK_SIZE:
        if _works(options, model._replace(block_size=smaller)):
            return smaller
        smaller //= 2
    return None


def _nearest(options: CascadeOptions, field: str, model: Model) -> float | None:
    """The valid value of `field` nearest to the given one; without `field` the options are valid.

    None if only an elastic structure fits, which has no number of sub-caches. The search halves the
    range between the given value and the value that `search` takes if `field` is not set. The rules
    only get easier from the first to the second.
    """
    without = options.without([field])
    if field == "num_sub_caches":
        # A number stands for fixed sub-caches. Two may work where none reach the longest request.
        fixed = without.replaced("structure", FIXED)
        tried = (fixed, options.replaced(field, 2), options.replaced(field, 1))
        working = [one for one in tried if _works(one, model)]
        if not working:
            return None
        without = working[0]
    config = search(without, model)
    assert isinstance(config, CascadeConfig)
    if field == "score_decay":
        shortest = strides(options, model)[0]
        least: float = MIN_DECAY_PER_STRIDE ** (1 / shortest)
        return math.ceil(least * 1e9) / 1e9
    grid = _grid(field, config, model)
    given: float = getattr(options, field)
    good = bisect_left(grid, getattr(config, field))
    bad = bisect_left(grid, given)
    if bad == len(grid) or (bad > 0 and given - grid[bad - 1] < grid[bad] - given):
        bad -= 1
    if _works(options.replaced(field, grid[bad]), model):
        return grid[bad]
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        if _works(options.replaced(field, grid[middle]), model):
            good = middle
        else:
            bad = middle
    return grid[good]


def _grid(field: str, config: CascadeConfig, model: Model) -> Sequence[float]:
    """The values of `field` that could be valid, in ascending order."""
    limit, block, group = model.position_limit, model.block_size, config.group_tokens
    grids: dict[str, Sequence[float]] = {
        "num_sink_tokens": range(0, limit + 1, block),
        "cache_tokens": range(block, limit + 1, block),
        "num_sub_caches": range(1, limit + 1),
        "newest_share": [step / 64 for step in range(65)],
        "stride": range(group, limit + 1, group),
        "selection_window": [1 << power for power in range(1, limit.bit_length())],
    }
    return grids[field]


def _works(options: CascadeOptions, model: Model) -> bool:
    try:
        options.check()  # one option may leave another without effect
    except ConfigError:
        return False
    return isinstance(search(options, model), CascadeConfig)


def _told(fault: Fault) -> str:
    return f"{fault.field} = {fault.value}: {fault.why}"


def _power(value: int) -> int:
    """The power of two nearest to `value`."""
    below = 1 << max(0, value.bit_length() - 1)
    return below if value - below < 2 * below - value else 2 * below
