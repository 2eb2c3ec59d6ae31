"""The rules of a valid configuration, written down a second time."""

from __future__ import annotations

import math


def rules_hold(
    *,
    block: int,
    sinks: int,
    cache: int,
    number: int,
    stride: int,
    window: int,
    decay: float,
    positions: int,
    share: float,
    structure: str = "fixed",
) -> bool:
    """The design's list of valid configurations, written down a second time."""
    group = max(window, 2 * block)
    if structure == "elastic":
        unit = group // 2
        room, newest, steps = cache // unit, int(cache * share) // unit, stride // unit
        return (
            room - newest >= max(2, steps)
            and sinks % block == 0
            and share <= 1
            and window >= 2
            and window & (window - 1) == 0
            and stride >= 1
            and stride % group == 0
            and sinks + max(room, newest + steps + number) * unit + stride <= positions
        )
    sizes = sub_caches(cache, number, block, share)
    return (
        sizes[-1] >= block
        and sinks % block == 0
        and window >= 2
        and window & (window - 1) == 0
        and stride >= 1
        and stride % group == 0
        and stride <= 2 * sizes[-1]
        and stride * math.log(decay) >= math.log(1e-3)
        and sinks + sum(sizes) + stride + (number - 1) * (group - block) <= positions
    )


def sub_caches(cache: int, number: int, block: int, share: float) -> list[int]:
    """Tokens of each sub-cache, the newest first: its share, and what the others leave over."""
    blocks = cache // block
    newest = max(math.floor(blocks * share), math.ceil(blocks / number))
    older = (blocks - newest) // (number - 1) if number > 1 else 0
    return [(blocks - older * (number - 1)) * block] + [older * block] * (number - 1)


def smallest_number(cache: int, sinks: int, block: int, longest: int, share: float) -> int | None:
    """The fewest sub-caches whose reach covers `longest` tokens."""
    for number in range(1, cache // block + 1):
        sizes = sub_caches(cache, number, block, share)
        if not sizes[-1]:
            return None
        if sinks + sizes[0] + sizes[-1] * (2**number - 2) >= longest:
            return number
    return None


def levels(longest: int, block: int, window: int) -> int:
    """The most levels of a request of `longest` tokens: a unit of the last one has half of it."""
    unit, number = max(window // 2, block), 2
    while unit << number <= longest:
        number += 1
    return number
