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
        leaving: (sub-cache, tokens) of every group that merged, in the order of the merges.
        caches: Tokens of each sub-cache afterwards, oldest first; sub-cache 0 first. Before the
            cache is first overfull all tokens are in sub-cache 0.
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
