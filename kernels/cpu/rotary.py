"""Rotary embedding of keys and queries at their logical place in the cache."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` channels of `x`, in float32.

    Args:
        x: [..., head_size] keys or queries, any floating dtype.
        cos: [..., rotary_dim / 2] float32, broadcasts against `x`.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).

    Returns:
        [..., head_size] float32, newly allocated.
    """
    half = cos.shape[-1]
    out = x.to(torch.float32, copy=True)
    if is_neox:
        first, second = out[..., :half], out[..., half : 2 * half]
    else:
        first, second = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
    turned = first * cos
    turned.addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return out
