"""Causal attention over the places of a cache, with the score that it gives every key."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(places: int, head_size: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Tabulate cosine and sine for every place.

    The angles are float32 whatever `dtype`: models are trained and served with them, and their
    rounding is far larger than what a float64 oracle is meant to resolve.

    Returns:
        [2, places, head_size / 2] in `dtype`: cosines, sines.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    angle = torch.arange(places, dtype=torch.float32)[:, None] * (1.0 / theta**exponent)
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply RoPE in neox order: element j turns with element j + head_size / 2.

    Args:
        x: [..., n, head_size].
        table: [2, n, head_size / 2], the rows of `rope_table` for the places of the n tokens.

    Returns:
        [..., n, head_size].
    """
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def reduce_heads(gain: Tensor, reduction: str) -> Tensor:
    """Combine what the query heads of one KV head give a key, for each query on its own.

    Args:
        gain: [num_kv_heads, group, queries, keys].
        reduction: "max" or "mean".

    Returns:
        [num_kv_heads, queries, keys].

    Raises:
        ValueError: If the reduction is unknown.
    """
    if reduction == "max":
        return gain.amax(dim=1)
    if reduction == "mean":
        return gain.mean(dim=1)
    raise ValueError(f"score_reduction is 'max' or 'mean', got {reduction!r}")


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    score_power: float,
    score_reduction: str,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend causally from the newest n of m places, and sum what the queries give each key.

    Args:
        query: [num_kv_heads, group, n, head_size], rotated.
        key: [num_kv_heads, m, head_size], rotated; the queries' own keys are the last n.
        value: [num_kv_heads, m, head_size].
        query_weight: [n], the weight of each query in the sum.
        score_power: Exponent on the attention probability.
        score_reduction: "max" or "mean" over `group`.
        sinks: [num_kv_heads, group, 1] logits that only take part in the denominator, or None.
        soft_cap: Soft cap on the keys' logits, or 0 for none.

    Returns:
        The output [num_kv_heads, group, n, head_size] and the gain in score [num_kv_heads, m].
    """
    probability = _probabilities(query, key, sinks, soft_cap)
    gain = reduce_heads(probability**score_power, score_reduction)
    return probability @ value[:, None], torch.einsum("hnm,n->hm", gain, query_weight)


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, chunk: int = 256, soft_cap: float = 0.0
) -> Tensor:
    """Attend causally over everything, in chunks of queries to bound the memory.

    Args:
        query: [num_kv_heads, group, n, head_size], rotated.
        key: [num_kv_heads, n, head_size], rotated.
        value: [num_kv_heads, n, head_size].
        chunk: Queries at a time.
        soft_cap: Soft cap on the logits, or 0 for none.

    Returns:
        [num_kv_heads, group, n, head_size].
    """
    parts = []
    for start in range(0, query.shape[2], chunk):
        rows = query[:, :, start : start + chunk]
        end = start + rows.shape[2]
        probability = _probabilities(rows, key[:, :end], None, soft_cap)
        parts.append(probability @ value[:, None, :end])
    return torch.cat(parts, dim=2)


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    """Cap logits softly, as Gemma 2 does (arXiv 2408.00118, section 2), unless the cap is 0."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Append the logits of the sinks as a last column, if there are any.

    Args:
        logits: [..., keys].
        sinks: One logit a row, as broadcast to [...], or None.

    Returns:
        [..., keys + 1], or `logits`.
    """
    if sinks is None:
        return logits
    column = sinks.to(logits.dtype).expand(logits.shape[:-1])
    return torch.cat((logits, column[..., None]), dim=-1)


def _probabilities(query: Tensor, key: Tensor, sinks: Tensor | None, soft_cap: float) -> Tensor:
    queries, keys = query.shape[2], key.shape[1]
    logits = query @ key[:, None].transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = capped(logits, soft_cap)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(diagonal=keys - queries + 1)
    return with_sinks(logits.masked_fill_(future, -torch.inf), sinks).softmax(-1)[..., :keys]
