"""The layout's properties over random valid configurations, and its content against simulations.

No torch, no vLLM: tokens are played through the tables as numbers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reference.blocks import Boundary, block_moves, elastic_moves
from reference.paper import token_by_token
from vllm_cascade.structure.config import CascadeConfig, broken_rule
from vllm_cascade.structure.layout import Layout, _most_ones, build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
STALE = -1


def configuration(
    *,
    block: int,
    sinks: int,
    size: int,
    number: int,
    stride: int,
    window: int,
    total: int,
    more: int = 0,
    structure: str = "fixed",
    newest_share: float | None = None,
) -> CascadeConfig:
    """A configuration from its structure, `size` being an older sub-cache's tokens.

    The newest one has `more` tokens than that, in whole blocks.
    """
    budget = size * number + more
    return CascadeConfig(
        policy="blend",
        block_size=block,
        cache_tokens=budget,
        num_sub_caches=number,
        newest_share=(
            min(1.0, (size + more + block / 2) / budget)  # safely rounded to blocks
            if newest_share is None
            else newest_share
        ),
        num_sink_tokens=sinks,
        stride=stride,
        selection_window=window,
        score_weight=1.0,
        key_weight=1.0,
        value_weight=1.0,
        score_power=2.0,
        score_reduction="max",
        score_decay=0.9999999,
        trace_tokens=False,
        max_model_len=total,
        structure=structure,
    )


def powers(low: int, high: int) -> st.SearchStrategy[int]:
    """Powers of two from `low` to `high`."""
    return st.sampled_from([1 << i for i in range(16) if low <= 1 << i <= high])


@st.composite
def configurations(draw: st.DrawFn) -> CascadeConfig:
    """Any valid configuration; most requests overflow, some for many strides, some never do."""
    block, window = draw(powers(1, 128)), draw(powers(2, 128))
    number = draw(st.integers(1, 8))
    group = max(window, 2 * block)
    stride = group * draw(st.integers(1, 5))
    size = block * (-(-stride // (2 * block)) + draw(st.integers(0, 12)))
    sinks = block * draw(st.integers(0, 4))
    # Whole strides after the first overflow: few, or enough for the last sub-cache to drop.
    reach = size * (2**number - 1) // stride
    strides = draw(st.one_of(st.integers(-2, 12), st.integers(reach, 2 * reach + 8)))
    more = block * draw(st.integers(0, 40)) if number > 1 else 0
    filled = sinks + (number * size + more) // stride * stride
    total = max(1, min(filled + strides * stride, 60_000) + draw(st.integers(0, stride)))
    config = configuration(
        block=block,
        sinks=sinks,
        size=size,
        number=number,
        stride=stride,
        window=window,
        total=total,
        more=more,
    )
    # A budget that is no whole number of blocks comes to the same sub-caches.
    spare = draw(st.integers(0, block - 1))
    if spare:
        config = CascadeConfig(
            **{name: getattr(config, name) for name in config.__slots__}
            | {"cache_tokens": config.cache_tokens + spare}
        )
    assert broken_rule(config, config.max_places) is None
    assert config.sub_cache_tokens == (size + more, *[size] * (number - 1))
    return config


@st.composite
def aligned_configurations(draw: st.DrawFn) -> CascadeConfig:
    """The paper's rule where sub-cache and stride are multiples of block * 2**(N - 1)."""
    block, number = draw(powers(1, 16)), draw(st.integers(1, 5))
    unit = max(2 * block, block << (number - 1))
    size = unit * draw(st.integers(1, 4))
    stride = unit * draw(st.integers(1, 2 * size // unit))
    sinks = block * draw(st.integers(0, 3))
    strides = draw(st.integers(1, 24))
    total = sinks + number * size // stride * stride + strides * stride
    return configuration(
        block=block,
        sinks=sinks,
        size=size,
        number=number,
        stride=stride,
        window=2,
        total=min(total, 12_000) + draw(st.integers(0, stride)),
    )


def elastic(
    *, block: int, sinks: int, budget: int, share: float, stride: int, window: int, total: int
) -> CascadeConfig:
    """An elastic configuration with as many levels as its longest request can come to."""
    levels = max(2, (total // max(window // 2, block)).bit_length())
    config = configuration(
        block=block,
        sinks=sinks,
        size=budget,
        number=1,
        stride=stride,
        window=window,
        total=total,
        structure="elastic",
        newest_share=share,
    )
    return replace(config, num_sub_caches=levels)


@st.composite
def elastic_configurations(draw: st.DrawFn) -> CascadeConfig:
    """Any valid elastic one; in some more than the budget waits at times."""
    block, window = draw(powers(1, 64)), draw(powers(2, 128))
    unit = max(window // 2, block)
    stride = 2 * unit * draw(st.integers(1, 5))
    room = stride // unit + draw(st.integers(0, 24))
    newest = draw(st.integers(0, 12))
    budget = (newest + room) * unit
    strides = draw(st.one_of(st.integers(-2, 12), st.integers(20, 120)))
    filled = budget // stride * stride
    config = elastic(
        block=block,
        sinks=block * draw(st.integers(0, 4)),
        budget=budget + draw(st.integers(0, unit - 1)),
        share=min(1.0, (newest + 0.25) * unit / (budget + unit - 1)),
        stride=stride,
        window=window,
        total=max(1, min(filled + strides * stride, 60_000) + draw(st.integers(0, stride))),
    )
    assert broken_rule(config, config.max_places) is None
    return config


def every_structure() -> st.SearchStrategy[CascadeConfig]:
    return st.one_of(configurations(), elastic_configurations())


# With the budget kept at every boundary, and with more held at some.
KEEPS = elastic(block=16, sinks=64, budget=1024, share=0.25, stride=128, window=64, total=60_000)
WAITS = elastic(block=16, sinks=16, budget=256, share=0.25, stride=128, window=64, total=30_011)
# Well past the reach, with the smallest groups and with groups that often wait.
LONG = configuration(block=16, sinks=64, size=128, number=8, stride=128, window=2, total=100_000)
UNALIGNED = configuration(
    block=16, sinks=64, size=272, number=6, stride=256, window=64, total=60_001
)


class Draws:
    """Random scores, the same for every simulation; few levels at times, so that tokens tie."""

    def __init__(self, seed: int, total: int) -> None:
        levels = (2, 5, 1 << 40)[seed % 3]

        def row(stride_number: int) -> list[int]:
            generator = np.random.default_rng([seed, stride_number])
            return generator.integers(0, levels, total).tolist()

        self.row = lru_cache(maxsize=4)(row)  # [total] scores at the end of that stride

    def choose(self, stride_number: int, tokens: Sequence[int]) -> list[int]:
        """The better half of `tokens`, the newer on a tie, in their order."""
        row = self.row(stride_number)
        best = sorted(tokens, key=lambda token: (row[token], token))[len(tokens) // 2 :]
        return sorted(best)


def simulate(config: CascadeConfig, draws: Draws) -> Iterator[Boundary]:
    """Run the list simulation on `config`."""
    if config.is_elastic:
        return elastic_moves(
            config.max_model_len,
            config.num_sink_tokens,
            config.block_size,
            config.cache_tokens,
            config.newest_share,
            config.stride,
            config.selection_window,
            draws.choose,
        )
    return block_moves(
        config.max_model_len,
        config.num_sink_tokens,
        config.block_size,
        config.sub_cache_tokens,
        config.stride,
        config.selection_window,
        draws.choose,
    )


class Request:
    """A request's pages, with a token's index in every slot and `STALE` in all that is free."""

    def __init__(self, layout: Layout, draws: Draws) -> None:
        self.layout, self.draws = layout, draws
        self.pages = np.full((layout.max_blocks, layout.config.block_size), STALE)
        self.leaving: list[list[int]] = []

    def held(self, num_tokens: int) -> list[int]:
        """The tokens in logical order, as `Layout.held` finds them."""
        entries, places = self.layout.held(num_tokens)
        return self.pages[entries].reshape(-1)[:places].tolist()

    def run(self, start: int, end: int) -> None:
        """Compute tokens ``start .. end - 1``, with the boundaries among them."""
        config = self.layout.config
        for segment in self.layout.segments(start, end):
            epoch = self.layout.epochs[segment.epoch]
            tokens = np.arange(segment.start, segment.end)
            places = epoch.place(segment.start) + np.arange(len(tokens))
            entries = epoch.table[places // config.block_size]
            assert (self.pages[entries, places % config.block_size] == STALE).all()
            self.pages[entries, places % config.block_size] = tokens
            if segment.merges:
                self._merge(segment.epoch)

    def _merge(self, index: int) -> None:
        config, window = self.layout.config, self.layout.config.selection_window
        epoch = self.layout.epochs[index]
        boundary = (epoch.end - config.num_sink_tokens) // config.stride - 1
        self.leaving = []
        for group in epoch.groups:
            tokens = self.pages[group].reshape(-1).tolist()
            self.leaving.append(tokens)
            kept: list[int] = []
            for j in range(0, len(tokens), window):
                kept += self.draws.choose(boundary, tokens[j : j + window])
            kept += [STALE] * (len(tokens) - len(kept))
            self.pages[group] = np.reshape(kept, (len(group), -1))
        following = self.layout.epochs[index + 1]
        prefix = following.table[: following.prefix_tokens // config.block_size]
        self.pages[np.setdiff1d(np.arange(self.layout.max_blocks), prefix)] = STALE


@given(every_structure())
@quick
def test_no_row_entry_is_used_twice(config: CascadeConfig) -> None:
    for epoch in build_layout(config).epochs:
        assert len(np.unique(epoch.table)) == len(epoch.table)
        assert epoch.table.min() >= 0


@given(every_structure())
@quick
def test_epochs_follow_each_other_on_the_stride_grid(config: CascadeConfig) -> None:
    layout = build_layout(config)
    full = config.total_tokens - config.num_sink_tokens
    expected, end = [0], config.num_sink_tokens
    while end - config.num_sink_tokens <= full:
        end += config.stride
    expected += range(end, config.max_model_len, config.stride)
    assert [epoch.start for epoch in layout.epochs] == expected
    assert [epoch.end for epoch in layout.epochs] == [*expected[1:], config.max_model_len]


@given(every_structure())
@quick
def test_every_place_is_filled(config: CascadeConfig) -> None:
    block = config.block_size
    for epoch in build_layout(config).epochs:
        assert epoch.prefix_tokens % block == 0
        places = epoch.prefix_tokens + epoch.end - epoch.start
        assert epoch.place(epoch.start) == epoch.prefix_tokens
        assert epoch.place(epoch.end - 1) == places - 1
        assert len(epoch.table) == -(-places // block)


@given(every_structure())
@quick
def test_need_grows_to_the_most_blocks_and_no_further(config: CascadeConfig) -> None:
    layout = build_layout(config)
    need = [layout.need(n) for n in range(config.max_model_len + 1)]
    assert need[0] == 0
    assert all(0 <= after - before <= 1 for before, after in pairwise(need))
    assert all(n_blocks <= -(-n // config.block_size) for n, n_blocks in enumerate(need))
    assert max(need) == need[-1] == layout.max_blocks
    assert layout.max_blocks == max(len(epoch.table) for epoch in layout.epochs)
    assert layout.max_groups >= max(len(epoch.groups) for epoch in layout.epochs)


@given(every_structure())
@quick
def test_only_allocated_blocks_are_touched(config: CascadeConfig) -> None:
    layout = build_layout(config)
    for epoch in layout.epochs:
        places = epoch.prefix_tokens + np.arange(epoch.end - epoch.start)
        reached = np.maximum.accumulate(epoch.table)[places // config.block_size]
        need = [layout.need(token + 1) for token in range(epoch.start, epoch.end)]
        assert (reached < need).all()


@given(configurations())
@quick
def test_memory_stays_under_the_bound(config: CascadeConfig) -> None:
    layout, block = build_layout(config), config.block_size
    budget, waiting = sum(config.sub_cache_tokens), config.num_sub_caches - 1
    group = max(config.selection_window, 2 * block)
    bound = config.num_sink_tokens + budget + config.stride + waiting * (group - block)
    assert layout.max_blocks <= bound // block
    assert config.max_places == bound
    for epoch in layout.epochs:
        assert epoch.place(epoch.end - 1) < config.max_places


@given(elastic_configurations())
@quick
def test_levels_stay_under_the_bound(config: CascadeConfig) -> None:
    layout, unit = build_layout(config), max(config.selection_window // 2, config.block_size)
    room, newest = (
        config.cache_tokens // unit,
        int(config.cache_tokens * config.newest_share) // unit,
    )
    held = [sum(epoch.sub_caches) // unit for epoch in layout.epochs[1:]]
    most = max(held, default=room)
    assert room <= min(held, default=room)
    assert most <= max(room, newest + config.stride // unit + config.num_sub_caches)
    assert config.stays_in_budget == (most == room)
    assert config.max_places == config.num_sink_tokens + unit * most + config.stride
    assert layout.max_blocks * config.block_size <= config.max_places


@given(elastic_configurations())
@quick
def test_nothing_is_out_of_reach(config: CascadeConfig) -> None:
    """Density is even: no level but the lowest few has units while a lower one has many."""
    layout, unit = build_layout(config), max(config.selection_window // 2, config.block_size)
    for epoch in layout.epochs[1:]:
        text = sum(tokens << level for level, tokens in enumerate(epoch.sub_caches))
        assert text == epoch.start - config.num_sink_tokens, "a stretch of text has no survivors"
        assert all(tokens % unit == 0 for tokens in epoch.sub_caches)
        assert epoch.sub_caches[0] >= config.newest_units * unit


@given(aligned_configurations())
@quick
def test_aligned_sizes_hold_budget_and_stride_only(config: CascadeConfig) -> None:
    bound = config.num_sink_tokens + config.cache_tokens + config.stride
    assert build_layout(config).max_blocks <= bound // config.block_size


@given(every_structure(), st.integers(0, 2**32))
@quick
def test_segments_cover_a_range_however_it_is_cut(config: CascadeConfig, seed: int) -> None:
    layout, total = build_layout(config), config.max_model_len
    whole = [
        (index, epoch.place(token))
        for index, epoch in enumerate(layout.epochs)
        for token in range(epoch.start, epoch.end)
    ]
    cuts = random.Random(seed)
    longest = cuts.choice([1 + total // 3, config.stride // 2 + 1, 3 * config.stride])
    found, merges, start = [], [], 0
    while start < total:
        end = min(total, start + cuts.randint(1, longest))
        for segment in layout.segments(start, end):
            assert segment.start == len(found) < segment.end <= end
            epoch = layout.epochs[segment.epoch]
            found += [
                (segment.epoch, epoch.place(token)) for token in range(segment.start, segment.end)
            ]
            if segment.merges:
                merges.append(segment.end)
        assert len(found) == end
        start = end
    assert found == whole
    assert merges == [epoch.end for epoch in layout.epochs[:-1]]


@pytest.mark.parametrize(("start", "end"), [(3, 3), (5, 4), (-1, 3), (0, 101), (100, 101)])
def test_segments_refuse_what_is_no_range_of_a_request(start: int, end: int) -> None:
    config = configuration(block=2, sinks=2, size=4, number=2, stride=4, window=2, total=100)
    with pytest.raises(ValueError, match=f"{start} .. {end}.*100 tokens"):
        build_layout(config).segments(start, end)


@given(every_structure(), st.integers(0, 2**32), st.integers(0, 5))
@quick
def test_a_boundarys_token_is_computed_alone(config: CascadeConfig, seed: int, unsure: int) -> None:
    """However many of the drafts under way are accepted; and as many at once as that allows."""
    layout = build_layout(config)
    merging = {epoch.end - 1 for epoch in layout.epochs[:-1]}
    most = random.Random(seed).randrange(config.max_model_len)
    starts = range(max(0, most - unsure), most + 1)
    length = layout.most_together(starts[0], most)
    assert length >= 1

    def is_safe(length: int) -> bool:
        return all(merging.isdisjoint(range(start, start + length)) for start in starts)

    assert length == 1 or is_safe(length)
    if len(starts) == 1 and most + length < config.max_model_len:
        assert most in merging or not is_safe(length + 1)


@given(every_structure())
@quick
def test_boundaries_before_counts_grid_points(config: CascadeConfig) -> None:
    layout, passed = build_layout(config), 0
    for n in range(config.max_model_len + 1):
        passed += n == config.num_sink_tokens + (passed + 1) * config.stride
        assert layout.boundaries_before(n) == passed


@given(configurations())
@quick
def test_groups_leave_the_right_sub_caches_in_order(config: CascadeConfig) -> None:
    layout, block = build_layout(config), config.block_size
    draws = Draws(1, config.max_model_len)
    number = config.num_sub_caches
    group = max(config.selection_window // block, 2)
    before = [
        size // block for size in config.sub_cache_tokens
    ]  # at the first overflow each later sub-cache has its share
    boundaries = [b for b in simulate(config, draws) if b.end >= layout.epochs[0].end]
    for epoch, after, boundary in zip(layout.epochs, layout.epochs[1:], boundaries, strict=False):
        sub_caches, rest = [], epoch.table[config.num_sink_tokens // block :].tolist()
        for i in reversed(range(1, number)):
            sub_caches.insert(0, rest[: before[i]])
            rest = rest[before[i] :]
        sub_caches.insert(0, rest)
        groups = epoch.groups.tolist()
        assert len(np.unique(epoch.groups)) == epoch.groups.size, "groups share a block"
        expected = []
        for i in range(number - 1):
            moving = sum(sub_cache == i for sub_cache, _ in boundary.leaving)
            oldest = sub_caches[i][: moving * group]
            expected += [oldest[j : j + group] for j in range(0, len(oldest), group)]
            sub_caches[i] = sub_caches[i][len(oldest) :]
            # Survivors: the first half of each group's own blocks, at the newest end.
            for entries in expected[len(expected) - moving :]:
                sub_caches[i + 1] = sub_caches[i + 1] + entries[: group // 2]
        assert groups == expected
        before = [len(cache) // block for cache in boundary.caches]
        sub_caches[-1] = sub_caches[-1][len(sub_caches[-1]) - before[-1] :]
        kept = [entry for cache in reversed(sub_caches) for entry in cache]
        sinks = epoch.table[: config.num_sink_tokens // block].tolist()
        assert after.table[: after.prefix_tokens // block].tolist() == sinks + kept
    assert len(layout.epochs[-1].groups) == 0


@given(every_structure(), st.integers(0, 2**32))
@example(LONG, 0)
@example(UNALIGNED, 1)
@example(KEEPS, 2)
@example(WAITS, 3)
@quick
def test_content_is_that_of_the_list_simulation(config: CascadeConfig, seed: int) -> None:
    layout, draws = build_layout(config), Draws(seed, config.max_model_len)
    request, start = Request(layout, draws), 0
    sinks, most = list(range(config.num_sink_tokens)), 0
    for boundary in simulate(config, draws):
        last = boundary.end == config.max_model_len  # nothing follows: its boundary is left out
        request.leaving = []
        request.run(start, boundary.end)
        start = boundary.end
        if not last:
            assert request.leaving == [tokens for _, tokens in boundary.leaving]
            assert request.held(start) == sinks + boundary.kept
        most = boundary.most
    if start < config.max_model_len:
        held = request.held(start) if start else []
        request.run(start, config.max_model_len)
        held += range(start, config.max_model_len)
        assert request.held(config.max_model_len) == held
        most = max(most, len(held))
    assert layout.max_blocks == -(-most // config.block_size)


@given(aligned_configurations(), st.integers(0, 2**32))
@quick
def test_aligned_sizes_keep_the_papers_tokens(config: CascadeConfig, seed: int) -> None:
    total, sinks = config.max_model_len, config.num_sink_tokens
    layout, draws = build_layout(config), Draws(seed, total)

    def scores(number: int, tokens: list[int], _: object) -> dict[int, float]:
        row = draws.row(number)
        return {token: row[sinks + token] for token in tokens}  # the paper's 0 is after the sinks

    paper = token_by_token(
        max(0, total - sinks),
        config.stride,
        config.sub_cache_tokens[0],
        config.num_sub_caches,
        scores,
    )
    request, start = Request(layout, draws), 0
    for number, kept in enumerate(paper, start=1):
        end = sinks + number * config.stride
        request.run(start, end)
        if end < total:
            assert request.held(end) == [*range(sinks), *(sinks + token for token in kept)]
        start = end


def test_a_small_cascade_by_hand() -> None:
    config = configuration(block=2, sinks=2, size=4, number=2, stride=4, window=2, total=20)
    layout = build_layout(config)
    assert layout.max_blocks == 7
    assert [(e.start, e.end, e.prefix_tokens) for e in layout.epochs] == [
        (0, 14, 0),
        (14, 18, 10),
        (18, 20, 10),
    ]
    # sink | sub-cache 1 (two blocks and no more) | sub-cache 0 | this stride
    assert [epoch.table.tolist() for epoch in layout.epochs] == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 2, 3, 5, 6, 1, 4],
        [0, 3, 5, 1, 4, 2],
    ]
    assert [epoch.groups.tolist() for epoch in layout.epochs] == [[[3, 4]], [[5, 6]], []]
    assert [layout.need(n) for n in (0, 1, 2, 3, 13, 14, 15, 20)] == [0, 1, 1, 2, 7, 7, 7, 7]


def test_a_million_tokens_take_a_budget_of_blocks_and_a_few_megabytes_of_tables() -> None:
    config = resolve(CascadeOptions(), block_size=16, max_model_len=2**20, position_limit=131_072)
    layout = build_layout(config)
    assert layout.max_blocks == layout.need(2**20) == config.max_places // 16
    assert sum(epoch.table.nbytes for epoch in layout.epochs) < 6e6
    assert layout.epochs[-1].end == 2**20


@given(
    first=st.integers(0, 5000),
    shift=st.integers(0, 5),
    number=st.integers(1, 3000),
    digits=st.integers(0, 12),
)
def test_most_ones_of_many_numbers(first: int, shift: int, number: int, digits: int) -> None:
    step = 1 << shift
    ones = _most_ones(first, step, number, digits, tried=1)
    assert ones == _most_ones(first, step, number, digits, tried=1 << 20)


def test_a_trillion_tokens_are_laid_out_at_once() -> None:
    length = 10**12
    config = resolve(CascadeOptions(), block_size=64, max_model_len=length, position_limit=8192)
    begin = time.perf_counter()
    layout = build_layout(config)
    assert layout.epochs[40].start == layout.epochs[0].end + 39 * config.stride
    assert time.perf_counter() - begin < 2
    assert len(layout.epochs) == 1 + -(-(length - layout.epochs[0].end) // config.stride)
    held = max(len(epoch.table) for epoch in layout.epochs[:2000])
    assert held <= layout.max_blocks < 1.2 * held
