"""Decode by heads of 512 channels, as Gemma 4's full-attention layers have: tiles of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_paged_decode import MAX_PLACES, Case, Shape, check, on_gpu, slack, worst

from reference import paged_decode as reference
from vllm_cascade.kernels.decode import attend
from vllm_cascade.kernels.decode.launch_config import tokens_together

WIDE = Shape(head_size=512, rotary_dim=512, num_heads=8, num_kv_heads=1)
GROUPS = (1, 2, 4, 8, 16)
BF16 = {"dtype": torch.bfloat16}


def launch(shape: Shape, by_place: bool = False, tokens: int = 1) -> attend.Config:
    """The tiles that are chosen for a shape, with several splits of short rows."""
    group, size = shape.num_heads // shape.num_kv_heads, shape.dtype.itemsize
    chosen = attend.launch_config(
        8, shape.num_kv_heads, 512, MAX_PLACES, size, not by_place, num_queries=tokens * group
    )
    return replace(chosen, splits=5, min_keys=32)


@pytest.mark.parametrize("by_place", [False, True], ids=["composed", "by_place"])
@pytest.mark.parametrize(
    "shape",
    [
        replace(WIDE, places=(0, 31, -1, 130)),
        replace(WIDE, places=(15, 97), rotary_dim=128, num_heads=16, dtype=torch.float16),
        replace(WIDE, places=(64,), num_heads=20, dtype=torch.float16, is_neox=False),
        *(
            pytest.param(
                replace(WIDE, num_heads=2 * group, num_kv_heads=2, **{**BF16, **change}),
                marks=on_gpu,
            )
            for group, change in (
                *((group, {}) for group in (*GROUPS, 64)),
                (8, {"rotary_dim": 128}),
                (8, {"is_neox": False}),
                (8, {"dtype": torch.float32}),
            )
        ),
    ],
    ids=str,
)
def test_is_as_exact_as_eager_pytorch(shape: Shape, by_place: bool, device: torch.device) -> None:
    check(Case(shape, device), config=launch(shape, by_place))


@pytest.mark.parametrize(
    "shape",
    [
        replace(WIDE, places=(270,), num_heads=32),
        *(
            pytest.param(replace(WIDE, num_heads=16, num_kv_heads=heads, **BF16), marks=on_gpu)
            for heads in (2, 8)
        ),
    ],
    ids=str,
)
def test_chosen_launch(shape: Shape, device: torch.device) -> None:
    check(Case(shape, device))


def test_few_queries_load_keys_together() -> None:
    """More would not fit a multiprocessor: 64 of them fill nearly all of it at head size 256."""
    assert [tokens_together(6, group, 256) for group in GROUPS] == [6, 6, 6, 6, 3]
    assert [tokens_together(6, group, 512) for group in GROUPS] == [6, 6, 3, 2, 1]


@pytest.mark.parametrize(
    ("shape", "per_request", "by_place"),
    [
        # Two tokens, and the last of a request alone.
        *(
            (replace(WIDE, places=(31, 32, 33, 62, 63, -1), dtype=torch.float16), 3, by_place)
            for by_place in (False, True)
        ),
        *(
            pytest.param(
                replace(
                    WIDE,
                    places=(31, 32, 33, 34, 35, -1, *range(62, 68)),
                    num_heads=2 * group,
                    num_kv_heads=2,
                    dtype=dtype,
                ),
                6,
                by_place,
                marks=on_gpu,
            )
            for group, dtype, by_place in (
                *((group, torch.bfloat16, False) for group in GROUPS),
                (4, torch.bfloat16, True),
                (4, torch.float32, False),
            )
        ),
    ],
    ids=str,
)
def test_tokens_with_drafts(
    shape: Shape, per_request: int, by_place: bool, device: torch.device
) -> None:
    case = Case(shape, device)
    places = torch.tensor(shape.places)
    for request in torch.arange(len(places)).view(-1, per_request):
        last = request[places[request].argmax()]
        for row in request:
            own = int(places[row]) // shape.block_size + 1
            case.batch.block_table[row, :own] = case.batch.block_table[last, :own].clone()
    exact, _ = case.run(reference, case.in_dtype(torch.float64), case.query.double(), scored=False)
    eager, _ = case.run(reference, case.copied(), case.query, dtype=shape.dtype, scored=False)
    case.batch = replace(case.batch, per_request=per_request)
    scratch = attend.make_scratch(
        2 * per_request,
        shape.num_heads,
        shape.num_kv_heads,
        512,
        shape.dtype.itemsize,
        MAX_PLACES,
        8,
        device,
        scored=False,
        per_request=per_request,
    )
    scratch.partial.fill_(float("nan"))
    tokens = tokens_together(per_request, shape.num_heads // shape.num_kv_heads, 512)
    config = launch(shape, by_place, tokens)
    pages = replace(case.copied(), score=None)
    found, _ = case.run(attend, pages, case.query, scratch=scratch, config=config, scored=False)
    rounding = torch.finfo(shape.dtype).eps / 2 * float(exact.nan_to_num(0).abs().max())
    assert worst(found, exact) <= slack(shape) * worst(eager, exact) + rounding
