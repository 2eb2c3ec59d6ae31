"""Decode over paged keys, with scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from reference import paged_decode as reference
from vllm_cascade.kernels.decode import attend, combine
from vllm_cascade.kernels.decode.launch_config import Splits
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import DecodeRows

MAX_PLACES = 300
TENSORS = ("rows", "places", "block_table", "carry", "weights")

# Triton's interpreter multiplies the bits of bfloat16 as integers.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    rotary_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    is_neox: bool = True
    power: float = 2.0
    reduction: str = "max"
    places: tuple[int, ...] = (0, 15, -1, 16, 130, 257)
    sharpness: float = 1.0
    soft_cap: float = 0.0


class Case:
    """Pages, rows and queries; everything that must not be read or written is NaN."""

    def __init__(self, shape: Shape, device: torch.device, num_blocks: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.shape, self.device = shape, device
        num_rows, block_size = len(shape.places), shape.block_size
        max_blocks = max(shape.places) // block_size + 2
        num_blocks = num_blocks or num_rows * max_blocks + 2
        slots = shape.num_kv_heads * block_size
        size = torch.empty(0, dtype=shape.dtype).element_size()
        page = slots * 2 * shape.head_size + slots * 4 // size
        pool = torch.full((num_blocks, page), float("nan"), dtype=shape.dtype, device=device)
        view = (num_blocks, shape.num_kv_heads, block_size, 2 * shape.head_size)
        strides = (page, block_size * 2 * shape.head_size, 2 * shape.head_size, 1)
        self.pages = Pages.view(pool.as_strided(view, strides), has_score=True, has_token=False)
        self.pool = pool

        # Spread over the whole pool, so that far blocks are used where there are any.
        order = torch.randperm(num_rows * max_blocks, generator=generator)
        order = (
            order * (num_blocks // (num_rows * max_blocks))
            + num_blocks
            - 1
            - int(order.max()) * (num_blocks // (num_rows * max_blocks))
        )
        table = order.view(num_rows, max_blocks).int()
        num_tokens = num_rows + 3
        for r, place in enumerate(shape.places):
            at = torch.arange(place + 1)
            block, slot = table[r].long()[at // block_size].to(device), (at % block_size).to(device)
            kv = torch.randn(
                place + 1, shape.num_kv_heads, 2 * shape.head_size, generator=generator
            )
            kv[..., : shape.head_size] *= shape.sharpness
            self.pages.kv[block, :, slot] = kv.to(device, shape.dtype)
            score = torch.rand(place + 1, shape.num_kv_heads, generator=generator).to(device)
            assert self.pages.score is not None
            if place > 0:
                self.pages.score[block[:-1], :, slot[:-1]] = score[:-1]
        # Entries past a row's last block may be anything, -1 and what is not there included.
        for r, place in enumerate(shape.places):
            table[r, place // block_size + 1 :] = torch.tensor([-1, 1 << 30])[r % 2]
        query = torch.randn(num_tokens, shape.num_heads, shape.head_size, generator=generator)
        query = query.to(device, shape.dtype)
        rows = torch.randperm(num_tokens, generator=generator)[:num_rows]
        unused = torch.ones(num_tokens, dtype=torch.bool)
        unused[rows[torch.tensor(shape.places) >= 0]] = False
        query[unused.to(device)] = float("nan")
        self.query, self.unused = query, unused.to(device)
        self.batch = DecodeRows(
            rows=rows.int().to(device),
            places=torch.tensor(shape.places, dtype=torch.int32, device=device),
            block_table=table.to(device),
            carry=torch.rand(num_rows, generator=generator).to(device),
            weights=torch.rand(num_rows, generator=generator).to(device) + 0.5,
        )
        half = shape.rotary_dim // 2
        # Rotations compose as exactly as their angles add up.
        speed = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(max(shape.places) + 1)[:, None] * speed
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)
        self.scale = shape.head_size**-0.5
        self.sinks: torch.Tensor | None = None

    def scratch(self, max_rows: int = 8, per_request: int = 1) -> attend.Scratch:
        scratch = attend.make_scratch(
            max_rows,
            self.shape.num_heads,
            self.shape.num_kv_heads,
            self.shape.head_size,
            self.shape.dtype.itemsize,
            max(MAX_PLACES, max(self.shape.places) + 1),
            8,
            self.device,
            per_request=per_request,
        )
        for part in (scratch.partial, scratch.lse, scratch.logits):
            part.fill_(float("nan"))
        return scratch

    def run(self, module: object, pages: object, query: torch.Tensor, **options: object):
        """Decode with a module; its output and counter."""
        output = torch.full_like(query, float("nan"))
        counter = torch.tensor([7], device=self.device)
        arguments = [output, query, pages, self.batch]
        arguments += [options.pop("cos", self.cos), options.pop("sin", self.sin)]
        arguments += [self.shape.is_neox, self.scale, self.shape.power, self.shape.reduction]
        if module is attend:
            options.setdefault("scratch", self.scratch())
        options = {"sinks": self.sinks, "soft_cap": self.shape.soft_cap, **options}
        module.decode(*arguments, counter=counter, **options)
        return output, counter

    def copied(self) -> Pages:
        pool = self.pool.clone()
        kv = pool.as_strided(self.pages.kv.shape, self.pages.kv.stride())
        return Pages.view(kv, has_score=True, has_token=False)

    def in_dtype(self, dtype: torch.dtype) -> SimpleNamespace:
        """The pages with K and V in another dtype, for the oracle."""
        assert self.pages.score is not None
        return SimpleNamespace(kv=self.pages.kv.to(dtype), score=self.pages.score.to(dtype))


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error; NaN in both is none, NaN in one is infinite."""
    error = (found.double() - exact.double()).abs()
    error[found.isnan() & exact.isnan()] = 0
    return float(error.nan_to_num(float("inf")).max())


def slack(shape: Shape) -> int:
    """Factor on eager PyTorch's error, which in float32 adds up channels in parts."""
    return 4 if shape.dtype == torch.float32 and shape.head_size > 256 else 2


def check(case: Case, **options: object) -> None:
    """The kernel is about as exact as eager PyTorch in the same dtype."""
    exact_pages = case.in_dtype(torch.float64)
    exact, expected_count = case.run(reference, exact_pages, case.query.double())
    if case.shape.soft_cap:
        pages = case.in_dtype(torch.float64)
        plain, _ = case.run(reference, pages, case.query.double(), soft_cap=0.0)
        assert worst(plain, exact) > 0.05, "the cap changes nothing"
    eager_pages = case.copied()
    eager, _ = case.run(reference, eager_pages, case.query, dtype=case.shape.dtype)
    pages = case.copied()
    output, count = case.run(attend, pages, case.query, **options)

    eps = torch.finfo(case.shape.dtype).eps
    rounding = eps / 2 * float(exact.nan_to_num(0).abs().max())
    assert worst(output, exact) <= slack(case.shape) * worst(eager, exact) + rounding
    assert pages.score is not None and eager_pages.score is not None
    rounding = 2.0**-23 * float(exact_pages.score.nan_to_num(0).abs().max())
    allowed = slack(case.shape) * (worst(eager_pages.score, exact_pages.score) + rounding / 2)
    assert worst(pages.score, exact_pages.score) <= allowed
    assert torch.equal(count, expected_count)
    assert output[case.unused].isnan().all()
    assert torch.equal(pages.kv.isnan(), case.pages.kv.isnan())


SHAPES = [
    Shape(),
    Shape(power=1.0, reduction="mean", num_heads=9, num_kv_heads=3),
    Shape(num_heads=16, num_kv_heads=1, head_size=96, rotary_dim=96, block_size=32),
    Shape(num_heads=2, num_kv_heads=2, head_size=80, rotary_dim=80, power=1.0),
    Shape(head_size=80, rotary_dim=32, is_neox=False),
    Shape(head_size=64, rotary_dim=24, reduction="mean", block_size=128),
    Shape(is_neox=False, dtype=torch.float16),
    Shape(head_size=128, rotary_dim=128, dtype=torch.float16, num_heads=8, sharpness=3.0),
    Shape(head_size=256, rotary_dim=64, dtype=torch.float16, num_heads=5, num_kv_heads=1),
    Shape(soft_cap=5.0, sharpness=5.0),
    Shape(soft_cap=1.0, dtype=torch.float16, num_heads=6, power=1.0, reduction="mean"),
    *(
        pytest.param(Shape(head_size=size, rotary_dim=size, dtype=torch.bfloat16), marks=on_gpu)
        for size in (64, 80, 96, 128, 256)
    ),
    pytest.param(Shape(is_neox=False, dtype=torch.bfloat16), marks=on_gpu),
    pytest.param(
        Shape(head_size=256, rotary_dim=256, dtype=torch.bfloat16, soft_cap=2.0), marks=on_gpu
    ),
]


@pytest.mark.parametrize("by_place", [False, True], ids=["composed", "by_place"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager_pytorch(shape: Shape, by_place: bool, device: torch.device) -> None:
    case = Case(shape, device)
    config = launch(case, by_place=by_place)
    check(case, config=config)


def launch(case: Case, **changes: object) -> attend.Config:
    """Small tiles, so that short rows have several splits of several tiles."""
    config = attend.Config(
        keys=32,
        splits=3,
        min_keys=64,
        by_place=False,
        num_warps=4,
        num_stages=2,
        max_registers=None,
        score_tile=64,
        score_pieces=2,
        score_warps=4,
    )
    return replace(config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": 1},
        {"splits": 8, "min_keys": 32},
        {"keys": 16, "score_pieces": 7},
        {"keys": 128, "score_tile": 1024},
    ],
    ids=str,
)
def test_launches_agree(changes: dict[str, object], device: torch.device) -> None:
    case = Case(Shape(places=(31, 32, 33, 63, 64, 191, 256)), device)
    check(case, config=launch(case, **changes))


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(dtype=torch.float16, num_heads=5, num_kv_heads=1, reduction="mean"),
        # A sink's logit is not capped.
        Shape(soft_cap=1.0),
        pytest.param(Shape(dtype=torch.bfloat16, num_heads=64, num_kv_heads=8), marks=on_gpu),
    ],
    ids=str,
)
def test_sinks_join_the_denominator(shape: Shape, splits: int, device: torch.device) -> None:
    """Below, among and above the logits of keys."""
    case = Case(shape, device)
    sinks = torch.tensor([0.5, 40.0, 6.0, -60.0, 3.0])
    case.sinks = sinks.repeat(13)[: shape.num_heads].to(device, shape.dtype)
    check(case, config=launch(case, splits=splits, min_keys=32))
    case.sinks = case.sinks[:-1]
    with pytest.raises(ValueError, match="one sink for each"):
        case.run(attend, case.copied(), case.query)


def test_rows_without_a_token_take_no_splits(device: torch.device) -> None:
    """A CUDA graph of more rows than requests computes what a launch of the requests would."""
    case = Case(Shape(places=(250, -1, 31, 64, 130, 257, -1, 200)), device)
    choices = [(1, 32), (8, 32), (7, 32), (6, 32), (5, 32), (4, 32), (3, 32), (2, 32), (1, 512)]
    scratch = replace(case.scratch(), splits=Splits.of(choices, device))
    assert scratch.splits.most == (1, 8, 8, 7, 6, 6, 5, 4, 3)
    graph, _ = case.run(attend, case.copied(), case.query, scratch=scratch, scored=False)
    busy = [row for row, place in enumerate(case.shape.places) if place >= 0]
    parts = (getattr(case.batch, name)[busy] for name in TENSORS)
    case.batch = DecodeRows(*parts)
    alone, _ = case.run(attend, case.copied(), case.query, scratch=scratch, scored=False)
    rows = case.batch.rows.long()
    assert torch.equal(graph[rows], alone[rows])
    always = replace(scratch, splits=Splits.of([choices[8]] * 9, device))
    other, _ = case.run(attend, case.copied(), case.query, scratch=always, scored=False)
    assert not torch.equal(graph[rows], other[rows])


def test_chosen_launch(device: torch.device) -> None:
    check(Case(Shape(places=(270,), dtype=torch.float16), device))


def test_more_rows_than_scratch(device: torch.device) -> None:
    case = Case(Shape(), device)
    check(case, scratch=case.scratch(max_rows=4), config=launch(case))
    check(case, scratch=case.scratch(max_rows=4, per_request=2))  # a drafter's single tokens


@pytest.mark.parametrize("has_sinks", [False, True])
def test_without_scores_nothing_is_written_to_pages(has_sinks: bool, device: torch.device) -> None:
    """Rows of one split, which need no second launch unless there are sinks, and of several."""
    case = Case(Shape(), device)
    if has_sinks:
        case.sinks = torch.tensor([0.5, 40.0, 6.0, -60.0], device=device)
    exact, _ = case.run(reference, case.in_dtype(torch.float64), case.query.double(), scored=False)
    eager, _ = case.run(reference, case.copied(), case.query, scored=False, dtype=torch.float32)
    scratch = attend.make_scratch(8, 4, 2, 64, 4, MAX_PLACES, 4, device, scored=False)
    pages = replace(case.copied(), score=None)
    output, _ = case.run(
        attend, pages, case.query, scored=False, scratch=scratch, config=launch(case)
    )
    assert worst(output, exact) <= 2 * worst(eager, exact) + 1e-7
    again = case.copied()
    case.run(attend, again, case.query, scored=False, config=launch(case))
    assert torch.equal(again.score.isnan(), case.pages.score.isnan())
    held = ~case.pages.score.isnan()
    assert torch.equal(again.score[held], case.pages.score[held])


TEAMS = (31, 32, 33, 15, 16, -1, 257, -1, -1, -1, -1, -1, 0, 1, 2, 63, 64, 65)
TEAM_CASES = [
    (Shape(places=TEAMS), 3, False, True),
    (
        Shape(places=TEAMS, num_heads=32, num_kv_heads=1, head_size=32, rotary_dim=24),
        3,
        True,
        False,
    ),
    (
        Shape(places=(*TEAMS[:3], 34, 35), num_heads=16, num_kv_heads=1, soft_cap=1.0),
        5,
        False,
        False,
    ),
    *(
        pytest.param(
            Shape(
                places=(31, 32, 33, 34, 35, -1, *range(62, 68)), dtype=torch.bfloat16, num_heads=14
            ),
            6,
            by_place,
            not by_place,
            marks=on_gpu,
        )
        for by_place in (False, True)
    ),
]


@pytest.mark.parametrize(("shape", "per_request", "by_place", "has_sinks"), TEAM_CASES, ids=str)
def test_tokens_with_drafts_load_keys_together(
    shape: Shape, per_request: int, by_place: bool, has_sinks: bool, device: torch.device
) -> None:
    """Splits of which an early token sees nothing, and teams of a part of a request's tokens."""
    case, places = Case(shape, device), torch.tensor(shape.places)
    rows = torch.arange(len(shape.places)).view(-1, per_request)
    for request in rows:
        last = request[places[request].argmax()]
        for row in request:
            own = int(places[row]) // shape.block_size + 1
            case.batch.block_table[row, :own] = case.batch.block_table[last, :own].clone()
    case.cos, case.sin = 1.25 * case.cos, 1.25 * case.sin  # scaled as YaRN's are
    if has_sinks:
        case.sinks = torch.linspace(-3, 3, shape.num_heads, device=device).to(shape.dtype)
    options = {"scored": False}
    exact, _ = case.run(reference, case.in_dtype(torch.float64), case.query.double(), **options)
    eager, _ = case.run(reference, case.copied(), case.query, dtype=shape.dtype, **options)
    case.batch = replace(case.batch, per_request=per_request)
    scratch = attend.make_scratch(
        2 * per_request, shape.num_heads, shape.num_kv_heads, shape.head_size, 2, MAX_PLACES, 8,
        device, scored=False, per_request=per_request,
    )  # fmt: skip
    scratch.partial.fill_(float("nan"))
    config = launch(case, splits=8, min_keys=32, by_place=by_place)
    pages = replace(case.copied(), score=None)
    found, _ = case.run(attend, pages, case.query, scratch=scratch, config=config, **options)
    rounding = torch.finfo(shape.dtype).eps / 2 * float(exact.nan_to_num(0).abs().max())
    assert worst(found, exact) <= 2 * worst(eager, exact) + rounding
    with pytest.raises(ValueError, match="no scores may be kept"):
        case.run(attend, case.copied(), case.query, scratch=scratch)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    case = Case(Shape(places=(40, 70, 90)), device)
    expected_pages = case.copied()
    expected, _ = case.run(attend, expected_pages, case.query, config=launch(case))
    block = case.batch.block_table[1, 0].long()
    case.pages.kv[block, :, 3] = float("nan")
    pages = case.copied()
    output, _ = case.run(attend, pages, case.query, config=launch(case))
    row = case.batch.rows[1].long()
    assert output[row].isnan().all()
    output[row] = expected[row]
    assert torch.equal(output.nan_to_num(9.0), expected.nan_to_num(9.0))
    mine = case.batch.block_table[1, : 70 // 16 + 1].long()
    pages.score[mine] = expected_pages.score[mine]
    assert torch.equal(pages.score.nan_to_num(9.0), expected_pages.score.nan_to_num(9.0))


def test_is_deterministic(device: torch.device) -> None:
    case = Case(Shape(), device)
    first, second = case.copied(), case.copied()
    a, _ = case.run(attend, first, case.query, config=launch(case))
    b, _ = case.run(attend, second, case.query, config=launch(case))
    assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    assert torch.equal(first.score.nan_to_num(9.0), second.score.nan_to_num(9.0))


def test_table_in_the_models_dtype(device: torch.device) -> None:
    """A coarse table is read at every place, as the models do that ship with one."""
    case = Case(Shape(dtype=torch.float16), device)
    case.cos, case.sin = case.cos.half(), case.sin.half()
    check(case)
    with pytest.raises(ValueError, match="float32 table"):
        check(case, config=launch(case, by_place=False))


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    case = Case(Shape(), device)
    with pytest.raises(ValueError, match="do not fit"):
        case.run(attend, case.copied(), case.query[..., :32].contiguous())
    with pytest.raises(ValueError, match="keep scores"):
        case.run(attend, replace(case.copied(), score=None), case.query)
    other = attend.make_scratch(8, 8, 2, 64, 4, MAX_PLACES, 4, device)
    with pytest.raises(ValueError, match="scratch"):
        case.run(attend, case.copied(), case.query, scratch=other)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 256])
@pytest.mark.parametrize("max_places", [64, 1_100, 17_408])
def test_launch_config_covers_any_row(num_rows: int, max_places: int) -> None:
    config = attend.launch_config(num_rows, 8, 128, max_places, 2, True)
    assert 1 <= config.splits <= 64 and config.splits * config.min_keys <= max(
        max_places, config.min_keys
    )
    assert config.min_keys % config.keys == 0


@pytest.mark.parametrize("scored", [False, True])
def test_any_number_of_rows_launches_the_same_variants(
    scored: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM warms up some batch sizes; the others must not wait for Triton while serving."""
    seen = set()

    def note(kernel, grid, *args, **meta) -> None:
        # The interpreter keeps what `triton.jit` was given; a kernel has it as an attribute.
        given = getattr(kernel, "kwargs", None) or vars(kernel)
        free = given.get("do_not_specialize") or ()
        kinds = [
            (name, arg == 1, arg % 16 == 0)
            for name, arg in zip(kernel.arg_names, args, strict=False)
            if isinstance(arg, int) and name not in free
        ]
        seen.add((kernel.__name__, *kinds, *meta.items()))

    for module in (attend, combine):
        monkeypatch.setattr(module, "launch", note)
    scratch = attend.make_scratch(64, 32, 8, 64, 4, 17_472, 64, device, scored=scored)
    pages = Pages(torch.empty(1, 8, 16, 128, device=device), torch.empty(1, 8, 16), None)
    cos = torch.empty(17_472, 32, device=device)
    for num_rows in (*range(1, 65), 100):
        query = torch.empty(num_rows, 32, 64, device=device)
        place = torch.zeros(num_rows, dtype=torch.int32, device=device)
        table = torch.zeros(num_rows, 1092, dtype=torch.int32, device=device)
        batch = DecodeRows(place, place, table, query[:, 0, 0], query[:, 0, 0])
        attend.decode(
            query, query, pages, batch, cos, cos, True, 1.0, 2.0, "max", scratch, scored=scored
        )
    assert len(seen) == 2, seen


@pytest.mark.parametrize("num_rows", [1, 8, 26, 53, 64])
def test_programs_of_full_rows_end_together(num_rows: int) -> None:
    """The last round of programs is nearly full: 26 requests took 9% longer where it was not."""
    programs, slots = 8 * num_rows, 4 * 132
    config = attend.launch_config(num_rows, 8, 128, 17_472, 2, True)
    rounds = programs * config.splits / slots
    assert rounds / math.ceil(rounds) > (0.9 if num_rows > 1 else 0.4)
    assert num_rows == 1 or rounds >= 3.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("by_place", [False, True])
def test_long_rows_in_far_blocks(by_place: bool, device: torch.device) -> None:
    shape = Shape(
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        rotary_dim=128,
        dtype=torch.bfloat16,
        places=(16_383, 5_000, -1, 1_100, 0),
        sharpness=2.0,
    )
    case = Case(shape, device, num_blocks=70_000)
    assert case.batch.block_table[0, 0] >= 0
    exact = attend.launch_config(5, 8, 128, 16_384, 2, True)
    check(case, config=replace(exact, by_place=by_place))
