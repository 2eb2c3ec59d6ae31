"""Configurations drawn at random, and requests whose tokens are played through a layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from reference.blocks import Boundary, block_moves, elastic_moves
from vllm_cascade.structure.config import CascadeConfig, broken_rule
from vllm_cascade.structure.layout import Layout

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
LONG = configuration(block=16, sinks=64, size=128, number=8, stride=128, window=2, total=70_000)
UNALIGNED = configuration(
    block=16, sinks=64, size=272, number=6, stride=256, window=64, total=60_001
)


class Draws:
    """Random scores, the same for every simulation; few levels at times, so that tokens tie."""

    def __init__(self, seed: int, total: int) -> None:
        levels = (2, 5, 1 << 40)[seed % 3]

        def row(stride_number: int) -> np.ndarray:
            return np.random.default_rng([seed, stride_number]).integers(0, levels, total)

        self.row = lru_cache(maxsize=4)(row)  # [total] scores at the end of that stride

    def choose(self, stride_number: int, tokens: Sequence[int]) -> list[int]:
        """The better half of `tokens`, the newer on a tie, in their order."""
        scores = self.row(stride_number)[np.asarray(tokens, dtype=int)].tolist()
        best = sorted(zip(scores, tokens, strict=True))[len(tokens) // 2 :]
        return sorted(token for _, token in best)

    def choose_each(self, stride_number: int, windows: np.ndarray) -> np.ndarray:
        """As `choose` of each row [number, tokens], all rows at once."""
        order = np.lexsort((windows, self.row(stride_number)[windows]))
        kept = order[:, windows.shape[1] // 2 :]
        return np.sort(np.take_along_axis(windows, kept, axis=1))


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
            tokens = self.pages[group].reshape(-1)
            self.leaving.append(tokens.tolist())
            kept = self.draws.choose_each(boundary, tokens.reshape(-1, window)).reshape(-1)
            tokens = np.concatenate((kept, np.full(len(tokens) - len(kept), STALE)))
            self.pages[group] = tokens.reshape(len(group), -1)
        following = self.layout.epochs[index + 1]
        prefix = following.table[: following.prefix_tokens // config.block_size]
        self.pages[np.setdiff1d(np.arange(self.layout.max_blocks), prefix)] = STALE
