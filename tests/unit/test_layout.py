"""The layout's properties over random valid configurations, and its content against simulations.

No torch, no vLLM: tokens are played through the tables as numbers.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from laid_out import (
    KEEPS,
    LONG,
    UNALIGNED,
    WAITS,
    Draws,
    Request,
    aligned_configurations,
    configuration,
    configurations,
    elastic_configurations,
    every_structure,
    quick,
    simulate,
)
from reference.paper import token_by_token
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import _most_ones, build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve


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
    """What is held stands for all of the text, each entry for as much as its level says."""
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
    # The last token of the longest request counts as a boundary's, at which nothing merges.
    if len(starts) == 1 and most + length < config.max_model_len - 1:
        assert most in merging or not is_safe(length + 1)


@given(every_structure())
@quick
def test_each_token_lies_before_the_end_of_its_epoch(config: CascadeConfig) -> None:
    layout = build_layout(config)
    for token in range(config.max_model_len):
        assert layout.end_after(token) == layout.epochs[layout.epoch_of(token)].end


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
        row = draws.row(number)[sinks:].tolist()  # the paper's 0 is after the sinks
        return {token: row[token] for token in tokens}

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
