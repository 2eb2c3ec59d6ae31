"""What the kernels of scored prefill compute, in plain PyTorch and in the dtype of their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.attention import capped, reduce_heads, with_sinks

# Zeros after each segment's values: as many as the widest tile of FlashAttention-3 has keys.
KEY_PADDING = 192


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` channels.

    Args:
        x: [n, heads, head_size].
        cos: [n, rotary_dim / 2].
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).

    Returns:
        [n, heads, head_size] in the dtype of `x`.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if is_neox:
        first, second = x[..., :half], x[..., half : 2 * half]
    else:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
    return torch.cat((joined, x[..., 2 * half :]), -1)


def _held(pool: Tensor, table: Tensor, num_keys: int) -> Tensor:
    """[num_keys, num_kv_heads, ...] what the first places of a block table hold."""
    block_size = pool.shape[2]
    blocks = table[: -(-num_keys // block_size)].long()
    return pool[blocks].transpose(1, 2).flatten(0, 1)[:num_keys]


def _segments(segments: Any) -> list[tuple[int, int, int, int]]:
    """First and last (exclusive) query and key of every segment."""
    spans = torch.cat([segments.query_spans, segments.key_spans], dim=1)
    return [tuple(each) for each in spans.tolist()]


def prepare(
    pages: Any,
    segments: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    is_neox: bool,
    query_out: Tensor,
    key_out: Tensor,
    value_out: Tensor,
    weights: Any,
    sums: Tensor,
) -> None:
    """As the kernel's wrapper of this name; computes in the dtype of `key_out`.

    `sums` are floating, of unit length one.
    """
    head_size, block_size = key_out.shape[-1], pages.kv.shape[2]
    for index, (first, last, start, end) in enumerate(_segments(segments)):
        own, table = rows[first:last].long(), segments.block_table[index]
        places = torch.arange(end - start, device=cos.device)
        mine = places[end - start - len(own) :]
        blocks = table[mine // block_size].long()
        pages.kv[blocks, :, mine % block_size] = torch.cat((key[own], value[own]), dim=-1)
        if pages.token is not None:
            pages.token[blocks, :, mine % block_size] = tokens[first:last, None]
        picked = query[own].to(query_out.dtype)
        query_out[first:last] = rotate(picked, cos[mine], sin[mine], is_neox)
        held = _held(pages.kv, table, end - start).to(key_out.dtype)
        key_out[start:end] = rotate(held[..., :head_size], cos[places], sin[places], is_neox)
        value_out[start:end] = held[..., head_size:]
        value_out[end : end + KEY_PADDING] = 0
        if segments.num_groups[index] > 0:
            for part, weight in enumerate((weights.key, weights.value)):
                vectors = held[..., part * head_size : (part + 1) * head_size]
                units = torch.nn.functional.normalize(vectors, dim=-1, eps=1e-30)
                sums[index, :, part] += (weight > 0) * units[places % 128 < 32].sum(0)


def _logits(query: Tensor, key: Tensor, scale: float, soft_cap: float) -> Tensor:
    """[num_kv_heads, group, queries, keys] in the dtype of `query`, -inf where not seen."""
    (num_queries, num_heads, _), (num_keys, num_kv_heads, _) = query.shape, key.shape
    split = query.transpose(0, 1).unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    logits = capped(split @ key.permute(1, 2, 0)[:, None] * scale, soft_cap)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    return logits.masked_fill(~seen.tril(num_keys - num_queries), float("-inf"))


def attend(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Any,
    scale: float,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """As the kernel's wrapper of this name; computes in the dtype of `query`."""
    for first, last, start, end in _segments(segments):
        logits = _logits(query[first:last], key[start:end], scale, soft_cap)
        logits = with_sinks(logits, None if sinks is None else sinks.view(*logits.shape[:2], 1))
        probability = logits.softmax(-1)[..., : end - start]
        attended = probability @ value[start:end].transpose(0, 1)[:, None]
        out[first:last] = attended.flatten(0, 1).transpose(0, 1)
        lse[:, first:last] = logits.logsumexp(-1).flatten(0, 1)


def score_keys(
    pages: Any,
    segments: Any,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    decay: float,
    power: float,
    reduction: str,
    counter: Tensor | None,
    soft_cap: float = 0.0,
) -> None:
    """As the kernel's wrapper of this name; computes in the dtype of `lse`, its inputs' too."""
    num_kv_heads, block_size = pages.score.shape[1:]
    for index, (first, last, start, end) in enumerate(_segments(segments)):
        num_queries, prefix = last - first, end - start - (last - first)
        asked, held = query[first:last].to(lse.dtype), key[start:end].to(lse.dtype)
        logits = _logits(asked, held, scale, soft_cap)
        normal = lse[:, first:last].unflatten(0, (num_kv_heads, -1))
        probability = (logits - normal[..., None]).exp()
        age = segments.exponents[index].double() - torch.arange(num_queries, device=lse.device)
        weight = (decay**age).to(lse.dtype)
        given = reduce_heads(probability**power, reduction)
        # [num_keys, num_kv_heads]
        gained = torch.einsum("i,hij->jh", weight, given)
        places = torch.arange(end - start, device=lse.device)
        blocks = segments.block_table[index].long()[places // block_size]
        old = pages.score[blocks, :, places % block_size].to(lse.dtype)
        kept = old[:prefix] * segments.carry[index].to(lse.dtype)
        gained[:prefix] += kept
        pages.score[blocks, :, places % block_size] = gained.to(pages.score.dtype)
        if counter is not None:
            counter += num_kv_heads * (num_queries * prefix + num_queries * (num_queries + 1) // 2)
