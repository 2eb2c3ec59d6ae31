"""The cascade's moves for one head as plain lists of tokens: no rows, no tables, no pages.

Slower and simpler than `vllm_cascade.structure.layout`, which it judges: whole tokens move from
list to list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# (stride number, a window's tokens oldest first) -> the survivors, oldest first.
Choice = Callable[[int, Sequence[int]], list[int]]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What one boundary did.

    Args:
        end: Tokens computed when it ran.
        leaving: (sub-cache or level, tokens) of every group that merged, in the order of the
            merges.
        caches: Tokens of each sub-cache or level afterwards, oldest first; number 0 first. Before
            the cache is first overfull all tokens are in number 0.
        most: Most tokens held so far, sinks and the strides' own included.
    """

    end: int
    leaving: list[tuple[int, list[int]]]
    caches: list[list[int]]
    most: int

    @property
    def kept(self) -> list[int]:
        """Tokens kept after the sinks, oldest sub-cache first."""
        return [token for cache in reversed(self.caches) for token in cache]


def block_moves(
    total: int,
    sinks: int,
    block: int,
    sizes: Sequence[int],
    stride: int,
    window: int,
    choose: Choice,
) -> Iterator[Boundary]:
    """Run a request through the cascade.

    Args:
        total: Tokens in the request.
        sinks: First tokens, never moved.
        block: Tokens in a block.
        sizes: Tokens in each sub-cache, the newest first.
        stride: Tokens between two boundaries; the first ends `stride` tokens after the sinks.
        window: Neighbours of which `choose` keeps half.
        choose: The selection.

    Yields:
        Every boundary, those that find the cache not yet full included.
    """
    group, num_sub_caches = max(window, 2 * block), len(sizes)
    caches: list[list[int]] = [[] for _ in range(num_sub_caches)]
    filling, most = True, 0
    for number, start in enumerate(range(sinks, total - stride + 1, stride)):
        end = start + stride
        caches[0] += range(start, end)
        most = max(most, sinks + sum(map(len, caches)))
        leaving = []
        if filling and end - sinks > sum(sizes):
            filling = False
            everything = caches[0]
            for i in range(num_sub_caches - 1, 0, -1):
                caches[i], everything = everything[: sizes[i]], everything[sizes[i] :]
            caches[0] = everything
        if not filling:
            for i in range(num_sub_caches - 1):
                while len(caches[i]) >= sizes[i] + group:
                    tokens, caches[i] = caches[i][:group], caches[i][group:]
                    leaving.append((i, tokens))
                    for j in range(0, group, window):
                        caches[i + 1] += choose(number, tokens[j : j + window])
            while len(caches[-1]) >= sizes[-1] + block:
                caches[-1] = caches[-1][block:]
        yield Boundary(end, leaving, [list(cache) for cache in caches], most)


def elastic_moves(
    total: int,
    sinks: int,
    block: int,
    budget: int,
    newest_share: float,
    stride: int,
    window: int,
    choose: Choice,
) -> Iterator[Boundary]:
    """Run a request through the elastic cascade, unit by unit.

    A unit is half a group. While more than `budget` tokens are held, the oldest two neighbours of
    the lowest level that has such a pair merge; a unit made at this boundary waits for the next,
    and the newest tokens stay as they are.

    Args:
        budget: Tokens held without sinks and stride; what is no whole unit is not used.
        newest_share: Share of the budget that the newest tokens have; whole units of it count.

    The other arguments and what is yielded are those of `block_moves`.
    """
    unit = max(window // 2, block)
    room, newest = budget // unit, int(budget * newest_share) // unit
    units: list[tuple[int, list[int]]] = []  # level and tokens, oldest first
    most = 0
    for number, start in enumerate(range(sinks, total - stride + 1, stride)):
        end = start + stride
        units += [(0, list(range(at, at + unit))) for at in range(start, end, unit)]
        most = max(most, sinks + unit * len(units))
        leaving = []
        made: set[int] = set()
        while len(units) > room:
            pairs = [
                (level, at)
                for at, (level, tokens) in enumerate(units[: max(0, len(units) - newest - 1)])
                if level == units[at + 1][0]
                and tokens[0] not in made
                and units[at + 1][1][0] not in made
            ]
            if not pairs:
                break
            level, at = min(pairs)
            tokens = units[at][1] + units[at + 1][1]
            leaving.append((level, tokens))
            kept = []
            for j in range(0, len(tokens), window):
                kept += choose(number, tokens[j : j + window])
            units[at : at + 2] = [(level + 1, kept)]
            made.add(kept[0])
        highest = max(level for level, _ in units)
        caches = [
            [token for at, tokens in units if at == level for token in tokens]
            for level in range(highest + 1)
        ]
        yield Boundary(end, leaving, caches, most)
