"""The rules of a valid configuration, written down a second time."""

from __future__ import annotations

import math
from itertools import pairwise


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
    longest: int = 0,
) -> bool:
    """The design's list of valid configurations, written down a second time."""
    group = max(window, 2 * block)
    if structure == "elastic":
        unit = group // 2
        room, newest, steps = cache // unit, int(cache * share) // unit, stride // unit
        if not (
            room - newest >= max(2, steps)
            and sinks % block == 0
            and share <= 1
            and window >= 2
            and window & (window - 1) == 0
            and stride >= 1
            and stride % group == 0
        ):
            return False
        places = positions - sinks - stride
        if max(room, newest + steps + number) * unit <= places:
            return True
        strides = max(0, longest - 1 - sinks) // stride
        return room * unit <= places and most_held(strides, steps, room, newest) * unit <= places
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


def most_held(strides: int, steps: int, room: int, newest: int) -> int:
    """The most units left after any of so many strides of `steps` units each, unit by unit.

    While more than `room` are held, the oldest two neighbours of the lowest level that has such a
    pair merge, none of them made in the same stride and none of the `newest`.
    """
    units: list[tuple[int, bool]] = []  # level, and whether it was made in this stride
    most = room
    for _ in range(strides):
        units = [(level, False) for level, _ in units] + [(0, False)] * steps
        while len(units) > room:
            free = units[: len(units) - newest]
            pairs = [
                (a[0], at)
                for at, (a, b) in enumerate(pairwise(free))
                if a[0] == b[0] and not a[1] and not b[1]
            ]
            if not pairs:
                break
            level, at = min(pairs)
            units[at : at + 2] = [(level + 1, True)]
        most = max(most, len(units))
    return most
