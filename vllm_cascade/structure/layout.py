"""Where every token of a request lives: the cascade's structure in whole numbers.

Structure depends on how many tokens a request has computed and on nothing else, so one `Layout`
serves every request, layer and rank. This module imports neither torch nor vLLM.

A request owns a *row* of at most `max_blocks` blocks, and blocks are recycled inside the row. The
request's life is a sequence of *epochs*, and nothing moves within an epoch. Epoch 0 lasts until
the cache is first overfull; every later epoch is one stride long. At the end of an epoch (a
*boundary*) whole groups of the oldest blocks leave each overfull sub-cache. A group's survivors
are written into the first half of the group's own blocks. That half becomes the newest part of the
next sub-cache; the other half is free for the next stride. Fixed sub-caches hand on what is beyond
their size. Elastic ones, called levels, hand on what is beyond the budget, the lowest level first.

Source: Willette et al., arXiv 2406.17808, for the cascade of sub-caches; groups of whole blocks
and levels are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import overload

import numpy as np
import numpy.typing as npt

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.levels import FOLLOWED, merging_pairs

Entries = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Epoch:
    """A stretch of tokens during which nothing moves, and what moves at its end.

    Args:
        start: First token, counted in the request.
        end: One past the last token; the boundary runs once token ``end - 1`` is computed.
        prefix_tokens: Tokens held from earlier epochs; they take places 0 .. prefix_tokens - 1.
        table: [num_blocks] row entries in logical order; entry i has the places from
            ``i * block_size`` on. Blocks of earlier epochs come first, then the epoch's own.
        groups: [num_groups, blocks_per_group] row entries of the groups that merge at the end,
            the oldest block of a group first. Survivors fill the first half of a group's entries.
        sub_caches: Tokens held from earlier epochs in sub-cache or level 0 .. N-1; the epoch's own
            tokens join number 0.
    """

    start: int
    end: int
    prefix_tokens: int
    table: Entries
    groups: Entries
    sub_caches: tuple[int, ...]

    def place(self, token: int) -> int:
        """Give the logical place, which is also the rotary position, of this epoch's `token`."""
        return self.prefix_tokens + token - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one request inside one epoch; a wave has at most one for each request.

    Args:
        epoch: Index into `Layout.epochs`.
        start: First token, counted in the request.
        end: One past the last token.
        merges: Whether a boundary runs at `end`, which merges groups or frees blocks.
    """

    epoch: int
    start: int
    end: int
    merges: bool


class Epochs(Sequence[Epoch]):
    """All epochs of the longest request; an epoch is built when somebody first asks for it.

    Args:
        config: A valid configuration.
    """

    def __init__(self, config: CascadeConfig) -> None:
        self._built: list[Epoch] = []
        self._others = _epochs(config)
        self._number = 1 - (self[0].end - config.max_model_len) // config.stride

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> Epoch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Epoch]: ...
    def __getitem__(self, index: int | slice) -> Epoch | list[Epoch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        self._built += islice(self._others, max(0, index + 1 - len(self._built)))
        return self._built[index]


@dataclass(frozen=True, slots=True)
class Layout:
    """The cascade's structure for requests of up to ``config.max_model_len`` tokens.

    Args:
        config: The configuration that the layout was built from.
        epochs: All epochs, in order.
        max_blocks: R, the most blocks that a request ever holds in a layer.
        max_groups: An upper bound on the groups that merge at one boundary.
    """

    config: CascadeConfig
    epochs: Epochs
    max_blocks: int
    max_groups: int

    @property
    def num_unmoved(self) -> int:
        """The most tokens that a request may have computed with nothing moved yet."""
        return self.epochs[0].end - (len(self.epochs) > 1)

    def need(self, num_tokens: int) -> int:
        """Count the blocks that a request holds once `num_tokens` tokens are computed."""
        return min(-(-num_tokens // self.config.block_size), self.max_blocks)

    def epoch_of(self, token: int) -> int:
        """Find the index of the epoch in which `token`, counted in the request, is computed."""
        after_first = (token - self.epochs[0].end) // self.config.stride + 1
        return min(max(0, after_first), len(self.epochs) - 1)

    def end_after(self, token: int) -> int:
        """Find the end of the epoch in which `token` is computed: one past its last token."""
        end = self.epochs[0].end + self.epoch_of(token) * self.config.stride
        return min(end, self.config.max_model_len)

    def boundaries_before(self, num_tokens: int) -> int:
        """Count the grid points that `num_tokens` computed tokens have passed.

        A grid point lies a whole number of strides, at least one, past the sinks. Grid points at
        which nothing moves, because the cache is still filling, count as well.
        """
        return max(0, (num_tokens - self.config.num_sink_tokens) // self.config.stride)

    def most_together(self, least: int, most: int) -> int:
        """Count the tokens that a step with drafts may compute, so that none of them is a boundary.

        A boundary cannot be taken back. So its token, after which groups merge, is computed alone:
        then the token is no draft that may be rejected, and no draft comes after it.

        Args:
            least: Fewest tokens that the request may have computed before the step.
            most: Most tokens that it may have computed.

        Returns:
            Tokens, at least 1.
        """
        return max(1, self.end_after(least) - 1 - most)

    def held(self, num_tokens: int) -> tuple[Entries, int]:
        """Tell what a request holds.

        Args:
            num_tokens: Tokens computed, at least 1; a boundary right after the last of them has
                run.

        Returns:
            [num_blocks] row entries in logical order, and the number of places filled in them.
        """
        epoch = self.epochs[self.epoch_of(num_tokens)]
        places = epoch.place(num_tokens)
        return epoch.table[: -(-places // self.config.block_size)], places

    def parts(self, num_tokens: int) -> dict[str, int]:
        """Divide what `held` gives into its parts, oldest first.

        Args:
            num_tokens: Tokens computed, at least 1.

        Returns:
            "sinks", "sub-cache N-1" .. "sub-cache 0", each with the number of places it takes.
            Until the first boundary all places but the sinks' are sub-cache 0's. Of an elastic
            structure "level i", without the levels that are empty.
        """
        name = "level" if self.config.is_elastic else "sub-cache"
        epoch = self.epochs[self.epoch_of(num_tokens)]
        places = epoch.place(num_tokens)
        older = epoch.sub_caches[1:]
        parts = {"sinks": min(self.config.num_sink_tokens, places)}
        for number in range(len(older), 0, -1):
            if older[number - 1] or not self.config.is_elastic:
                parts[f"{name} {number}"] = older[number - 1]
        return parts | {f"{name} 0": places - sum(parts.values())}

    def segments(self, start: int, end: int) -> list[Segment]:
        """Cut the tokens ``start .. end - 1`` of a request where epochs end.

        Args:
            start: First token, which is the number of tokens computed so far.
            end: One past the last token.

        Returns:
            One segment for each epoch that the tokens lie in, in order.

        Raises:
            ValueError: The range is empty, or ends past the longest request.
        """
        if not 0 <= start < end <= self.config.max_model_len:
            raise ValueError(
                f"tokens {start} .. {end} are not within a request of up to "
                f"{self.config.max_model_len} tokens"
            )
        found = []
        while start < end:
            index = self.epoch_of(start)
            stop = min(end, self.epochs[index].end)
            merges = stop == self.epochs[index].end and index + 1 < len(self.epochs)
            found.append(Segment(index, start, stop, merges))
            start = stop
        return found


@lru_cache(maxsize=8)
def build_layout(config: CascadeConfig) -> Layout:
    """Lay out a request of up to ``config.max_model_len`` tokens.

    Args:
        config: A valid configuration.

    Returns:
        The layout; callers of the same configuration share one.

    Source: Willette et al., arXiv 2406.17808; groups of whole blocks are ours.
    """
    epochs = Epochs(config)
    return Layout(config, epochs, _most_blocks(config, len(epochs)), _most_groups(config))


def _epochs(config: CascadeConfig) -> Iterator[Epoch]:
    """The epochs of the longest request, in order."""
    block, stride = config.block_size, config.stride
    sizes = _sizes(config)
    sinks = list(range(config.num_sink_tokens // block))
    end = _first_end(config)
    table = list(range(-(-end // block)))
    # Oldest first in each sub-cache; sub-cache 0 takes what is left once the others are full.
    # Levels are empty at first.
    rest, caches = table[len(sinks) :], list[list[int]]()
    for size in reversed(sizes[1:]):
        caches.insert(0, rest[:size])
        rest = rest[size:]
    caches.insert(0, rest)
    sub_caches = (0,) * len(sizes)
    epoch_table, start, prefix = _array(table), 0, 0
    while True:
        last = end == config.max_model_len
        groups = _no_groups(config) if last else _array(_move(caches, sizes, config))
        groups = groups.reshape(-1, config.group_tokens // block)
        yield Epoch(start, end, prefix * block, epoch_table, groups, sub_caches)
        if last:
            return
        sub_caches = tuple(len(cache) * block for cache in caches)
        kept = sinks + [entry for cache in reversed(caches) for entry in cache]
        start, end, prefix = end, min(end + stride, config.max_model_len), len(kept)
        # The lowest free entries, so that no entry reaches `max_blocks`.
        fresh = -(-(end - start) // block)
        free = np.setdiff1d(np.arange(len(kept) + fresh, dtype=np.int32), _array(kept))[:fresh]
        caches[0] += free.tolist()
        epoch_table = np.concatenate([_array(kept), free])


def _first_end(config: CascadeConfig) -> int:
    """The end of epoch 0: the first grid point at which the cache is overfull."""
    return min(config.first_boundary, config.max_model_len)


def _sizes(config: CascadeConfig) -> list[int]:
    """Blocks of each fixed sub-cache, number 0 first; levels have no size of their own."""
    if config.is_elastic:
        return [0] * config.num_sub_caches
    return [size // config.block_size for size in config.sub_cache_tokens]


def _most_blocks(config: CascadeConfig, num_epochs: int) -> int:
    """The most blocks that a request ever holds.

    All sub-caches are full from the first boundary on. Sub-caches 1 .. N-2 count in binary what
    they hold beyond their size: each of them hands on a group for every second half group that it
    receives. So once k groups have left sub-cache 0, the request holds half a group more for every
    bit that is set among the lowest N-2 bits of k.
    """
    block, first_end = config.block_size, _first_end(config)
    at_first = -(-first_end // block)
    if num_epochs == 1:
        return at_first
    if config.is_elastic:
        return max(at_first, _most_blocks_of_levels(config, num_epochs - 1))
    newest, *older = (size // block for size in config.sub_cache_tokens)
    group, per_epoch = config.group_tokens // block, config.stride // config.group_tokens
    full, leaving = config.num_sink_tokens // block + newest + sum(older), 0
    if older:
        leaving, rest = divmod(at_first - full, group)
        full += rest
    boundaries, digits = num_epochs - 1, max(0, len(older) - 1)
    last_start = first_end + (boundaries - 1) * config.stride
    last = leaving + per_epoch * (boundaries - 1)
    at_last = -(-(config.max_model_len - last_start) // block)
    at_last += group // 2 * _most_ones(last, per_epoch, 1, digits)
    between = 0
    if boundaries > 1:
        between = config.stride // block
        between += group // 2 * _most_ones(leaving, per_epoch, boundaries - 1, digits)
    return max(at_first, full + max(at_last, between))


def _most_blocks_of_levels(config: CascadeConfig, boundaries: int) -> int:
    """The most blocks that a request with levels holds after its first boundary."""
    block, sinks = config.block_size, config.num_sink_tokens
    last_start = config.first_boundary + (boundaries - 1) * config.stride
    levels = config.levels
    at_last = levels.bound if boundaries > FOLLOWED else levels.held(boundaries)
    at_last = at_last * config.unit_tokens + config.max_model_len - last_start
    between = 0
    if boundaries > 1:
        between = levels.most_held(boundaries - 1) * config.unit_tokens + config.stride
    return -(-(sinks + max(at_last, between)) // block)


def _most_ones(first: int, step: int, number: int, digits: int, tried: int = 1 << 16) -> int:
    """The most bits set among the lowest `digits` of ``first + step * i``, for i below `number`.

    Up to `tried` numbers are looked at one by one. For more numbers the answer is exact if `step`
    is a power of two; otherwise the answer may be too large.
    """
    mask = (1 << digits) - 1
    if min(number, mask + 1) <= tried:
        found = (first + step * i for i in range(min(number, mask + 1)))
        return max((value & mask).bit_count() for value in found)
    zeros = (step & -step).bit_length() - 1
    if step != 1 << zeros:
        return digits
    # A step leaves the bits below `zeros` as they are, and adds one to the number above them.
    fixed = (first & (step - 1) & mask).bit_count()
    least, width = first >> zeros, max(0, digits - zeros)
    most = least + number - 1
    if least >> width != most >> width:
        return fixed + width
    least, most = (end & ((1 << width) - 1) for end in (least, most))
    # Candidates: the last number, and each number that turns one of its ones into a zero and all
    # bits below into ones.
    ones = [most.bit_count()]
    for place in range(width):
        other = (most >> place << place) - 1
        if most >> place & 1 and other >= least:
            ones.append(other.bit_count())
    return fixed + max(ones)


def _most_groups(config: CascadeConfig) -> int:
    """An upper bound on the groups that merge at one boundary."""
    if config.is_elastic:
        most = config.most_units + config.stride // config.unit_tokens
        return most - config.capacity_units
    newest, *older = config.sub_cache_tokens
    overfull = _first_end(config) - config.num_sink_tokens - newest - sum(older)
    leaving = max(config.stride, overfull) // config.group_tokens
    total = 0
    for _ in older:
        total += leaving
        leaving = (leaving + 1) // 2
    return total


def _move(caches: list[list[int]], sizes: list[int], config: CascadeConfig) -> list[list[int]]:
    """Run one boundary: edit `caches` in place, return the row entries of each group that merges.

    A token that passed through two sub-caches at one boundary would have to merge twice. The rule
    that a stride is at most two of the smallest sub-caches excludes this case; levels count what
    they hand on before anything moves.
    """
    blocks = config.group_tokens // config.block_size
    groups: list[list[int]] = []
    if config.is_elastic:
        counts = [2 * len(cache) // blocks for cache in caches]
        pairs = merging_pairs(counts, config.newest_units, config.capacity_units)
        for level, merging in enumerate(pairs):
            for _ in range(merging):
                leaving = caches[level][:blocks]
                del caches[level][:blocks]
                groups.append(leaving)
                caches[level + 1] += leaving[: blocks // 2]
        return groups
    for older, cache, size in zip(caches[1:], caches, sizes, strict=False):
        while len(cache) >= size + blocks:
            leaving = cache[:blocks]
            del cache[:blocks]
            groups.append(leaving)
            older += leaving[: blocks // 2]
    del caches[-1][: max(0, len(caches[-1]) - sizes[-1])]
    return groups


def _array(entries: list[int] | list[list[int]]) -> Entries:
    return np.asarray(entries, dtype=np.int32)


def _no_groups(config: CascadeConfig) -> Entries:
    return np.empty((0, config.group_tokens // config.block_size), dtype=np.int32)
