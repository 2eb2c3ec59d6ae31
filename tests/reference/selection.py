"""Which tokens of a window survive: ranks, distinctiveness and the choice.

Every function works on the last dimension, in any floating dtype, with any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smaller(x: Tensor) -> Tensor:
    """Compare every pair of a window, NaN below everything.

    Args:
        x: [..., g], any floating dtype.

    Returns:
        bool [..., g, g]; element [..., i, j] says that x[..., j] is smaller than x[..., i].
    """
    mine, other = x.unsqueeze(-1), x.unsqueeze(-2)
    return (other < mine) | (other.isnan() & ~mine.isnan())


def rank(x: Tensor) -> Tensor:
    """Count the tokens of the window that have a smaller value, or an equal one and are older.

    Args:
        x: [..., g], oldest first; NaN is smaller than everything and equal to NaN.

    Returns:
        int64 [..., g]: a permutation of 0 .. g-1 along the last dimension.
    """
    below = smaller(x)
    equal = ~below & ~below.transpose(-1, -2)
    size = x.shape[-1]
    older = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(diagonal=-1)
    return (below | (equal & older)).sum(-1)


def distinctiveness(keys: Tensor) -> Tensor:
    """Return minus the cosine of each key to the mean of the unit keys.

    Args:
        keys: [..., n, head_size], all keys held at the boundary, before RoPE.

    Returns:
        [..., n] in the dtype of `keys`; 0 for a zero key, and for every key if the mean is zero.

    Source: the idea of KeyDiff, arXiv 2504.15364.
    """
    units = _unit(keys)
    mean = _unit(units.mean(dim=-2, keepdim=True))
    return -(units * mean).sum(-1)


def select(score: Tensor, distinctiveness: Tensor | None = None, key_weight: float = 0.0) -> Tensor:
    """Choose the better half of each window; a tie in the sum of ranks goes to the newer token.

    Args:
        score: [..., g], oldest first, g even.
        distinctiveness: [..., g], or None where `key_weight` is 0.
        key_weight: Weight of the rank of distinctiveness beside the rank of the score.

    Returns:
        bool [..., g], exactly g/2 of them True in every window.

    Raises:
        ValueError: If g is odd, or if `key_weight` is not 0 and there is no distinctiveness.
    """
    size = score.shape[-1]
    if size % 2:
        raise ValueError(f"a window has an even number of tokens, got {size}")
    total = rank(score).double()
    if key_weight != 0:
        if distinctiveness is None:
            raise ValueError(f"key_weight {key_weight} needs the distinctiveness of the keys")
        total = total + key_weight * rank(distinctiveness)
    return rank(total) >= size // 2


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)
