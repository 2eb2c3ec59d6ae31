"""Attention of prefill, and the scores that its queries give, against plain PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from prefill_cases import HALF, LENGTHS, NAN, Case, Shape, assert_close, make_case, table_of
from reference import scored_prefill as reference
from vllm_cascade.kernels.merge import means
from vllm_cascade.kernels.prefill import attention, scores, workspace
from vllm_cascade.kernels.weights import Weights
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

SHAPES = [
    pytest.param(Shape(), id="float32"),
    pytest.param(Shape(9, 3, 64, dtype=HALF), id="group-3"),
    pytest.param(Shape(2, 2, 80, dtype=HALF, block_size=64), id="head-80"),
    pytest.param(Shape(5, 1, 96, dtype=torch.float32, block_size=32), id="head-96"),
    pytest.param(Shape(8, 2, 128, dtype=HALF), id="head-128"),
    pytest.param(Shape(16, 1, 64, dtype=HALF, block_size=128), id="group-16"),
    pytest.param(Shape(2, 1, 256, dtype=HALF), id="head-256"),
    pytest.param(Shape(8, 1, 512, dtype=HALF), id="head-512"),
    pytest.param(Shape(2, 2, 512, lengths=((37, 83), (1, 50))), id="head-512-float32"),
]


# Relative error of the hyperbolic tangent with which FlashAttention-3 caps logits, tanh.approx.f32,
# as the PTX ISA bounds it.
FLASH_TANH = 2.0**-11


def check_attention(
    case: Case,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
    logit_error: float = 0.0,
) -> None:
    """Compare packed outputs and log-sum-exps [num_heads, num_queries] with the reference's.

    Logits may be off by `logit_error`: so may a log-sum-exp. A probability may be off by twice
    that, as a share of itself, and an output by that share of the largest value.
    """
    num_queries = case.segments.num_queries

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out_at = torch.empty_like(out, dtype=dtype)
        lse_at = torch.empty_like(lse, dtype=dtype)
        query, key, value = (x.to(dtype) for x in (case.query, case.key, case.value))
        given = (query, key, value, case.segments, case.scale, sinks, soft_cap)
        reference.attend(out_at, lse_at, *given)
        return out_at, lse_at

    assert out.shape[0] == lse.shape[1] == num_queries
    exact, exact_lse = expected(torch.float64)
    most = 2 * logit_error * float(case.value.nan_to_num(0).abs().max())
    assert_close(out, exact, expected(out.dtype)[0], error=most)
    # Another order of summing a row's products, in which errors of one sign may meet.
    assert_close(lse, exact_lse, expected(torch.float32)[1], slack=4, error=logit_error)


def sinks_of(num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_heads] logits below, among and above those of keys."""
    return torch.tensor([0.5, 40.0, 6.0, -60.0, 3.0] * 13, device=device)[:num_heads].to(dtype)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, has_sinks, device):
    case = make_case(shape, device)
    num_queries = case.segments.num_queries
    out = torch.full_like(case.query, NAN)
    lse = torch.full((shape.num_heads, num_queries + 9), NAN, device=device)
    sinks = sinks_of(shape.num_heads, shape.dtype, device) if has_sinks else None
    attention.attend(out, lse, case.query, case.key, case.value, case.segments, case.scale, sinks)
    check_attention(case, out[:num_queries], lse[:, :num_queries], sinks)
    assert out[num_queries:].isnan().all() and lse[:, num_queries:].isnan().all()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[6]])
def test_capped_attention(shape, has_sinks, device):
    """A sink's logit is not capped."""
    case = make_case(shape, device)
    num_queries = case.segments.num_queries
    out, plain = torch.full((2, *case.query.shape), NAN, dtype=shape.dtype, device=device)
    lse = torch.full((shape.num_heads, num_queries), NAN, device=device)
    sinks = sinks_of(shape.num_heads, shape.dtype, device) if has_sinks else None
    given = (lse, case.query, case.key, case.value, case.segments, case.scale, sinks)
    attention.attend(plain, *given)
    attention.attend(out, *given, soft_cap=2.0)
    assert (plain - out)[:num_queries].abs().max() > 0.05
    check_attention(case, out[:num_queries], lse, sinks, soft_cap=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 8, 64, dtype=torch.bfloat16),
        # So few queries that keys are split.
        Shape(8, 1, 64, dtype=torch.bfloat16, lengths=((20, 4000),)),
        Shape(8, 2, 128, dtype=torch.bfloat16),
        Shape(4, 2, 256, dtype=torch.bfloat16),
    ],
    ids=["head-64", "split", "head-128", "head-256"],
)
def test_flash_attention(shape, has_sinks, soft_cap):
    """Its log-sum-exps count the sinks, as the scores of keys need them."""
    from vllm_cascade.attention.gpu_layer import GpuLayer
    from vllm_cascade.attention.gpu_step import Rows
    from vllm_cascade.attention.gpu_workspace import Shape as Heads

    device = torch.device("cuda")
    case = make_case(shape, device)
    num_queries, num_rows = case.segments.num_queries, case.segments.num_rows
    sinks = sinks_of(shape.num_heads, shape.dtype, device) if has_sinks else None
    heads = Heads(
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        shape.dtype,
        None if sinks is None else sinks.dtype,
    )
    config = resolve(CascadeOptions(), block_size=16, max_model_len=4096, position_limit=4096)
    layer = GpuLayer(config, heads, case.scale, None, None, True, None, sinks, soft_cap)
    if layer.flash is None:
        pytest.skip("needs FlashAttention-3")
    out = torch.full_like(case.query[:num_queries], NAN)
    rows = Rows(
        case.query[:num_queries],
        case.key[:num_rows],
        case.value[:num_rows],
        out,
        case.segments.query_spans.view(-1),
        case.segments.key_spans.view(-1),
    )
    lse = layer._attend(out, rows, case.segments)
    check_attention(case, out, lse, sinks, soft_cap, FLASH_TANH * soft_cap)


def normalizers(case: Case, dtype: torch.dtype, soft_cap: float = 0.0) -> Tensor:
    """[num_heads, num_queries] exact log-sum-exps, rounded to `dtype`."""
    query, key = case.query.double(), case.key.double()
    lse = torch.zeros(query.shape[1], case.segments.num_queries, dtype=torch.float64)
    lse = lse.to(query.device)
    given = (query, key, key, case.segments, case.scale, None, soft_cap)
    reference.attend(torch.empty_like(query), lse, *given)
    return lse.to(dtype)


def scored(case: Case, dtype: torch.dtype, lse: Tensor, **how: Any) -> Tensor:
    """Scores [num_blocks, num_kv_heads, block_size] by the reference, computed in `dtype`."""
    assert case.pages.score is not None
    pages = replace(case.pages, score=case.pages.score.to(dtype, copy=True))
    reference.score_keys(
        pages, case.segments, case.query, case.key, lse.to(dtype), case.scale, counter=None, **how
    )
    assert pages.score is not None
    return pages.score


def check_scores(case: Case, config: scores.ScoreConfig | str | None, **how: Any) -> None:
    score = case.pages.score
    assert score is not None
    lse = normalizers(case, torch.float32, how.get("soft_cap", 0.0))
    exact = scored(case, torch.float64, lse, **how)
    eager = scored(case, torch.float32, lse, **how)
    counter = torch.tensor([7], device=score.device)
    counted = counter.clone()
    # Past the end of the workspace: NaN.
    padded = torch.full((lse.shape[0], lse.shape[1] + 5), NAN, device=lse.device)
    padded[:, : lse.shape[1]] = lse
    scores.score_keys(
        case.pages,
        case.segments,
        case.query,
        case.key,
        padded,
        case.scale,
        counter=counter,
        config=config,
        **how,
    )
    held = ~exact.isnan()
    assert torch.equal(score.isnan(), ~held), "a slot was written that no segment holds"
    assert held.sum() == case.segments.key_spans.diff().sum() * score.shape[1]
    # The kernel scales logits and log-sum-exps by rounded constants before it subtracts them.
    condition = float(how["power"] * lse.abs().max())
    # Tensor cores cut off what they add up: the more channels, the more.
    slack = 1.5 if case.query.shape[2] <= 256 else 3.0
    assert_close(score[held], exact[held], eager[held], slack, condition)
    for first, last, start, end in reference._segments(case.segments):
        queries, prefix = last - first, end - start - (last - first)
        counted += score.shape[1] * sum(prefix + 1 + i for i in range(queries))
    assert torch.equal(counter, counted)


DEFAULT = {"decay": 0.97, "power": 2.0, "reduction": "max"}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores(shape, device):
    check_scores(make_case(shape, device), None, **DEFAULT)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_powers_and_reductions(power, reduction, device):
    shape = Shape(9, 3, 64, dtype=HALF)
    check_scores(make_case(shape, device), None, decay=0.99, power=power, reduction=reduction)


@pytest.mark.parametrize(("power", "reduction"), [(2.0, "max"), (0.5, "mean")])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[6]])
def test_scores_of_capped_attention(shape, power, reduction, device):
    how = {"decay": 0.97, "power": power, "reduction": reduction, "soft_cap": 2.0}
    case = make_case(shape, device)
    lse = normalizers(case, torch.float64, 2.0)
    exact = scored(case, torch.float64, lse, **how)
    plain = scored(case, torch.float64, lse, **{**how, "soft_cap": 0.0})
    assert (exact - plain).nan_to_num(0).abs().max() > 0.05
    check_scores(case, None, **how)


@pytest.mark.parametrize("name", sorted(scores.SCORE_CONFIGS))
def test_every_configuration(name, device):
    shape = Shape(8, 2, 128, dtype=HALF, lengths=((70, 301), (33, 40)))
    check_scores(make_case(shape, device), name, **DEFAULT)


@pytest.mark.parametrize("key_len", [31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("query_len", [1, 15, 16, 17])
def test_boundaries_of_tiles(query_len, key_len, device):
    shape = Shape(2, 1, 16, lengths=((query_len, key_len), (5, 5)))
    config = scores.ScoreConfig(32, 32, 4, 1, key_in_registers=False)
    check_scores(make_case(shape, device), config, **DEFAULT)


def test_nan_stays_in_its_request(device):
    # A prefix of whole tiles: nothing masks what the first one's last step reads past the end.
    shape = Shape(8, 2, 128, dtype=HALF, lengths=((5, 300), (7, 7), (20, 40)))
    clean = make_case(shape, device)
    lse = normalizers(clean, torch.float32)
    spoilt = make_case(shape, device)
    spoilt.query[5:12] = NAN
    spoilt.key[300:307] = NAN
    bad_lse = lse.clone()
    bad_lse[:, 5:12] = NAN
    for case, normal in ((clean, lse), (spoilt, bad_lse)):
        scores.score_keys(
            case.pages,
            case.segments,
            case.query,
            case.key,
            normal,
            case.scale,
            counter=None,
            **DEFAULT,
        )
    own = clean.segments.block_table[1].long()
    others = torch.ones(len(clean.pages.kv), dtype=torch.bool, device=device)
    others[own] = False
    assert clean.pages.score is not None and spoilt.pages.score is not None
    got, want = spoilt.pages.score[others], clean.pages.score[others]
    assert torch.equal(got.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))

    out, lse_out = torch.empty_like(clean.query), torch.empty_like(lse)
    bad_out, bad_lse_out = torch.empty_like(clean.query), torch.empty_like(lse)
    value, bad_value = clean.value, clean.value.clone()
    bad_value[300:307] = NAN
    attention.attend(out, lse_out, clean.query, clean.key, value, clean.segments, clean.scale)
    attention.attend(
        bad_out, bad_lse_out, spoilt.query, spoilt.key, bad_value, spoilt.segments, clean.scale
    )
    rest = torch.cat((torch.arange(5), torch.arange(12, 32))).to(device)
    assert torch.equal(out[rest], bad_out[rest])
    assert torch.equal(lse_out[:, rest], bad_lse_out[:, rest])


def test_scratch_suffices(device):
    shape = Shape(9, 3, 64, dtype=HALF)
    case = make_case(shape, device)
    num_queries = case.segments.num_queries
    lse = normalizers(case, torch.float32)
    for dtype, head_size, heads in product((torch.float32, HALF), (64, 256, 512), (1, 4, 16, 64)):
        config = scores.launch_config(dtype, head_size, heads)
        needed = num_queries // (config.columns // heads) + len(LENGTHS)
        size = scores.shifts_elements(num_queries, len(LENGTHS), 3 * heads, 3)
        assert 3 * needed * config.columns <= size
    size = scores.shifts_elements(num_queries, len(LENGTHS), 9, 3)
    shifts = torch.full((size,), NAN, device=device)
    scores.score_keys(
        case.pages,
        case.segments,
        case.query,
        case.key,
        lse,
        case.scale,
        counter=None,
        shifts=shifts,
        **DEFAULT,
    )


def test_unknown_reduction_is_refused(device):
    case = make_case(Shape(), device)
    lse = torch.zeros(4, case.segments.num_queries, device=device)
    with pytest.raises(ValueError, match="'sum'"):
        scores.score_keys(
            case.pages, case.segments, case.query, case.key, lse, case.scale, 1.0, 1.0, "sum", None
        )


def test_refuses_what_does_not_fit(device):
    case = make_case(Shape(), device)
    query, key, value, segments = case.query, case.key, case.value, case.segments
    lse = torch.zeros(4, segments.num_queries, device=device)

    def attend(**changes):
        given = {"out": query, "lse": lse, "query": query, "key": key, "value": value} | changes
        attention.attend(**given, segments=segments, scale=case.scale)

    def score(pages=case.pages, key=key, lse=lse, **scratch):
        how = (case.scale, 1.0, 1.0, "max", None)
        scores.score_keys(pages, segments, query, key, lse, *how, **scratch)

    def prepare(**changes):
        cos, sin = table_of(64, torch.float32, device)
        rows = torch.arange(segments.num_queries, device=device).int()
        given = {"query": query, "key": key, "value": value, "rows": rows, "tokens": rows}
        given |= {"cos": cos, "sin": sin, "query_out": query, "key_out": key, "value_out": value}
        given |= {"weights": Weights(0.0, 1.0, 1.0)}
        given |= {"sums": means.make_sums(len(LENGTHS), 2, 64, device), **changes}
        workspace.prepare(case.pages, segments, is_neox=True, **given)

    wide = torch.zeros(*query.shape[:2], 128, device=device)[..., ::2]
    sums = means.make_sums(len(LENGTHS) - 1, 2, 64, device)
    for refused, match in (
        (lambda: attend(out=query[:, :2]), "out must have the heads"),
        (lambda: attend(lse=lse.double()), "lse must be float32 with 4 dense rows"),
        (lambda: attend(sinks=lse[:2, 0]), r"sinks must be \[4\]"),
        (lambda: attend(out=wide), "must be dense"),
        (lambda: score(pages=replace(case.pages, score=None)), "need room"),
        (lambda: score(key=key[:, :1]), "key must be"),
        (lambda: score(lse=lse[:2]), "lse must be float32 with 4 dense rows"),
        (lambda: score(shifts=lse[0]), "shifts must be"),
        (lambda: prepare(key=key[..., :32]), "do not fit pages"),
        (lambda: prepare(query_out=query[:3]), "query_out must be"),
        (lambda: prepare(key_out=key[:3]), "key_out and value_out must be"),
        (lambda: prepare(query_out=query.double()), "must be of torch.float32"),
        (lambda: prepare(query=wide), "must be dense"),
        (lambda: prepare(sums=sums), "sums must have 4 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            refused()


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(scores.SCORE_CONFIGS))
@pytest.mark.parametrize("lengths", [((1024, 3000),), ((700, 700), (513, 1027), (1, 2048))])
def test_long_segments(name, lengths):
    device = torch.device("cuda")
    shape = Shape(32, 8, 128, dtype=HALF, lengths=lengths)
    check_scores(make_case(shape, device), name, **DEFAULT)


@pytest.mark.gpu
def test_scores_are_deterministic():
    device = torch.device("cuda")
    shape = Shape(32, 8, 128, dtype=HALF, lengths=((1024, 3000),))
    results = []
    for _ in range(2):
        case = make_case(shape, device)
        check_scores(case, None, **DEFAULT)
        assert case.pages.score is not None
        results.append(case.pages.score.nan_to_num(nan=-1.0))
    assert torch.equal(*results)
