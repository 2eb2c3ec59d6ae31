"""Reference of a KV cache in FP8: a cache of what is left of keys and values after a round trip."""

from __future__ import annotations

import torch
from torch import Tensor

# The largest finite number of e4m3.
MAX = 448.0


def stored(x: Tensor, scale: Tensor) -> Tensor:
    """Round keys or values to FP8.

    Args:
        x: [tokens, num_kv_heads, channels].
        scale: [num_kv_heads] float32.

    Returns:
        As `x`, float8_e4m3fn, of x / scale; what is too large has the largest number's place.
    """
    return (x.float() / scale[:, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def round_trip(x: Tensor, scale: Tensor) -> Tensor:
    """Give what is left of keys or values after a round trip through FP8.

    Args:
        x: [tokens, num_kv_heads, channels].
        scale: [num_kv_heads] float32.

    Returns:
        As `x`, float32.
    """
    return stored(x, scale).float() * scale[:, None]
