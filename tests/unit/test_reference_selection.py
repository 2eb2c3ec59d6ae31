"""The oracle's ranks and selection, by definition and at the edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.selection import distinctiveness, rank, select

NAN, INF = math.nan, math.inf


def ranks_by_definition(values: list[float]) -> list[int]:
    def key(i: int) -> tuple[bool, float, int]:
        return (not math.isnan(values[i]), 0.0 if math.isnan(values[i]) else values[i], i)

    order = sorted(range(len(values)), key=key)
    return [order.index(i) for i in range(len(values))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], [2, 0, 1, 3]),
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),
        ([0.0, -0.0], [0, 1]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
        ([0.0, NAN, -INF, INF], [2, 0, 1, 3]),
        ([INF, 5.0, INF, NAN], [2, 1, 3, 0]),
        ([-INF, NAN], [1, 0]),
    ],
)
def test_rank_at_the_edges(values, expected):
    assert rank(torch.tensor(values)).tolist() == expected


@given(st.lists(st.sampled_from([NAN, -INF, INF, 0.0, 1.0, 1.5]), min_size=1, max_size=9))
def test_rank_is_the_definition(values):
    assert rank(torch.tensor(values)).tolist() == ranks_by_definition(values)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_windows_keep_the_newer_half(value, dtype):
    window = torch.full((2, 3, 8), value, dtype=dtype)
    newer_half = [False] * 4 + [True] * 4
    for terms in ([(1.0, window)], [(1.0, window), (0.5, window), (2.0, window)]):
        kept = select(terms)
        assert (kept == torch.tensor(newer_half)).all()


def test_select_keeps_half_whatever_the_values():
    special = [NAN, INF, -INF, 0.0]
    windows = torch.tensor(list(itertools.product(special, repeat=4)))
    for weight in (0.25, 0.5, 1.0):
        terms = [(1.0, windows), (weight, windows.flip(0)), (weight, windows.roll(7, 0))]
        assert (select(terms).sum(-1) == 2).all()


def test_select_by_score_prefers_high_then_new():
    score = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, NAN], [NAN, INF]])
    assert select([(1.0, score)]).tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]


def test_select_adds_weighted_ranks():
    score = torch.tensor([4.0, 3.0, 2.0, 1.0])  # ranks 3 2 1 0
    distinct = torch.tensor([-4.0, -3.0, -1.0, -2.0])  # ranks 0 1 3 2

    def kept(*weights: float) -> list[bool]:
        terms = zip(weights, (score, distinct, torch.tensor([1.0, 0.0, 0.0, 0.0])), strict=False)
        return select([(weight, values) for weight, values in terms if weight]).tolist()

    assert kept(1, 0.5) == [True, False, True, False]  # 3 2.5 2.5 1
    assert kept(1, 1.0) == [False, True, True, False]  # 3 3 4 2
    assert kept(1, 10.0) == [False, False, True, True]
    assert kept(1, 0) == [True, True, False, False]
    assert kept(0, 1) == [False, False, True, True]
    assert kept(1, 1, 1) == [True, False, True, False]  # ranks 3 0 1 2 more: 6 3 5 4


def test_select_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="even"):
        select([(1.0, torch.zeros(3))])
    with pytest.raises(ValueError, match="something to rank"):
        select([])


def test_distinctiveness_is_minus_the_cosine_to_the_mean_unit_key():
    keys = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    # Unit keys (1,0) (0,1) (0,1) (0,0): the mean points along (1, 2).
    expected = torch.tensor([-1.0, -2.0, -2.0, 0.0], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(distinctiveness(keys), expected)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert distinctiveness(opposite).tolist() == [0.0, 0.0]


def test_the_mean_is_over_a_quarter_of_the_places():
    keys = torch.randn(2, 300, 8, dtype=torch.float64)
    some = [*range(32), *range(128, 160), *range(256, 288)]
    alone = keys.clone()
    alone[:, [place for place in range(300) if place not in some]] = 0
    found = distinctiveness(keys)
    torch.testing.assert_close(found[:, some], distinctiveness(alone)[:, some])
    mean = torch.nn.functional.normalize(keys, dim=-1)[:, some].sum(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(keys, mean, dim=-1)
    torch.testing.assert_close(found, -cosine)


def test_a_vector_that_is_not_finite_has_no_direction():
    keys = torch.tensor([[3.0, 0.0], [0.0, 0.5], [INF, 1.0], [NAN, 0.0]])
    found = distinctiveness(keys)
    assert found[2:].isnan().all()
    torch.testing.assert_close(found[:2], distinctiveness(keys[:2]))
