"""What a wave of prefill reads, prepared from activations and pages, against float64."""

from __future__ import annotations

import pytest
import torch

from prefill_cases import NAN, Shape, assert_close, make_case, table_of
from reference import scored_prefill as reference
from vllm_cascade.kernels.merge import means
from vllm_cascade.kernels.merge.launch_config import launch_config
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.prefill import workspace
from vllm_cascade.kernels.segments import KEY_PADDING, Merges
from vllm_cascade.kernels.weights import Weights

ROTATIONS = [
    pytest.param(64, 64, True, torch.bfloat16, id="neox"),
    pytest.param(64, 32, True, torch.float32, id="partial"),
    pytest.param(80, 80, False, torch.float16, id="interleaved-80"),
    pytest.param(96, 20, False, torch.float32, id="partial-interleaved"),
    pytest.param(128, 128, True, torch.bfloat16, id="neox-128"),
    pytest.param(256, 64, True, torch.float32, id="partial-256"),
    pytest.param(512, 512, True, torch.bfloat16, id="neox-512"),
    pytest.param(512, 128, True, torch.float32, id="partial-512"),
]


# Some of the second's own tokens are in the mean and the third's one is, the first has no groups.
OWN_IN_MEAN = ((37, 37), (60, 150), (1, 130), (32, 64))
PREPARED = [Weights(1, 0, 0), Weights(0, 1, 1), Weights(0, 0, 1), Weights(0, 1, 0)]


@pytest.mark.parametrize("weights", PREPARED[:2], ids=str)
@pytest.mark.parametrize("head_size, rotary_dim, is_neox, dtype", ROTATIONS)
def test_a_wave_is_prepared(head_size, rotary_dim, is_neox, dtype, weights, device):
    shape = Shape(head_size=head_size, dtype=dtype, block_size=32, lengths=OWN_IN_MEAN)
    check_prepared(shape, rotary_dim, is_neox, weights, device)


@pytest.mark.parametrize("weights", PREPARED[2:], ids=str)
def test_one_kind_of_vector_is_summed(weights, device):
    shape = Shape(6, 3, 64, dtype=torch.bfloat16, lengths=OWN_IN_MEAN)
    check_prepared(shape, 64, True, weights, device)


def check_prepared(shape, rotary_dim, is_neox, weights, device):
    """Own tokens come from the activations: what their slots hold before must not matter."""
    case = make_case(shape, device)
    segments, dtype, head_size = case.segments, shape.dtype, shape.head_size
    token = torch.full(case.pages.kv.shape[:3], -1, dtype=torch.int32, device=device)
    flat = torch.empty(0, dtype=dtype, device=device).set_(case.pages.kv.untyped_storage()).clone()
    kv = flat.as_strided(case.pages.kv.shape, case.pages.kv.stride())
    pages, exact_pages = (Pages(x, None, t) for x, t in ((kv, token), (kv.clone(), token.clone())))
    num_queries = segments.num_queries
    # A fused projection's rows, in the order of another batch.
    num_heads, num_kv_heads = case.query.shape[1], kv.shape[1]
    wide = torch.randn(num_queries + 7, num_heads + 2 * num_kv_heads, head_size, device=device)
    query, key, value = wide.to(dtype).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    rows = torch.randperm(num_queries + 7, device=device)[:num_queries].int()
    tokens = torch.arange(100, 100 + num_queries, device=device).int()
    cos, sin = table_of(rotary_dim, dtype, device)
    where = (query, key, value, rows, tokens, cos, sin, is_neox)

    outs = [torch.full_like(x, NAN) for x in (case.query, case.key, case.value)]
    sums = means.make_sums(len(segments.num_groups), num_kv_heads, head_size, device)
    workspace.prepare(pages, segments, *where, *outs, weights, sums)
    results = []
    for precision in (torch.float64, torch.float32):
        right = [torch.full_like(x, NAN, dtype=precision) for x in outs]
        total = torch.zeros_like(sums, dtype=precision)
        reference.prepare(exact_pages, segments, *where, *right, weights, total)
        results.append((*right, total))
    exact, eager = results
    assert torch.equal(pages.kv.nan_to_num(7), exact_pages.kv.nan_to_num(7))
    assert torch.equal(pages.token, exact_pages.token)
    for got, right, plain in zip(outs, exact, eager, strict=False):
        written = ~right.isnan()
        assert_close(got[written], right[written], plain[written])
        assert torch.equal(got.isnan(), ~written)
    last = segments.num_rows
    assert outs[2][last - KEY_PADDING : last].count_nonzero() == 0
    held = (segments.key_spans[:, 1] - segments.key_spans[:, 0]).max()
    assert (sums.double() / 2**24 - exact[3]).abs().max() <= 2e-7 * held
    assert (sums != 0).any() == bool(weights.key or weights.value)
    # Single tokens that come to a boundary find the same sums.
    num_keys = segments.key_spans[:, 1] - segments.key_spans[:, 0]
    groups = torch.empty(len(num_keys), 0, 2, dtype=torch.int32, device=device)
    merges = Merges(groups, segments.num_groups, segments.block_table, num_keys)
    config = launch_config(head_size, dtype.itemsize, 64)
    again = torch.zeros_like(sums)
    means.add_units(
        pages,
        merges,
        again,
        3,
        has_key=weights.key > 0,
        has_value=weights.value > 0,
        tile_keys=config.sum_keys,
        num_warps=config.sum_warps,
        max_registers=config.max_registers,
    )
    assert torch.equal(again, sums)


def test_as_many_warps_share_a_wide_vector_in_both_launches():
    """Else they would sum its squares in another order, which the interpreter does not show."""
    assert launch_config(512, 2, 64).sum_warps == workspace.WIDE_WARPS
