"""The oracle's structure: against the paper's algorithm, and its bounds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.attention import rope_table, rotate
from reference.cascade import Cascade, CascadeParameters
from reference.cascade_attention import CascadeRun
from reference.paper import token_by_token
from reference.selection import select
from small_model import parameters


def random_scores(total: int, stride: int, seed: int) -> Tensor:
    """Running scores after each stride: [strides, total], float64."""
    draw = torch.rand(
        total // stride, total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    running = [draw[0]]
    for row in draw[1:]:
        running.append(0.99 * running[-1] + row)
    return torch.stack(running)


@pytest.mark.parametrize(
    ("total", "stride", "size", "sub_caches", "block"),
    [
        (4096, 128, 128, 4, 16),
        (8192, 256, 256, 4, 16),
        (16384, 256, 512, 4, 32),
        (4096, 32, 64, 2, 16),
        (4096, 128, 128, 3, 32),
        (8192, 128, 128, 1, 16),
        (16384, 512, 512, 6, 16),
        (8192, 256, 128, 4, 16),
    ],
)
@pytest.mark.parametrize("sinks", [0, 64])
def test_aligned_pairs_keep_the_papers_tokens(total, stride, size, sub_caches, block, sinks):
    tables = torch.stack([random_scores(total, stride, seed) for seed in (1, 2)], dim=1)
    settings = CascadeParameters(block, sinks, size * sub_caches, sub_caches, stride, 2)
    cascade = Cascade(settings, num_kv_heads=2)
    kept = []
    for start, end, k in settings.segments(sinks + total):
        table = torch.nn.functional.pad(tables[max(k - 1, 0)], (sinks, 0))

        def choose(sub_cache: int, windows: Tensor, table: Tensor = table) -> Tensor:
            return select([(1.0, table.gather(1, windows.flatten(1)).view(windows.shape))])

        cascade.finish_stride(range(start, end), choose)
        assert cascade.kept[:, :sinks].tolist() == [list(range(sinks))] * 2
        if k > 0:
            kept.append(cascade.kept[:, sinks:] - sinks)
            assert cascade.kept.shape[1] + stride <= settings.max_tokens_held
    for head in range(2):
        expected = token_by_token(total, stride, size, sub_caches, tables[:, head].tolist())
        assert [step[head].tolist() for step in kept] == expected
        assert expected[-1][0] >= total - size * (2**sub_caches - 1)
    assert sub_caches == 1 or kept[-1][0].tolist() != kept[-1][1].tolist()


def test_real_attention_keeps_the_papers_tokens():
    """The same, with scores from attention over the kept keys at their places."""
    total, size, settings = (
        512,
        32,
        parameters(block_size=8, num_sink_tokens=0, cache_tokens=96, stride=32),
    )
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, total, 16, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    rope = rope_table(settings.max_tokens_held, 16, 100.0, torch.float64)
    run = CascadeRun(settings, {}, rtol=0.0, num_layers=1)
    run.attend(0, query[:, None], key, value, rope)
    for head in range(2):

        def attention_scores(k, tokens, old, head=head):
            new = dict.fromkeys(tokens, 0.0)
            first = tokens.index(32 * k)
            for place in range(first, len(tokens)):
                seen = tokens[: place + 1]
                q = rotate(query[head, tokens[place]][None], rope[:, place : place + 1])
                p = (rotate(key[head, seen], rope[:, : place + 1]) @ q[0] / 4).softmax(0).tolist()
                for t, mass in zip(seen, p, strict=True):
                    new[t] += settings.score_decay ** (first + 31 - place) * mass
            return {t: old.get(t, 0.0) * settings.score_decay**32 + new[t] for t in tokens}

        expected = token_by_token(total, 32, size, 3, attention_scores)
        assert [run.kept[k][0][head].tolist() for k in sorted(run.kept)] == expected


@st.composite
def valid_parameters(draw: st.DrawFn) -> CascadeParameters:
    block = draw(st.sampled_from([1, 2, 4, 8]))
    window = draw(st.sampled_from([2, 4, 8, 16, 32]))
    sub_caches = draw(st.integers(1, 5))
    group = max(window, 2 * block)
    stride = group * draw(st.integers(1, 3))
    least = -(-stride // (2 * block))  # stride <= 2 * w
    blocks = draw(st.integers(least, least + 30))
    more = block * draw(st.integers(0, 60)) + draw(st.integers(0, block - 1))
    budget = blocks * block * sub_caches + more
    return CascadeParameters(
        block_size=block,
        num_sink_tokens=block * draw(st.integers(0, 3)),
        cache_tokens=budget,
        num_sub_caches=sub_caches,
        newest_share=draw(st.sampled_from([0.0, (blocks * block + more + block / 2) / budget])),
        stride=stride,
        selection_window=window,
    )


def test_copies_its_parameters_from_any_configuration():
    fields = {name: getattr(parameters(), name) for name in CascadeParameters.__slots__}
    assert CascadeParameters.like(SimpleNamespace(**fields, policy="paper")) == parameters()


@settings(max_examples=100, deadline=None)
@given(valid_parameters(), st.integers(0, 2**31))
def test_memory_stays_under_the_bound(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    cascade = Cascade(settings, num_kv_heads=2)
    filled = settings.num_sink_tokens + sum(settings.sub_cache_tokens)

    def choose(sub_cache: int, windows: Tensor) -> Tensor:
        return select([(1.0, torch.rand(windows.shape, generator=generator))])

    for start, end, _ in settings.segments(filled * 3 + 20 * settings.stride):
        held = cascade.kept.shape[1] + end - start
        assert held <= settings.max_tokens_held
        cascade.finish_stride(range(start, end), choose)
        kept = cascade.kept
        assert kept.shape[1] == end if end <= filled else kept.shape[1] >= filled
        assert kept.shape[1] % settings.block_size == 0
        assert (kept.diff(dim=1) > 0).all()
        sinks = torch.arange(min(end, settings.num_sink_tokens))
        assert (kept[:, : len(sinks)] == sinks).all()
        newest = torch.arange(max(0, end - settings.sub_cache_tokens[0]), end)
        assert (kept[:, -len(newest) :] == newest).all()


def test_a_window_wider_than_two_blocks_moves_whole_windows():
    settings = parameters(num_sink_tokens=0, selection_window=16, cache_tokens=32, num_sub_caches=2)
    cascade = Cascade(settings, num_kv_heads=1)

    def keep_older_half(sub_cache: int, windows: Tensor) -> Tensor:
        return (torch.arange(16) < 8).expand(windows.shape)

    for start, end, _ in settings.segments(64):
        cascade.finish_stride(range(start, end), keep_older_half)
    # 48 tokens: 16 go to sub-cache 1, one group of 16 leaves the 32 others; 64: again, and of 32
    # tokens in sub-cache 1 the oldest 16 are dropped.
    assert cascade.kept.tolist() == [[*range(16, 24), *range(32, 40), *range(48, 64)]]
