"""Merge groups: the survivors, where they go, and that nothing else changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from merge_cases import ALL, BOTH, Case, assert_same, copy, make_case
from reference import compaction as reference
from reference.selection import rank
from vllm_cascade.kernels.cpu import merge
from vllm_cascade.kernels.merge import means
from vllm_cascade.kernels.merge.groups import make_scratch, merge_groups
from vllm_cascade.kernels.merge.launch_config import launch_config
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import Merges
from vllm_cascade.kernels.weights import Weights

WEIGHTS = [
    Weights(1.0, 0.0, 0.0),
    BOTH,
    Weights(1.0, 0.1, 0.0),
    ALL,
    Weights(0.0, 1.0, 1.0),
    Weights(0.0, 0.0, 0.3),
    Weights(0.5, 0.0, 2.0),
]


STRUCTURED = [
    (2, 16, {}),
    (16, 16, {"dtype": torch.bfloat16, "num_kv_heads": 3, "head_size": 64}),
    (32, 32, {"dtype": torch.float16, "has_token": False}),
    (64, 16, {"dtype": torch.bfloat16, "head_size": 80}),
    (128, 16, {"num_kv_heads": 1, "head_size": 96}),
    (4, 128, {"num_kv_heads": 1}),
    (32, 16, {"num_kv_heads": 1, "head_size": 512}),
]


@pytest.mark.parametrize(
    ("window", "block_size", "options", "weights"),
    [
        *((*case, weights) for case in STRUCTURED for weights in WEIGHTS[::2]),
        # Of the widest, which takes the interpreter long, one that ranks by scores and by vectors.
        (512, 128, {"num_kv_heads": 1}, WEIGHTS[-1]),
    ],
    ids=str,
)
def test_structured_keys_merge_as_the_reference(
    device: torch.device, window: int, block_size: int, options: dict, weights: Weights
) -> None:
    case = make_case(
        device,
        [2, 0, 1],
        window=window,
        block_size=block_size,
        structured=True,
        has_score=weights.score > 0,
        **options,
    )
    assert_same(case.run(weights), case.expected(weights))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_merges_as_on_a_cpu(device: torch.device, weights: Weights) -> None:
    case = make_case(device, [1, 3], window=64, structured=True)
    # The CPU's rows hold full blocks alone.
    num_keys = case.merges.num_keys // 16 * 16
    case = replace(case, merges=replace(case.merges, num_keys=num_keys))
    expected = copy(case.pages)
    host = Pages.view(
        expected.kv.cpu()
        .new_empty(0)
        .set_(expected.kv.untyped_storage().cpu())
        .as_strided(expected.kv.shape, expected.kv.stride()),
        True,
        True,
    )
    groups = case.merges.groups.cpu().long()
    table = case.merges.block_table.cpu().long()
    batch = merge.MergeBatch(
        torch.cat([groups[0, :1], groups[1, :3]]),
        torch.tensor([0, 1, 1, 1]),
        [table[row, : int(num_keys[row]) // 16] for row in range(2)],
    )
    merge.merge_groups(host, batch, case.head_size, case.window, weights)
    assert_same(case.run(weights), host)


@pytest.mark.parametrize(
    ("dtype", "head_size", "window"),
    [
        (torch.float32, 64, 64),
        (torch.bfloat16, 128, 64),
        (torch.float16, 80, 32),
        (torch.bfloat16, 256, 128),
        (torch.bfloat16, 512, 64),
    ],
)
def test_random_keys_survive_up_to_near_ties(
    device: torch.device, dtype: torch.dtype, head_size: int, window: int
) -> None:
    case = make_case(device, [2, 1], window=window, head_size=head_size, dtype=dtype)
    got = case.run()
    windows = exact = 0
    for row, count in enumerate(case.merges.num_groups.tolist()):
        for group in range(count):
            for head in range(case.pages.kv.shape[1]):
                near = check_survivors(case, got, row, group, head)
                windows += len(near)
                exact += int((~near).sum())
    assert exact >= windows / 2


def check_survivors(case: Case, got: Pages, row: int, group: int, head: int) -> torch.Tensor:
    """Survivors of one group against float64; returns which windows have a near tie.

    Where two values are closer than twice the error of the same computation by eager float32, and
    at most 1e-5, either may be called the smaller.
    """
    assert case.pages.token is not None and got.token is not None and case.pages.score is not None
    at = (case.pages, case.merges, row, group, head, slice(case.head_size))
    exact = reference.group_distinctiveness(*at)
    single = reference.group_distinctiveness(*at, dtype=torch.float32)
    tolerance = 2 * float((exact - single).abs().max()) + 2**-24
    assert tolerance < 1e-5
    blocks = case.merges.groups[row, group].long()
    tokens = case.pages.token[blocks, head].flatten()
    kept = got.token[blocks[: len(blocks) // 2], head].flatten()
    survives = torch.isin(tokens, kept).view(-1, case.window)
    assert (survives.sum(1) == case.window // 2).all()
    score = case.pages.score[blocks, head].flatten()
    plain = reference.survivors([(1.0, score), (1.0, exact)], case.window)
    plain = plain.view(-1, case.window)
    exact = exact.view(-1, case.window)
    gap = exact[:, None, :] - exact[:, :, None]
    itself = torch.eye(case.window, dtype=torch.bool, device=gap.device)
    close = (gap.abs() <= tolerance) & ~itself
    near = close.flatten(1).any(1)
    assert torch.equal(survives[~near], plain[~near])
    least = (gap < -tolerance).sum(-1)
    score_rank = rank(score.view(-1, case.window))
    low, high = score_rank + least, score_rank + least + close.sum(-1)
    best_dropped = low.masked_fill(survives, -1).max(1).values
    worst_kept = high.masked_fill(~survives, 10**6).min(1).values
    assert (worst_kept >= best_dropped).all()
    return near


def test_awkward_scores(device: torch.device) -> None:
    case = make_case(device, [2], window=32, structured=True)
    score = case.pages.score
    assert score is not None
    extremes = [torch.nan, -torch.inf, torch.inf, torch.finfo(torch.float32).min, -0.0, 0.0, 1e-45]
    values = torch.tensor(extremes, device=device).repeat(10)
    for group in case.merges.groups[0, :2].long():
        for head in range(score.shape[1]):
            pick = torch.randperm(len(values), generator=torch.Generator().manual_seed(head))
            score[group, head] = values[pick[:32].to(device)].view(2, 16)
    plain = Weights(1.0, 0.0, 0.0)
    assert_same(case.run(plain), case.expected(plain))
    assert_same(case.run(), case.expected())
    score[case.merges.groups[0, 0].long()] = torch.nan
    assert_same(case.run(plain), case.expected(plain))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_vector_has_no_direction(device: torch.device, bad: float) -> None:
    """It counts for nothing in the mean, and has the lowest rank where it competes."""
    case = make_case(device, [1, 1], structured=True)
    for block in (case.merges.block_table[0, 0], case.merges.groups[0, 0, 1]):
        case.pages.kv[int(block), 0, 3, 5] = bad
        case.pages.kv[int(block), 1, 4, case.head_size + 1] = bad
    assert_same(case.run(ALL), case.expected(ALL))
    got = case.run(Weights(0.0, 1.0, 0.0))
    assert got.token is not None and case.pages.token is not None
    gone = case.pages.token[int(case.merges.groups[0, 0, 1]), 0, 3]
    assert gone not in got.token[case.merges.groups[0, 0, :1].long(), 0]


def test_zero_keys_and_a_zero_mean(device: torch.device) -> None:
    case = make_case(device, [1, 1], structured=True)
    keys = case.pages.kv[..., : case.head_size]
    blocks = case.merges.block_table[0]
    keys[blocks[blocks < 2**30].long()] = 0
    blocks = case.merges.block_table[1]
    held = blocks[blocks < 2**30].long()
    keys[held] = 1
    keys[held, :, 1::2] = -1
    num_keys = case.merges.num_keys // 16 * 16
    case = replace(case, merges=replace(case.merges, num_keys=num_keys))
    assert_same(case.run(ALL), case.expected(ALL))


def test_nothing_to_merge_touches_nothing(device: torch.device) -> None:
    case = make_case(device, [0, 0, 0])
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    for weights in WEIGHTS:
        assert_same(case.run(weights, counters=counters), case.pages)
    assert counters.tolist() == [0, 0]


def test_counters(device: torch.device) -> None:
    case = make_case(device, [2, 0, 3], window=32, num_kv_heads=3)
    counters = torch.tensor([100, 1000], device=device)
    case.run(counters=counters)
    assert counters.tolist() == [100 + 5 * 3, 1000 + 5 * 3 * 16]


def test_rows_far_apart(device: torch.device) -> None:
    """Rows with work on both sides of the number of rows that are looked at together."""
    num_groups = [0] * 1100
    few = make_case(device, [1, 2, 1, 1], num_kv_heads=1, structured=True)
    places = [0, 1023, 1024, 1099]
    merges = Merges(
        *(
            torch.full((len(num_groups), *tensor.shape[1:]), fill, dtype=tensor.dtype).to(device)
            for tensor, fill in (
                (few.merges.groups, 2**30),
                (few.merges.num_groups, 0),
                (few.merges.block_table, 2**30),
                (few.merges.num_keys, 2**30),
            )
        )
    )
    for name in Merges.__slots__:
        getattr(merges, name)[places] = getattr(few.merges, name)
    many = replace(few, merges=merges)
    assert_same(many.run(ALL), few.expected(ALL))


def test_what_a_row_keeps_does_not_depend_on_the_others(device: torch.device) -> None:
    """However many parts its keys are summed in: the sums are the same to the bit."""
    case = make_case(device, [1] * 12, num_kv_heads=1, head_size=64, window=32, seed=3)
    together = case.run(ALL)
    for row in (0, 5, 11):
        alone = torch.zeros_like(case.merges.num_groups)
        alone[row] = 1
        single = replace(case, merges=replace(case.merges, num_groups=alone)).run(ALL)
        blocks = case.merges.block_table[row]
        held = blocks[blocks < 2**30].long()
        assert torch.equal(single.kv[held].nan_to_num(), together.kv[held].nan_to_num())


@pytest.mark.parametrize("bad", [False, True])
def test_sums_of_units(device: torch.device, bad: bool) -> None:
    """The same to the bit for any tiles and number of programs, and right."""
    case = make_case(device, [9, 0, 2], num_kv_heads=2, head_size=16, window=32)
    if bad:
        case.pages.kv[int(case.merges.block_table[0, 1]), 1, 2, 3] = torch.nan
    totals = []
    for num_programs, tile_keys in ((1, 64), (3, 64), (64, 128)):
        sums = means.make_sums(3, 2, 16, device)
        means.add_units(
            case.pages,
            case.merges,
            sums,
            num_programs,
            has_key=True,
            has_value=True,
            tile_keys=tile_keys,
            num_warps=4,
            max_registers=128,
        )
        totals.append(sums)
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    assert not totals[0][1].any()
    for row, head, part in itertools.product((0, 2), (0, 1), (0, 1)):
        channels = slice(16 * part, 16 * part + 16)
        vectors = reference.held(case.pages, case.merges, row, head, channels).double()
        vectors = vectors[torch.arange(len(vectors)) % 128 < 32]
        exact = torch.nn.functional.normalize(vectors, dim=-1).nan_to_num(0).sum(0)
        error = (totals[0][row, head, part].double() / 2**24 - exact).abs().max()
        assert error < 2e-7 * len(vectors)


def test_as_many_rows_as_scratch_has_sums(device: torch.device) -> None:
    """All of them merge, and they are no power of two."""
    case = make_case(device, [1] * 40, num_kv_heads=1, structured=True, window=2)
    assert_same(case.run(ALL, max_rows=40), case.expected(ALL))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("element_size", [1, 2, 4])
@pytest.mark.parametrize("group", [32, 64, 256, 1024])
def test_launch_config_fits(head_size: int, element_size: int, group: int) -> None:
    config = launch_config(head_size, element_size, group)
    assert group % config.group_keys == 0
    assert group % config.tokens == 0
    assert (group // 2) % config.move == 0
    assert config.move * head_size * 2 * element_size <= 2**14


def test_refusals(device: torch.device) -> None:
    case = make_case(device, [1], window=32)
    scratch = make_scratch(1, 2, 16, device, max_group=32)
    small = replace(scratch, sums=scratch.sums[:0])
    narrow = replace(scratch, sources=scratch.sources[:, :16])
    wide = replace(case.merges, groups=torch.zeros(1, 1, 128, dtype=torch.int32, device=device))
    plain = Pages.view(case.pages.kv, False, False)

    def refuse(match: str, **changes: object) -> None:
        arguments = {
            "pages": case.pages,
            "merges": case.merges,
            "head_size": 16,
            "window": 32,
            "weights": BOTH,
            "scratch": scratch,
        }
        with pytest.raises(ValueError, match=match):
            merge_groups(**(arguments | changes))

    refuse("MAX_WINDOW = 1024", merges=wide, window=2048)
    refuse("power of two", window=24)
    refuse("divides 32", window=64)
    refuse("with scores", pages=plain)
    refuse("channels", head_size=8)
    refuse("for 0 rows", scratch=small)
    refuse("16 tokens a group", scratch=narrow)
    refuse("above it", weights=Weights(0.0, 0.0, 0.0))
    refuse("0 or more", weights=Weights(1.0, -0.1, 0.0))


@pytest.mark.gpu
def test_in_a_graph_and_beyond_two_gib(device: torch.device) -> None:
    """Replays see new numbers of groups; the last blocks lie past 2**31 bytes."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    few = make_case(device, [2, 1, 3], structured=True, dtype=torch.bfloat16, head_size=128)
    stride = 2**25
    blocks = few.pages.kv.shape[0]
    pool = torch.full((blocks * stride,), torch.nan, dtype=torch.bfloat16, device=device)
    flat = few.pages.kv.as_strided((blocks, few.pages.kv.stride(0)), (few.pages.kv.stride(0), 1))
    pool.view(blocks, stride)[:, : flat.shape[1]] = flat
    kv = pool.as_strided(few.pages.kv.shape, (stride, *few.pages.kv.stride()[1:]))
    assert blocks * stride * 2 > 2**31
    pages = Pages.view(kv, True, True)
    merges = replace(few.merges, num_groups=torch.zeros_like(few.merges.num_groups))
    scratch = make_scratch(3, 2, 128, device)

    def step() -> None:
        merge_groups(pages, merges, 128, 16, BOTH, scratch)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert torch.equal(pages.kv.nan_to_num(), few.pages.kv.nan_to_num())
    merges.num_groups.copy_(few.merges.num_groups)
    graph.replay()
    expected = few.expected()
    for name in ("kv", "score", "token"):
        got, right = getattr(pages, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(), right.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "num_groups"), [(64, [20, 0, 7, 33]), (1024, [3, 0, 1, 5])])
def test_many_groups(device: torch.device, window: int, num_groups: list[int]) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    case = make_case(
        device,
        num_groups,
        structured=True,
        dtype=torch.bfloat16,
        head_size=128,
        num_kv_heads=8,
        window=window,
    )
    first = case.run(ALL)
    assert_same(first, case.expected(ALL))
    for _ in range(3):
        assert_same(case.run(ALL), first)
