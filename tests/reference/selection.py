"""Which tokens of a window survive: ranks, distinctiveness and the choice.

Every function works on the last dimension, in any floating dtype, with any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def distinctiveness(vectors: Tensor) -> Tensor:
    """Return minus the cosine of each vector to the mean of the unit vectors.

    The mean is over the first 32 of every 128 places.

    Args:
        vectors: [..., n, head_size], all keys (before RoPE) or values held at the boundary, by
            place.

    Returns:
        [..., n] in the dtype of `vectors`; 0 for a zero vector, and for every vector if the mean
        is zero. A vector that is not finite has NaN, and counts as zero in the mean.

    Source: the idea of KeyDiff, arXiv 2504.15364.
    """
    units = _unit(vectors)
    some = units[..., torch.arange(units.shape[-2]) % 128 < 32, :]
    mean = _unit(torch.where(some.isnan(), 0.0, some).mean(dim=-2, keepdim=True))
    return -(units * mean).sum(-1)


def select(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Choose the better half of each window; a tie in the sum of ranks goes to the newer token.

    Args:
        terms: What tokens are ranked by: a weight, and values [..., g], oldest first, g even.

    Returns:
        bool [..., g], exactly g/2 of them True in every window.

    Raises:
        ValueError: If g is odd, or if there is nothing to rank by.
    """
    if not terms:
        raise ValueError("a choice needs something to rank tokens by")
    size = terms[0][1].shape[-1]
    if size % 2:
        raise ValueError(f"a window has an even number of tokens, got {size}")
    total = sum(weight * rank(values).double() for weight, values in terms)
    return rank(total) >= size // 2


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)
