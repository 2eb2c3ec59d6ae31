"""Single tokens of several requests attend to their paged keys and score them, exactly.

Two launches. The first splits each row's keys over programs, each of which leaves a normalised
partial output, its log-sum-exp and, where scores are kept, every logit. The second launch joins the
splits and turns the logits into scores with the log-sum-exp of all keys and of the sink, if there
is one. Where a row has a single split, the first launch writes the row's output, unless there are
scores or sinks. How many programs there are depends on the number of rows and on the bound of the
scratch, never on lengths. So a CUDA graph can capture both launches; programs beyond a row's length
return at once.

Source: Flash-Decoding, which splits the keys of a query over programs and joins the partial outputs
by their log-sum-exps; the online softmax within a split is FlashAttention's (arXiv 2205.14135).
"""

from __future__ import annotations

import torch
import triton

from vllm_cascade.kernels.decode.combine import combine, is_direct
from vllm_cascade.kernels.decode.launch_config import (
    MAX_BLOCK_SIZE,
    Config,
    Scratch,
    count_teams,
    launch_config,
    make_scratch,
    splits_for_all,
    tokens_together,
)
from vllm_cascade.kernels.decode.split import MIN_COLUMNS, MIN_DOT, split_kernel
from vllm_cascade.kernels.launch import launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import LOG2_E
from vllm_cascade.kernels.segments import DecodeRows

# What callers need of paged decode, in one place.
__all__ = ["Config", "Scratch", "decode", "launch_config", "make_scratch"]


def has_words(half: int) -> bool:
    """Whether as many channels as that fill words, and enough words for tl.dot."""
    return half % 2 == 0 and half > MIN_DOT


def decode(
    output: torch.Tensor,
    query: torch.Tensor,
    pages: Pages,
    batch: DecodeRows,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    scale: float,
    power: float,
    reduction: str,
    scratch: Scratch,
    scored: bool = True,
    counter: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    config: Config | None = None,
) -> None:
    """Attend the token of each row to all keys that the row holds, and score the keys.

    More rows than `scratch` has room for are processed in turn.

    Args:
        output: [num_tokens, num_heads, head_size], channels dense; the batch's rows are written.
        query: [num_tokens, num_heads, head_size] before RoPE, channels dense.
        pages: The layer's pages, dense within a block, the queries' own keys and values already
            written. `score` is updated if `scored`.
        batch: Which rows and blocks. Rows at place -1 are neither read nor written.
        cos: [num_positions, rotary_dim / 2], contiguous. In float32 rotations compose. A table in
            the model's dtype is too coarse to compose rotations; it is read at every key's place.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        scale: Factor on the logits.
        power: Exponent on the probability in the score.
        reduction: "max" or "mean" over the query heads of a KV head.
        scratch: From `make_scratch`; earlier results in it are overwritten.
        scored: Whether to update the scores.
        counter: [1] int64, or None. Gains the number of keys of each row and KV head.
        sinks: [num_heads] natural logits that only take part in the softmax's denominator, or None.
        soft_cap: Keys' logits become ``soft_cap * tanh(logit / soft_cap)``; 0 for no cap.
        config: How to launch; None for `launch_config`'s choice.

    Raises:
        ValueError: If a shape, stride or dtype does not fit.
    """
    _, num_kv_heads, block_size, channels = pages.kv.shape
    _, num_heads, head_size = query.shape
    half = cos.shape[1]
    if channels != 2 * head_size or num_heads % num_kv_heads or 2 * half > head_size:
        raise ValueError(
            f"{num_heads} query heads of {head_size} channels, {2 * half} of them rotary, do not "
            f"fit pages of {list(pages.kv.shape)}"
        )
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError(f"pages must be dense within a block, got strides {pages.kv.stride()}")
    if query.stride(2) != 1 or output.stride(2) != 1 or batch.block_table.stride(1) != 1:
        raise ValueError(
            "the last dimension of query, output and block table must be dense, got strides "
            f"{query.stride()}, {output.stride()} and {batch.block_table.stride()}"
        )
    if not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(
            f"the rotary table must be contiguous, got strides {cos.stride()} and {sin.stride()}"
        )
    if block_size > MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size is a power of two up to {MAX_BLOCK_SIZE}, got {block_size}")
    if reduction not in ("max", "mean"):
        raise ValueError(f"reduction is 'max' or 'mean', got {reduction!r}")
    if scratch.partial.shape[::2] != (num_heads, head_size):
        raise ValueError(
            f"scratch is for [heads, room, channels] {list(scratch.partial.shape)}, "
            f"not for {num_heads} heads of {head_size} channels"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"one sink for each of {num_heads} heads, got {list(sinks.shape)}")
    if batch.per_request > 1 and (scored or len(batch.rows) % batch.per_request):
        raise ValueError(
            f"{len(batch.rows)} rows, {batch.per_request} of each request, have to be all rows of "
            "some requests, and no scores may be kept"
        )
    if scratch.max_rows < batch.per_request:
        raise ValueError(f"scratch for {scratch.max_rows} rows, {batch.per_request} of a request")
    if scored and (pages.score is None or scratch.logits.shape[2] < scratch.max_places):
        raise ValueError("to keep scores, pages and scratch need room for them")
    exact_table = cos.dtype == torch.float32
    if config is not None and not config.by_place and not exact_table:
        raise ValueError(f"composed rotations need a float32 table, got {cos.dtype}")
    if config is not None and config.keys > MAX_BLOCK_SIZE:
        raise ValueError(f"a tile has at most {MAX_BLOCK_SIZE} keys, got {config.keys}")

    group = num_heads // num_kv_heads
    tokens = tokens_together(batch.per_request, group, head_size)
    dtype = query.dtype if pages.is_fp8 else pages.kv.dtype
    words = pages.is_fp8 and dtype != torch.float32
    # Scratch for tokens with drafts knows splits of fewer teams than it has rows.
    teams = count_teams(batch.per_request, batch.per_request, group, head_size)
    most = min(scratch.max_rows // batch.per_request, scratch.splits.max_rows // teams)
    max_rows = most * batch.per_request
    for begin in range(0, len(batch.rows), max_rows):
        some = batch.part(begin, begin + max_rows)
        num_teams = count_teams(len(some.rows), batch.per_request, group, head_size)
        chosen = config or launch_config(
            num_teams,
            num_kv_heads,
            head_size,
            scratch.max_places,
            # FP8 that is multiplied as float32 takes the room of float32.
            4 if dtype == torch.float32 else pages.kv.element_size(),
            exact_table,
            num_queries=group * tokens,
        )
        splits = scratch.splits
        if config is not None:
            choice = config.splits, config.min_keys
            splits = splits_for_all(choice, num_teams, query.device)
        max_splits = splits.most[num_teams]
        if len(some.rows) * max_splits > scratch.partial.shape[1]:
            raise ValueError(
                f"{max_splits} splits of {len(some.rows)} rows: scratch has room for "
                f"{scratch.partial.shape[1]} splits"
            )
        launch(
            split_kernel,
            (num_kv_heads, num_teams, max_splits),
            output,
            scratch.partial,
            scratch.lse,
            scratch.logits,
            query,
            pages.kv,
            pages.key_scale,
            pages.value_scale,
            cos,
            sin,
            some.rows,
            some.places,
            some.block_table,
            splits.table,
            scale * LOG2_E,
            cos.shape[0],
            output.stride(0),
            output.stride(1),
            query.stride(0),
            query.stride(1),
            pages.kv.stride(0),
            *pages.scale_strides,
            some.block_table.stride(0),
            scratch.logits.stride(1),
            max_splits,
            GROUP=group,
            HEAD_SIZE=head_size,
            HALF=half,
            BLOCK_SIZE=block_size,
            QUERIES=next_power_of_2(group * tokens),
            HEADS=max(MIN_COLUMNS, next_power_of_2(group * tokens)),
            KEYS=chosen.keys,
            PAIRS=max(MIN_DOT, next_power_of_2(half)),
            REST=max(MIN_DOT, next_power_of_2(head_size - 2 * half)),
            CHANNELS=next_power_of_2(head_size),
            ROWS=next_power_of_2(splits.max_rows),
            PER_REQUEST=batch.per_request,
            TOKENS=tokens,
            IS_NEOX=is_neox,
            BY_PLACE=chosen.by_place,
            SOFT_CAP=soft_cap,
            SCORED=scored,
            DIRECT=is_direct(scored, sinks),
            WORDS=words,
            KEY_WORDS=words and is_neox and has_words(half) and not chosen.by_place,
            COMPILED=isinstance(split_kernel, triton.JITFunction),
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            maxnreg=chosen.max_registers,
        )
        combine(
            output, pages, some, power, reduction, splits, scratch, scored, counter, sinks, chosen
        )
