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
from typing import NamedTuple

# The most held is looked for among so many boundaries; beyond them it is a bound.
FOLLOWED = 1 << 12


class Levels(NamedTuple):
    """What decides how many units are held.

    Args:
        stride: Units that a stride brings.
        newest: Units of level 0 that stay as they are: the newest ones.
        capacity: Units that the budget has room for, at least `newest` and a stride.
        number: Levels that the longest request can come to.
    """

    stride: int
    newest: int
    capacity: int
    number: int

    @property
    def bound(self) -> int:
        """Units that are never exceeded after a boundary.

        With k units beside the newest ones, and one of each level without a partner, (k - levels)
        / 2 pairs can merge. So a stride of s units leaves at most s + levels of them, or what the
        budget has room for.
        """
        return max(self.capacity, self.newest + self.stride + self.number)

    def held(self, boundaries: int) -> int:
        """Count the units held once `boundaries` boundaries, at least 1, have moved something."""
        if self.bound == self.capacity:
            return self.capacity
        return _held(self).after(boundaries)

    def most_held(self, boundaries: int) -> int:
        """Find the most units held after any of the first `boundaries` boundaries, at least 1.

        Beyond `FOLLOWED` boundaries, and where the budget may be exceeded, the answer is `bound`.
        """
        if self.bound == self.capacity or boundaries > FOLLOWED:
            return self.bound
        return _held(self).most(boundaries)


def merging_pairs(counts: Sequence[int], newest: int, capacity: int) -> list[int]:
    """Settle how many pairs of units merge at one boundary.

    The lowest level gives first, so that density stays even over the text. A unit merges once at
    most, so a pair that has just become a unit of the next level does not count there.

    Args:
        counts: Units on each level before the boundary, level 0 first.
        newest: Units of level 0 that stay as they are.
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


class _Held:
    """Units held after each boundary, worked out as far as somebody has asked."""

    def __init__(self, levels: Levels) -> None:
        self._known: list[int] = []
        self._others = _thinned(levels)

    def after(self, boundaries: int) -> int:
        """Units after so many boundaries."""
        self._known += islice(self._others, max(0, boundaries - len(self._known)))
        return self._known[boundaries - 1]

    def most(self, boundaries: int) -> int:
        """The most units after any of the first so many boundaries."""
        self.after(boundaries)
        return max(islice(self._known, boundaries))


@lru_cache(maxsize=64)
def _held(levels: Levels) -> _Held:
    return _Held(levels)


def _thinned(levels: Levels) -> Iterator[int]:
    """Units held after boundary 1, 2, and so on."""
    stride, newest, capacity, number = levels
    counts = [capacity // stride * stride, *[0] * (number - 1)]
    while True:
        counts[0] += stride
        for level, merging in enumerate(merging_pairs(counts, newest, capacity)):
            counts[level] -= 2 * merging
            if merging:
                counts[level + 1] += merging
        yield sum(counts)
