"""Causal attention over the cascade table with exact per-key scores, in plain PyTorch on a CPU.

Pages hold keys before RoPE; attention rotates each key at its logical place. With p the softmax
probability, a query gives a key ``p ** score_power``, reduced by ``max`` (or ``mean``) over the
query heads that share the KV head. A page's score of a key is the weighted sum over queries.

Source: arXiv 2406.17808, which ranks tokens by an exponential moving average of the attention that
they get.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from vllm_cascade.kernels.pages import Pages

# Float32 elements of attention weights of one KV head that are computed at once. With fewer, waking
# threads costs more than the cache saves, most of all where OpenMP's threads sleep in between.
TILE_ELEMENTS = 1 << 20
# Queries that PyTorch's own attention takes at once where keys come before them.
MASKED_QUERIES = 512


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary table of a layer.

    Args:
        cos: [num_positions, rotary_dim / 2] float32.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox: bool

    def rotate(self, x: torch.Tensor, places: slice | torch.Tensor) -> torch.Tensor:
        """Rotate keys or queries at their logical places; see `rotate`.

        Args:
            x: [num_heads, *places.shape, head_size], any floating dtype.
            places: Logical places, an int64 tensor or a slice.

        Returns:
            As `x`, float32, newly allocated.
        """
        return rotate(x, self.cos[places], self.sin[places], self.is_neox)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How attention becomes a score.

    Args:
        power: Exponent on the probability.
        reduction: "max" or "mean" over the query heads of a KV head.
    """

    power: float
    reduction: str

    def amounts(self, probs: torch.Tensor) -> torch.Tensor:
        """Return what each query gives each key.

        Args:
            probs: [query heads of one KV head, ...] float32 probabilities; overwritten.

        Returns:
            [...] float32; may share memory with `probs`.
        """
        if self.reduction == "mean":
            return self._raise(probs).mean(dim=0)
        # Pairwise: several times faster than amax over a dimension that is not the last.
        first = probs[0]
        for other in probs[1:]:
            torch.maximum(first, other, out=first)
        return self._raise(first)

    def _raise(self, probs: torch.Tensor) -> torch.Tensor:
        """Raise probabilities to the power, in place."""
        if self.power == 1.0:
            return probs
        return probs.square_() if self.power == 2.0 else probs.pow_(self.power)


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Several tokens of one request inside one epoch.

    Args:
        start: Row of the segment's first token in the batch.
        end: One past the row of its last token.
        block_ids: [num_blocks] int64 blocks in logical order, the segment's own included.
        first_place: Logical place of the first query, which is the number of keys before it.
        carry: Factor on the scores kept so far.
        weights: [end - start] float32 weight of each query in the scores.
    """

    start: int
    end: int
    block_ids: torch.Tensor
    first_place: int
    carry: float
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token of each of several requests; the blocks of all requests are in one list.

    Args:
        rows: [num_rows] int64 row of each query in the batch.
        places: [num_rows] int64 logical place of each query; it sees ``places + 1`` keys.
        block_ids: [num_blocks] int64 blocks of all rows, each row's in logical order.
        block_row: [num_blocks] int64 index into `rows` of the block's owner.
        block_place: [num_blocks] int64 number of the block within its row.
        carry: [num_rows] float32 factor on the scores kept so far.
        weights: [num_rows] float32 weight of each query in the scores.
    """

    rows: torch.Tensor
    places: torch.Tensor
    block_ids: torch.Tensor
    block_row: torch.Tensor
    block_place: torch.Tensor
    carry: torch.Tensor
    weights: torch.Tensor


def prefill(
    output: torch.Tensor,
    query: torch.Tensor,
    pages: Pages,
    segment: PrefillSegment,
    rotary: Rotary,
    scale: float,
    scoring: Scoring | None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend one segment's queries to themselves and all keys before them, and score the keys.

    Args:
        output: [num_tokens, num_heads, head_size_v]; the segment's rows are written.
        query: [num_tokens, num_heads, head_size] before RoPE.
        pages: The layer's pages, the segment's keys and values already written. `score` is updated
            if `scoring` is given.
        segment: Which rows and blocks.
        rotary: The layer's rotary table.
        scale: Factor on the logits.
        scoring: How to score; None to keep no scores.
        sinks: [num_heads] float32 natural logits that only take part in the softmax's denominator,
            or None.
        soft_cap: Keys' logits become ``soft_cap * tanh(logit / soft_cap)``; 0 for no cap.

    Raises:
        ValueError: If scores are to be kept in pages without room for them.
    """
    if scoring is not None and pages.score is None:
        raise ValueError("to keep scores, pages need room for them")
    num_queries, num_heads = segment.end - segment.start, query.shape[1]
    head_size, num_keys = query.shape[2], segment.first_place + segment.end - segment.start
    _, num_kv_heads, block_size, _ = pages.kv.shape
    shared = num_heads // num_kv_heads

    # [num_kv_heads, num_keys, head_size + head_size_v]
    held = pages.read(segment.block_ids, head_size).transpose(0, 1).flatten(1, 2)[:, :num_keys]
    key = rotary.rotate(held[..., :head_size], slice(num_keys)).contiguous()
    value = held[..., head_size:].float().contiguous()
    own = slice(segment.first_place, num_keys)
    # [num_heads, num_queries, head_size]
    rotated = rotary.rotate(query[segment.start : segment.end].transpose(0, 1), own).mul_(scale)
    if scoring is None and sinks is None and not soft_cap:
        attended = _attend(rotated, key, value)
        output[segment.start : segment.end] = attended.transpose(0, 1)
        return
    rotated = rotated.view(num_kv_heads, shared, num_queries, head_size)

    gained = torch.zeros(num_kv_heads, num_keys) if scoring else None
    rows_per_tile = max(16, TILE_ELEMENTS // (shared * num_keys) // 16 * 16)
    for first in range(0, num_queries, rows_per_tile):
        last = min(first + rows_per_tile, num_queries)
        count, seen = last - first, segment.first_place + last
        future = torch.arange(count)[:, None] < torch.arange(count)
        rows_out = output[segment.start + first : segment.start + last]
        rows_out = rows_out.view(count, num_kv_heads, shared, -1)
        for head in range(num_kv_heads):
            rows = rotated[head, :, first:last].reshape(shared * count, head_size)
            probs = _product(rows, key[head, :seen]).view(shared, count, seen)
            _cap_(probs, soft_cap)
            probs[..., seen - count :].masked_fill_(future, float("-inf"))
            _softmax_(probs, None if sinks is None else sinks.view(num_kv_heads, shared, 1)[head])
            attended = _product(probs.view(-1, seen), value[head, :seen].t())
            rows_out[:, head] = attended.view(shared, count, -1).transpose(0, 1)
            if gained is not None and scoring is not None:
                amounts = scoring.amounts(probs)
                gained[head, :seen] += torch.mv(amounts.t(), segment.weights[first:last])
    if gained is not None:
        _store_scores(pages, segment, gained, block_size)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention by PyTorch's own kernel, which keeps no probabilities.

    Args:
        query: [num_heads, num_queries, head_size] float32, scaled; the last sees every key.
        key: [num_kv_heads, num_keys, head_size] float32.
        value: [num_kv_heads, num_keys, head_size_v] float32.

    Returns:
        [num_heads, num_queries, head_size_v] float32.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention,
        scale=1.0,
        enable_gqa=len(query) != len(key),
    )
    if num_queries == num_keys:
        return attend(query[None], key[None], value[None], is_causal=True)[0]
    # With a mask PyTorch computes all pairs, seen or not: with few queries at once it wastes few.
    parts = []
    for first in range(0, num_queries, MASKED_QUERIES):
        some = query[None, :, first : first + MASKED_QUERIES]
        seen = num_keys - num_queries + first + some.shape[2]
        mask = _seen(some.shape[2], seen)
        parts.append(attend(some, key[None, :, :seen], value[None, :, :seen], attn_mask=mask)[0])
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=16)  # all layers of a step need the same masks
def _seen(num_queries: int, num_keys: int) -> torch.Tensor:
    """[num_queries, num_keys] bool: which keys each query sees."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def _cap_(logits: torch.Tensor, soft_cap: float) -> None:
    """Cap logits softly, in place, if `soft_cap` is not 0."""
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)


def _softmax_(logits: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Turn logits into probabilities over the last dimension, in place.

    Args:
        logits: [..., num_keys] float32.
        sinks: Logits that only take part in the denominator, broadcast to [...]; or None.
    """
    share = None if sinks is None else torch.sigmoid(logits.logsumexp(-1) - sinks)
    torch.softmax(logits, dim=-1, out=logits)
    if share is not None:
        logits.mul_(share.unsqueeze(-1))


def _product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Multiply [m, k] by the transpose of [n, k], in float32.

    oneDNN multiplies where PyTorch has it: `torch.mm` calls Intel's MKL, which runs at less than
    half speed on other vendors' processors.
    """
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(rows, columns, None, "none", [], "")
    return torch.mm(rows, columns.t())


def _store_scores(
    pages: Pages, segment: PrefillSegment, gained: torch.Tensor, block_size: int
) -> None:
    """Add what a segment's keys gained to their scores.

    Args:
        pages: The layer's pages, with scores.
        segment: Which blocks. The keys of the segment's own tokens had no scores before.
        gained: [num_kv_heads, num_keys] float32.
        block_size: Tokens of a block.
    """
    assert pages.score is not None
    num_kv_heads, num_keys = gained.shape
    num_blocks = len(segment.block_ids)
    total = torch.zeros(num_kv_heads, num_blocks * block_size)
    total[:, :num_keys] = gained
    before = -(-segment.first_place // block_size)
    old = pages.score[segment.block_ids[:before]].transpose(0, 1).reshape(num_kv_heads, -1)
    total[:, : segment.first_place] += old[:, : segment.first_place] * segment.carry
    total = total.view(num_kv_heads, num_blocks, block_size)
    pages.score[segment.block_ids] = total.transpose(0, 1)


def decode(
    output: torch.Tensor,
    query: torch.Tensor,
    pages: Pages,
    batch: DecodeBatch,
    rotary: Rotary,
    scale: float,
    scoring: Scoring | None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend one query of each row to all keys that the row holds, and score the keys.

    Blocks of all rows are one ragged batch: keys and values are never padded to the longest row,
    only attention weights and partial outputs are.

    Args:
        output: [num_tokens, num_heads, head_size_v]; the batch's rows are written.
        query: [num_tokens, num_heads, head_size] before RoPE.
        pages: The layer's pages, the queries' own keys and values already written. `score` is
            updated if `scoring` is given.
        batch: Which rows and blocks.
        rotary: The layer's rotary table.
        scale: Factor on the logits.
        scoring: How to score; None to keep no scores.
        sinks: [num_heads] float32 natural logits that only take part in the softmax's denominator,
            or None.
        soft_cap: Keys' logits become ``soft_cap * tanh(logit / soft_cap)``; 0 for no cap.

    Raises:
        ValueError: If scores are to be kept in pages without room for them.
    """
    if scoring is not None and pages.score is None:
        raise ValueError("to keep scores, pages need room for them")
    num_rows, num_heads = len(batch.rows), query.shape[1]
    head_size = query.shape[2]
    _, num_kv_heads, block_size, _ = pages.kv.shape
    shared = num_heads // num_kv_heads

    # [num_blocks, block_size] logical place of every slot
    slot_place = batch.block_place[:, None] * block_size + torch.arange(block_size)
    past_end = slot_place > batch.places[batch.block_row][:, None]
    held = pages.read(batch.block_ids, head_size)
    held.masked_fill_(past_end[:, None, :, None], 0)
    spot = slot_place.clamp_(max=len(rotary.cos) - 1)
    # [num_blocks, num_kv_heads, block_size, head_size]
    key = rotary.rotate(held[..., :head_size].transpose(0, 1), spot).transpose(0, 1)
    value = held[..., head_size:].float()
    rotated = rotary.rotate(query[batch.rows].transpose(0, 1), batch.places).mul_(scale)
    rotated = rotated.transpose(0, 1)
    rotated = rotated.reshape(num_rows, num_kv_heads, shared, head_size)

    # [num_blocks, num_kv_heads, shared, block_size]
    logits = torch.matmul(rotated[batch.block_row], key.transpose(2, 3))
    _cap_(logits, soft_cap)
    logits.masked_fill_(past_end[:, None, None], float("-inf"))
    longest = int(batch.block_place.max()) + 1
    padded = torch.full((num_rows, longest, num_kv_heads, shared, block_size), float("-inf"))
    padded[batch.block_row, batch.block_place] = logits
    padded = padded.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, shared, -1)
    _softmax_(padded, None if sinks is None else sinks.view(num_kv_heads, shared))
    padded = padded.view(num_rows, num_kv_heads, shared, longest, block_size)
    probs = padded.permute(0, 3, 1, 2, 4)[batch.block_row, batch.block_place]
    parts = torch.zeros(num_rows, longest, num_kv_heads, shared, value.shape[-1])
    parts[batch.block_row, batch.block_place] = torch.matmul(probs, value)
    output[batch.rows] = parts.sum(1).view(num_rows, num_heads, -1).to(output.dtype)

    if scoring is None:
        return
    assert pages.score is not None
    gained = scoring.amounts(probs.movedim(2, 0)) * batch.weights[batch.block_row][:, None, None]
    old = pages.score[batch.block_ids] * batch.carry[batch.block_row][:, None, None]
    # A query's own key has no score yet, and slots past it hold leftovers.
    new = slot_place >= batch.places[batch.block_row][:, None]
    pages.score[batch.block_ids] = old.masked_fill_(new[:, None], 0) + gained


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` channels of `x`, in float32.

    Source: RoPE, arXiv 2104.09864, equation 34.

    Args:
        x: [..., head_size] keys or queries, any floating dtype.
        cos: [..., rotary_dim / 2] float32, broadcast against `x`.
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
