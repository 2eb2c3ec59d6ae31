"""The tokens that one layer keeps, as plain lists of token indices per sub-cache and KV head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reference.selection import distinctiveness, select

# (sub-cache the windows leave, windows of token indices [num_kv_heads, windows, g] oldest first)
# -> the survivors as bool [num_kv_heads, windows, g], g/2 in each window.
Choice = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class CascadeParameters:
    """What the cascade depends on; the names are those of the options. All sizes in tokens."""

    block_size: int
    num_sink_tokens: int
    cache_tokens: int
    num_sub_caches: int
    stride: int
    selection_window: int
    newest_share: float = 0.0
    score_weight: float = 1.0
    key_weight: float = 0.0
    value_weight: float = 0.0
    score_power: float = 1.0
    score_reduction: str = "max"
    score_decay: float = 0.9999999
    structure: str = "fixed"

    @classmethod
    def like(cls, config: object) -> CascadeParameters:
        """Copy the fields of the same names from any object."""
        names = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def sub_cache_tokens(self) -> list[int]:
        """Tokens of each sub-cache, number 0 (the newest) first, in whole blocks.

        Number 0 has its share of the budget, an equal one at least, and what is left over when
        the others divide the rest equally.
        """
        left = self.cache_tokens // self.block_size
        if self.num_sub_caches == 1:
            return [left * self.block_size]
        newest = max(int(left * self.newest_share), -(-left // self.num_sub_caches))
        older = (left - newest) // (self.num_sub_caches - 1)
        sizes = [older] * self.num_sub_caches
        sizes[0] = left - sum(sizes[1:])
        return [size * self.block_size for size in sizes]

    @property
    def group_tokens(self) -> int:
        """G: what leaves a sub-cache together."""
        return max(self.selection_window, 2 * self.block_size)

    @property
    def max_tokens_held(self) -> int:
        """The bound on memory of fixed sub-caches, a stride's own tokens included."""
        waiting = (self.num_sub_caches - 1) * (self.group_tokens - self.block_size)
        return self.num_sink_tokens + sum(self.sub_cache_tokens) + self.stride + waiting

    def boundary_token(self, k: int) -> int:
        """The token that boundary k stands before; boundary 0 ends the sinks."""
        return self.num_sink_tokens + k * self.stride

    def segments(self, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Cut a request at its boundaries.

        Yields:
            (start, end, k): tokens start .. end-1 are computed before boundary k, which runs if
            `end` is `boundary_token(k)`; the last segment may stop short of it.
        """
        start = k = 0
        while start < num_tokens:
            end = min(self.boundary_token(k), num_tokens)
            if end > start:
                yield start, end, k
            start, k = end, k + 1


class Cascade:
    """The kept tokens of one layer.

    Args:
        parameters: The configuration.
        num_kv_heads: Heads, each with its own kept tokens; they share the structure.

    Attributes:
        sinks: int64 [num_kv_heads, up to F].
        sub_caches: N times int64 [num_kv_heads, tokens], oldest first; number 0 is the newest.
            While nothing has been dropped, sub-cache 0 holds everything. Of an elastic structure
            they are the levels, number 0 the lowest.
    """

    def __init__(self, parameters: CascadeParameters, num_kv_heads: int) -> None:
        self.parameters = parameters
        self.filling = True
        empty = torch.empty(num_kv_heads, 0, dtype=torch.int64)
        self.sinks = empty
        self.sub_caches = [empty] * parameters.num_sub_caches

    @property
    def kept(self) -> Tensor:
        """Token index at each logical place: int64 [num_kv_heads, places]."""
        return torch.cat((self.sinks, *reversed(self.sub_caches)), dim=1)

    def finish_stride(self, tokens: range, choice: Choice) -> None:
        """Take in the tokens of a finished stride, and bring the cache back to its budget.

        Args:
            tokens: The stride's tokens; the first call brings the sinks (boundary 0).
            choice: Settles which tokens of each window survive.
        """
        heads = self.sinks.shape[0]
        new = torch.tensor(tokens, dtype=torch.int64).expand(heads, -1)
        if tokens.start < self.parameters.num_sink_tokens:
            self.sinks = new
            return
        caches, sizes = self.sub_caches, self.parameters.sub_cache_tokens
        caches[0] = torch.cat((caches[0], new), dim=1)
        if self.parameters.structure == "elastic":
            self._thin(choice)
            return
        if self.filling:
            if caches[0].shape[1] <= sum(sizes):
                return
            self._share_out()
        for i in range(len(caches) - 1):
            self._merge(i, choice)
        last = caches[-1].shape[1]
        block = self.parameters.block_size
        while last >= sizes[-1] + block:
            last -= block
        caches[-1] = caches[-1][:, caches[-1].shape[1] - last :]

    def _thin(self, choice: Choice) -> None:
        """While more than the budget is held, merge pairs of units, the lowest level first.

        A unit is half a group. What a merge makes does not merge again at the same boundary; the
        newest tokens of level 0 stay as they are.
        """
        parameters, unit = self.parameters, self.parameters.group_tokens // 2
        heads = self.sinks.shape[0]
        newest = int(parameters.newest_share * parameters.cache_tokens) // unit * unit
        held = sum(level.shape[1] for level in self.sub_caches)
        over = held // unit - parameters.cache_tokens // unit
        made = self.sinks[:, :0]
        for level in range(len(self.sub_caches)):
            tokens = self.sub_caches[level]
            free = tokens.shape[1] - (newest if level == 0 else 0)
            merging = max(0, min(over, free // (2 * unit)))
            over -= merging
            leaving = tokens[:, : merging * 2 * unit]
            windows = leaving.unflatten(1, (-1, parameters.selection_window))
            kept = made
            made = windows[choice(level, windows)].view(heads, -1) if merging else leaving
            self.sub_caches[level] = torch.cat((tokens[:, leaving.shape[1] :], kept), dim=1)
        assert not made.shape[1], "the highest level has no pair"

    def _share_out(self) -> None:
        """Give each later sub-cache its share of the oldest tokens; number 0 has the rest."""
        rest, sizes = self.sub_caches[0], self.parameters.sub_cache_tokens
        for i in reversed(range(1, len(self.sub_caches))):
            size = sizes[i]
            self.sub_caches[i], rest = rest[:, :size], rest[:, size:]
        self.sub_caches[0] = rest
        self.filling = False

    def _merge(self, i: int, choice: Choice) -> None:
        """Let sub-cache i's overflow leave, group by group, and its survivors enter i + 1."""
        parameters, cache = self.parameters, self.sub_caches[i]
        leaving = 0
        size = parameters.sub_cache_tokens[i]
        while cache.shape[1] - leaving >= size + parameters.group_tokens:
            leaving += parameters.group_tokens
        if not leaving:
            return
        windows = cache[:, :leaving].unflatten(1, (-1, parameters.selection_window))
        survivors = windows[choice(i, windows)].view(cache.shape[0], leaving // 2)
        self.sub_caches[i] = cache[:, leaving:]
        self.sub_caches[i + 1] = torch.cat((self.sub_caches[i + 1], survivors), dim=1)


class Values:
    """What a boundary decides by: numbers for each token that is held, NaN for the others.

    Args:
        parameters: The configuration.
        score: [num_kv_heads, tokens of the request].
        keys: [num_kv_heads, tokens of the request, head_size], before RoPE.
        values: As `keys`.
        held: int64 [num_kv_heads, n], the tokens held at the boundary, the stride's included.

    Attributes:
        terms: A weight and what it weighs, [num_kv_heads, tokens of the request], for each of
            score, key and value that has a weight.
    """

    def __init__(
        self,
        parameters: CascadeParameters,
        score: Tensor,
        keys: Tensor,
        values: Tensor,
        held: Tensor,
    ) -> None:
        self.terms: list[tuple[float, Tensor]] = []
        self.num_tokens = score.shape[1]
        if parameters.score_weight != 0:
            self.terms.append((parameters.score_weight, score))
        for weight, vectors in ((parameters.key_weight, keys), (parameters.value_weight, values)):
            if weight != 0:
                held_ones = vectors.gather(1, held[..., None].expand(-1, -1, vectors.shape[-1]))
                unknown = torch.full_like(score, torch.nan)
                self.terms.append((weight, unknown.scatter(1, held, distinctiveness(held_ones))))

    def of(self, windows: Tensor) -> list[tuple[float, Tensor]]:
        """Look up the terms of windows [num_kv_heads, windows, g]."""
        flat = windows.flatten(1)
        return [(weight, x.gather(1, flat).view(windows.shape)) for weight, x in self.terms]

    def choose(self, sub_cache: int, windows: Tensor) -> Tensor:
        """Settle the windows by the rule; a `Choice`, so it is told a sub-cache it ignores."""
        return select(self.of(windows))
