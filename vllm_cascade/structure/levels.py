"""How an elastic cascade thins out, counted in units: no blocks, no tokens.

What is neither sink nor among the newest tokens is a line of *units*, the oldest first. A unit of
level i has the survivors of ``2**i`` times its own number of tokens. Two neighbouring units of one
level merge into one of the next level. Levels fall from the oldest unit to the newest, so that the
number of units on each level says everything.

Pure Python: imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

from vllm_cascade.structure.config import CascadeConfig

# A structure that may hold more than its budget is followed for so many boundaries, not further.
FOLLOWED = 1 << 16


def merging_pairs(counts: Sequence[int], newest: int, capacity: int) -> list[int]:
    """Settle how many pairs of units merge at one boundary.

    The lowest level gives first, so that density stays even over the text. A unit merges once at
    most, so a pair that has just become a unit of the next level does not count there.

    Args:
        counts: Units on each level before the boundary, level 0 first.
        newest: Units of level 0 that stay as they are: the newest ones.
        capacity: Units that may be left.

    Returns:
        Pairs of each level, the oldest of the level; together as many as there are units beyond
        `capacity`, or all that can merge.
    """
    excess = max(0, sum(counts) - capacity)
    pairs = []
    for level, count in enumerate(counts):
        merging = min(excess, max(0, count - newest * (level == 0)) // 2)
        pairs.append(merging)
        excess -= merging
    return pairs


def held_units(config: CascadeConfig, boundaries: int) -> int:
    """Count the units that a request holds once `boundaries` boundaries have run.

    Args:
        config: A valid elastic configuration.
        boundaries: Boundaries at which something moved, at least 1.

    Returns:
        Units, the newest ones included and the sinks left out.
    """
    if config.stays_in_budget:
        return config.capacity_units
    return _held(config).first(boundaries)[-1]


def most_held_units(config: CascadeConfig, boundaries: int) -> int:
    """Find the most units that a request holds after any of its first `boundaries` boundaries.

    Args:
        config: A valid elastic configuration.
        boundaries: At least 1.

    Returns:
        Units. For more than `FOLLOWED` boundaries it is a bound, where the budget may be exceeded.
    """
    if config.stays_in_budget:
        return config.capacity_units
    if boundaries > FOLLOWED:
        return config.most_units
    return max(_held(config).first(boundaries))


class _Held:
    """Units held after each boundary, worked out as far as somebody has asked."""

    def __init__(self, config: CascadeConfig) -> None:
        self._known: list[int] = []
        self._others = _thinned(config)

    def first(self, boundaries: int) -> list[int]:
        """Units after each of the first `boundaries` boundaries."""
        self._known += islice(self._others, max(0, boundaries - len(self._known)))
        return self._known[:boundaries]


@lru_cache(maxsize=8)
def _held(config: CascadeConfig) -> _Held:
    return _Held(config)


def _thinned(config: CascadeConfig) -> Iterator[int]:
    """Units held after boundary 1, 2, and so on."""
    stride = config.stride // config.unit_tokens
    counts = [config.capacity_units // stride * stride, *[0] * (config.num_sub_caches - 1)]
    while True:
        counts[0] += stride
        pairs = merging_pairs(counts, config.newest_units, config.capacity_units)
        for level, merging in enumerate(pairs):
            counts[level] -= 2 * merging
            if merging:
                counts[level + 1] += merging
        yield sum(counts)
