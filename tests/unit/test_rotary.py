"""Rotation of keys and queries: both pairings, partial heads, any dtype."""

from __future__ import annotations

import pytest
import torch

from vllm_cascade.kernels.cpu.attention import rotate


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_is_multiplication_by_a_unit_complex_number(
    is_neox: bool, rotary_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16).to(dtype)
    angle = torch.rand(5, rotary_dim // 2) * 6
    kept = x.clone()
    found = rotate(x, angle.cos(), angle.sin(), is_neox)

    turned, rest = x[..., :rotary_dim].double(), x[..., rotary_dim:]
    if is_neox:
        pairs = turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    else:
        pairs = turned.unflatten(-1, (-1, 2))
    number = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle)
    pairs = torch.view_as_real(number)
    turned = (pairs.transpose(-1, -2) if is_neox else pairs).flatten(-2)
    expected = torch.cat([turned.float(), rest.float()], dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)
