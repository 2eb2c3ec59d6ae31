"""Replaying decisions in the oracle, and which differences near ties explain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reference.cascade import Cascade, CascadeParameters
from reference.llama import Llama
from reference.replay import ReplayError, explained, rank_bounds
from reference.selection import rank, select
from small_model import NUM_TOKENS, TINY, assert_same, parameters

NAN, INF = math.nan, math.inf

RULES = {
    "scores": parameters(selection_window=8),
    "ranks": parameters(selection_window=8, score_power=2.0, key_weight=1.0, value_weight=1.0),
    "no scores": parameters(selection_window=8, score_weight=0.0, key_weight=1.0, value_weight=1.0),
}
FIRST_MERGE = 4  # 64 tokens past the sinks, of a budget of 48: sub-cache 0 is tokens 36 .. 67
FIRST_WINDOW = range(36, 44)


@pytest.fixture(scope="module", params=RULES)
def replayed(request, model, tokens):
    """A rule, and what the reference keeps by it."""
    return RULES[request.param], model.run(tokens, RULES[request.param])


def windows_by_structure(settings: CascadeParameters) -> int:
    count = 0

    def choose(sub_cache: int, windows: Tensor) -> Tensor:
        nonlocal count
        count += windows.shape[0] * windows.shape[1]
        return select([(1.0, torch.zeros(windows.shape))])

    cascade = Cascade(settings, num_kv_heads=2)
    for start, end, k in settings.segments(NUM_TOKENS):
        if end == settings.boundary_token(k):
            cascade.finish_stride(range(start, end), choose)
    return 2 * count


def test_replaying_its_own_decisions_finds_no_difference(replayed, model, tokens):
    settings, run = replayed
    again = model.run(tokens, settings, forced=run.kept)
    assert again.comparison.windows == windows_by_structure(settings) > 0
    assert run.comparison.windows == 0
    assert not again.comparison.differing
    assert_same(again.logprobs, run.logprobs)
    assert all(torch.equal(again.kept[k], run.kept[k]) for k in run.kept)


def swaps(kept: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Every way to exchange one survivor of the first window of layer 1, head 0."""
    row = kept[1, 0].tolist()
    inside = [t for t in row if t in FIRST_WINDOW]
    for gone, back in itertools.product(inside, set(FIRST_WINDOW) - set(inside)):
        changed = kept.clone()
        changed[1, 0] = torch.tensor(sorted({*row, back} - {gone}))
        yield gone, back, changed


def test_a_worse_token_kept_is_reported_and_not_explained(replayed, model, tokens):
    settings, run = replayed
    count = 0
    for gone, back, changed in swaps(run.kept[FIRST_MERGE]):
        forced = {k: t for k, t in run.kept.items() if k < FIRST_MERGE} | {FIRST_MERGE: changed}
        comparison = model.run(tokens[:68], settings, forced).comparison
        (window,) = comparison.differing
        assert (window.boundary, window.layer, window.kv_head) == (FIRST_MERGE, 1, 0)
        assert window.sub_cache == 0
        assert window.tokens == list(FIRST_WINDOW)
        assert set(window.own) - set(window.replayed) == {gone}
        assert set(window.replayed) - set(window.own) == {back}
        assert not window.explained
        assert comparison.unexplained == [window]
        loose = model.run(tokens[:68], settings, forced, rtol=3.0).comparison
        assert len(loose.differing) == 1
        assert not loose.unexplained
        count += 1
    assert count == 16


def test_later_decisions_follow_the_replayed_state(replayed, model, tokens):
    """Each window is compared in the replayed state, so one swap is one difference."""
    settings, run = replayed
    _, _, changed = next(swaps(run.kept[FIRST_MERGE]))
    led = model.run(tokens, settings, forced={FIRST_MERGE: changed})
    assert torch.equal(led.kept[FIRST_MERGE], changed)
    assert (led.logprobs - run.logprobs).abs().max() > 1e-3
    followed = model.run(tokens, settings, forced=led.kept)
    assert len(followed.comparison.differing) == 1
    assert_same(followed.logprobs, led.logprobs)


def test_float32_differs_from_float64_only_where_explained(replayed, tensors, model, tokens):
    settings, _ = replayed
    single = Llama(TINY, tensors, torch.float32).run(tokens, settings)
    run = model.run(tokens, settings, forced=single.kept)
    assert not run.comparison.unexplained
    torch.testing.assert_close(single.logprobs.double(), run.logprobs, rtol=0, atol=1e-4)


def _misplace(kept: Tensor) -> Tensor:
    return torch.cat((kept[..., :20], kept[..., [21, 20]], kept[..., 22:]), dim=-1)


def _undropped(kept: Tensor) -> Tensor:
    return torch.cat((kept[..., :1], kept), dim=-1)


def _unbalanced(kept: Tensor) -> Tensor:
    row = kept[0, 0].tolist()
    gone = max(t for t in row if t in FIRST_WINDOW)
    back = min(set(range(44, 52)) - set(row))
    changed = kept.clone()
    changed[0, 0] = torch.tensor(sorted({*row, back} - {gone}))
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_misplace, "place 20"),
        (_undropped, "by the structure"),
        (_unbalanced, "not half"),
        (lambda kept: kept + 1000, "outside"),
        (lambda kept: kept[:1], "layers"),
    ],
)
def test_impossible_decisions_are_errors(change, message, replayed, model, tokens):
    settings, run = replayed
    with pytest.raises(ReplayError, match=message):
        model.run(tokens[:68], settings, forced={FIRST_MERGE: change(run.kept[FIRST_MERGE])})


def test_decisions_beyond_the_run_are_errors(replayed, model, tokens):
    settings, run = replayed
    with pytest.raises(ReplayError, match="beyond the 67 tokens"):
        model.run(tokens[:67], settings, forced={FIRST_MERGE: run.kept[FIRST_MERGE]})


def judge(terms, replayed, rtol=1e-4):
    terms = [(1.0, torch.tensor(values, dtype=torch.float64)) for values in terms]
    choice = torch.zeros(len(terms[0][1]), dtype=torch.bool)
    choice[replayed] = True
    return explained(choice, select(terms), terms, rtol)


@pytest.mark.parametrize(
    ("score", "replayed", "expected"),
    [
        ([1.0, 1.00005], [0], True),
        ([1.0, 1.0], [0], True),
        ([1.0, 1.001], [0], False),
        ([1.0, 2.0, 1.00005, 3.0], [0, 1], False),  # 0 for 3
        ([2.0, 1.0, 2.00005, 2.00008], [0, 3], True),  # 0 for 2
        ([2.0, 1.0, 2.00005, 2.00008], [0, 2], True),  # 0 for 3
        ([1.0, 1.00008, 1.00016, 0.0], [0, 1], False),  # 0 for 2, though each is near 1
        ([1.0, 1.2, 1.20005, 3.0], [0, 1], False),  # 1 for 2 alone would do
        ([NAN, 0.0], [0], False),
        ([1.0, INF], [0], False),
    ],
)
def test_a_difference_in_scores_is_explained_by_near_ties_only(score, replayed, expected):
    assert judge([score], replayed) is expected


@pytest.mark.parametrize(
    ("score", "distinct", "replayed", "expected"),
    [
        # Sums of ranks 0+1, 1+0: equal, so the newer stays; keeping the older is an error,
        ([1.0, 2.0], [2.0, 1.0], [0], False),
        # unless a near-tie could have given it a higher sum.
        ([1.0, 1.00001], [2.0, 1.0], [0], True),
        ([2.0, 1.0], [-1.00001, -1.0], [0], True),
        ([2.0, 1.0], [-1.0, -1.00001], [1], True),
        ([1.0, 2.0], [-1.00001, -1.0], [0], False),  # at best as high, and older
        ([1.0, 2.0], [-2.0, -1.0], [0], False),
        # Ranks 2 1 3 0 and 3 2 1 0: sums 5 3 4 0. Token 1 for 2 needs a lead over token 2.
        ([3.0, 2.0, 4.0, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], False),
        ([3.0, 2.0, 3.0001, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], False),
        ([3.0, 2.9999, 3.0001, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], True),
    ],
)
def test_a_difference_in_rank_sums_is_explained_by_near_ties_only(
    score, distinct, replayed, expected
):
    assert judge([score, distinct], replayed) is expected


def test_rank_bounds_hold_for_every_order_of_close_values():
    generator = torch.Generator().manual_seed(9)
    for _ in range(50):
        x = 1 + torch.rand(8, generator=generator, dtype=torch.float64) * 1e-3
        low, high = rank_bounds(x, 1e-4)
        assert ((low <= rank(x)) & (rank(x) <= high)).all()
        noise = (torch.rand(64, 8, generator=generator, dtype=torch.float64) - 0.5) * 0.99e-4
        shaken = rank(x + noise)
        assert ((low <= shaken) & (shaken <= high)).all()
    for bound in rank_bounds(torch.tensor([NAN, INF, 1.0, -INF, NAN, INF]), 1e-4):
        assert bound.tolist() == [0, 4, 3, 2, 1, 5]
