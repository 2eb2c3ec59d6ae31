"""Reference of `kernels/decode/attend.py`: a row and a KV head at a time, in any precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.attention import capped, with_sinks


def _turn(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` channels of `x` [n, head_size] by row."""
    half = cos.shape[-1]
    pairs = x[:, : 2 * half]
    if is_neox:
        first, second = pairs.chunk(2, dim=-1)
    else:
        first, second = pairs.unflatten(-1, (half, 2)).unbind(-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
    return torch.cat((joined, x[:, 2 * half :]), dim=-1)


def decode(
    output: Tensor,
    query: Tensor,
    pages: Any,
    batch: Any,
    cos: Tensor,
    sin: Tensor,
    is_neox: bool,
    scale: float,
    power: float,
    reduction: str,
    scratch: Any = None,
    scored: bool = True,
    counter: Tensor | None = None,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Attend one query of each row to all it holds, and score the keys.

    Args:
        output: [num_tokens, num_heads, head_size], any dtype.
        query: [num_tokens, num_heads, head_size] before RoPE.
        pages: Has `kv` and `score`.
        batch: Has `rows`, `places`, `block_table`, `carry` and `weights`.
        cos: [num_positions, rotary_dim / 2].
        sin: As `cos`.
        is_neox: Which channels are paired.
        scale: Factor on the logits.
        power: Exponent on the probability in the score.
        reduction: "max" or "mean" over the query heads of a KV head.
        scratch: Not used.
        scored: Whether to update the scores.
        counter: Gains the number of keys of each row and KV head.
        sinks: [num_heads] logits that only take part in the denominator, or None.
        soft_cap: Soft cap on the keys' logits, or 0 for none.
        dtype: Of the computation.
    """
    _, num_kv_heads, block_size, _ = pages.kv.shape
    _, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    for r, (row, place) in enumerate(zip(batch.rows.tolist(), batch.places.tolist(), strict=True)):
        if place < 0:
            continue
        places = torch.arange(place + 1, device=query.device)
        block = batch.block_table[r].long()[places // block_size]
        slot = places % block_size
        angle = (cos[: place + 1].to(dtype), sin[: place + 1].to(dtype))
        for head in range(num_kv_heads):
            held = pages.kv[block, head, slot].to(dtype)
            key = _turn(held[:, :head_size], *angle, is_neox)
            heads = slice(head * group, (head + 1) * group)
            own = (angle[0][place:], angle[1][place:])
            asked = _turn(query[row, heads].to(dtype), *own, is_neox)
            logits = capped((asked @ key.T) * scale, soft_cap)
            logits = with_sinks(logits, None if sinks is None else sinks[heads])
            probs = logits.softmax(-1)[:, : place + 1]
            output[row, heads] = (probs @ held[:, head_size:]).to(output.dtype)
            if counter is not None:
                counter += place + 1
            if not scored:
                continue
            gain = probs**power
            gain = gain.amax(0) if reduction == "max" else gain.mean(0)
            gain = gain * batch.weights[r].to(dtype)
            old = pages.score[block[:place], head, slot[:place]].to(dtype)
            gain[:place] += old * batch.carry[r].to(dtype)
            pages.score[block, head, slot] = gain.to(pages.score.dtype)
