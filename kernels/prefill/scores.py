"""Exact scores per key: a second pass over the workspace with the log-sum-exps of attention.

Source: arXiv 2406.17808, which ranks tokens by an exponential moving average of the attention that
they get. Here a probability may be raised to a power first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import cdiv, launch, next_power_of_2
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import LOG2_E, cap_logits
from vllm_cascade.kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """How `score_keys` is cut and launched.

    A program looks at its keys in steps: at each step it loads some queries, with all query heads
    of the KV head.

    Args:
        block_k: Keys of a program.
        columns: Queries of a step times query heads of a KV head (rounded up to a power of two); a
            power of two.
        num_warps: Warps of a program.
        num_stages: Steps whose queries are in flight.
        key_in_registers: Whether keys stay in registers; else each step reads shared memory.
        max_registers: Bound on registers per thread, or None.
    """

    block_k: int
    columns: int
    num_warps: int
    num_stages: int
    key_in_registers: bool = True
    max_registers: int | None = None


# By name, for benchmarks.
SCORE_CONFIGS = {"k128_c64_w8": ScoreConfig(128, 64, 8, 4, max_registers=128)}
# Most `columns` of a configuration, where a KV head has no more query heads than that.
MAX_COLUMNS = 128


def launch_config(dtype: torch.dtype, head_size: int, group: int) -> ScoreConfig:
    """Choose how `score_keys` is launched.

    Args:
        dtype: The dtype of queries and keys.
        head_size: Channels of a key.
        group: Query heads per KV head.

    Returns:
        The tiles that suit a Hopper GPU, with at most `MAX_COLUMNS` columns.
    """
    heads = next_power_of_2(group)
    if head_size > 256:
        # Keys would not fit registers, and a longer pipeline not shared memory.
        tiles = (32, max(32, heads), 8, 1) if dtype == torch.float32 else (64, 64, 4, 2)
        return ScoreConfig(*tiles, key_in_registers=False)
    if dtype == torch.float32:
        return ScoreConfig(32, max(32, heads), 4, 1, key_in_registers=False)
    if head_size > 128:
        return ScoreConfig(128, 64, 8, 3)
    if heads > 8:
        # With fewer than eight queries a step, several threads would hold the heads of a query.
        return ScoreConfig(128, MAX_COLUMNS, 8, 3)
    # A sum is kept for each query of a step: the fewer heads, the more registers the sums take.
    return ScoreConfig(128, 64, 8, 4) if heads == 1 else SCORE_CONFIGS["k128_c64_w8"]


@triton.jit(
    do_not_specialize=["lse_stride", "num_slots"],
    do_not_specialize_on_alignment=["query_spans_ptr", "exponents_ptr"],
)
def _shifts_kernel(
    shift_ptr,
    lse_ptr,
    query_spans_ptr,
    exponents_ptr,
    lse_factor,
    log2_decay,
    offset,
    lse_stride,
    num_slots,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Store the shift of each query: exp2(logit - shift) is a weighted, raised probability.

    Grid: (steps of the longest segment, segments, KV heads). A program writes the HEADS * BLOCK_Q
    columns of one step, in the order in which `_gain` reads them; a shift is infinite where there
    is no query or head.

    Args:
        shift_ptr: [KV heads, num_slots, HEADS * BLOCK_Q] float32, written.
        lse_ptr: [query heads, queries] float32 natural log-sum-exps.
        query_spans_ptr: `Segments.query_spans`.
        exponents_ptr: `Segments.exponents`.
        lse_factor: The score's power, times log2(e).
        log2_decay: Base-2 logarithm of the decay per query.
        offset: Base-2 logarithm of what a gain is divided by: the heads of a mean, or 1.
        lse_stride: Elements between two heads of `lse_ptr`.
        num_slots: Slots of a KV head. Step t of segment s takes the slot
            ``first query // BLOCK_Q + s + t``, so that segments do not share slots.
        GROUP: Query heads that share a KV head.
        HEADS: GROUP rounded up to a power of two.
        BLOCK_Q: Queries of a step.
    """
    tile = tl.program_id(0)
    segment = tl.program_id(1)
    kv_head = tl.program_id(2)
    start = tl.load(query_spans_ptr + 2 * segment)
    query_len = tl.load(query_spans_ptr + 2 * segment + 1) - start
    if tile * BLOCK_Q >= query_len:
        return
    exponent = tl.load(exponents_ptr + segment)
    # [HEADS * BLOCK_Q]
    column = tl.arange(0, HEADS * BLOCK_Q)
    head = column // BLOCK_Q
    query = tile * BLOCK_Q + column % BLOCK_Q
    valid = (head < GROUP) & (query < query_len)
    lse = tl.load(
        lse_ptr + (kv_head * GROUP + head).to(tl.int64) * lse_stride + start + query,
        mask=valid,
        other=0.0,
    )
    shift = lse * lse_factor - (exponent - query) * log2_decay + offset
    slot = kv_head.to(tl.int64) * num_slots + start // BLOCK_Q + segment + tile
    shift = tl.where(valid, shift, float("inf"))
    tl.store(shift_ptr + slot * (HEADS * BLOCK_Q) + column, shift)


@triton.jit
def _gain(
    acc,
    key,
    query_ptr,
    shift_ptr,
    begin,
    end,
    first_query,
    last_query,
    kv_head,
    place,
    prefix,
    factor,
    query_stride_token,
    query_stride_head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the queries of the steps from `begin` up to `end` give the keys.

    Args:
        acc: [BLOCK_K, BLOCK_Q] float32 gains of each key, by the query's position in its step.
        key: [BLOCK_K, BLOCK_D] rotated keys.
        shift_ptr: Shifts of the segment's first step; from `_shifts_kernel`.
        first_query: Row of the segment's first query.
        last_query: Row of the segment's last query.
        place: [BLOCK_K] logical places of the keys.
        prefix: Logical place of the segment's first query.
        factor: Factor on a dot product that gives the base-2 logarithm of a raised exponential.
        MEAN: Whether the gain is the mean over query heads, else the maximum.
        MASKED: Whether some query does not see some key, or a step has too few queries.

    Returns:
        `acc`, with the gains.
    """
    # [HEADS * BLOCK_Q] head and query of each column. One head's queries lie side by side: then a
    # thread holds all heads of a query and a key, and reduces over them without a shuffle.
    column = tl.arange(0, HEADS * BLOCK_Q)
    # There may be fewer heads than columns for them; those columns count for nothing.
    head = kv_head * GROUP + tl.minimum(column // BLOCK_Q, GROUP - 1)
    channel = tl.arange(0, BLOCK_D)
    for step in tl.range(begin, end):
        # [HEADS * BLOCK_Q, BLOCK_D]. Past the end the last query is loaded again: such columns
        # count for nothing, but stay finite.
        row = tl.minimum(first_query + step * BLOCK_Q + column % BLOCK_Q, last_query)
        lines = query_ptr + row.to(tl.int64) * query_stride_token + head * query_stride_head
        if HEAD_SIZE == BLOCK_D:
            query = tl.load(lines[:, None] + channel[None, :])
        else:
            inside = (channel < HEAD_SIZE)[None, :]
            query = tl.load(lines[:, None] + channel[None, :], mask=inside, other=0.0)
        shift = tl.load(shift_ptr + step * (HEADS * BLOCK_Q) + column)
        # [BLOCK_K, HEADS * BLOCK_Q]
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * factor
        if SOFT_CAP > 0:
            logit = cap_logits(logit, SOFT_CAP)
        logit = tl.reshape(logit - shift[None, :], (BLOCK_K, HEADS, BLOCK_Q))
        # [BLOCK_K, BLOCK_Q]
        given = tl.sum(tl.exp2(logit), axis=1) if MEAN else tl.exp2(tl.max(logit, axis=1))
        if MASKED:
            query_place = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
            seen = place[:, None] <= (prefix + query_place)[None, :]
            seen = seen & (first_query + query_place <= last_query)[None, :]
            given = tl.where(seen, given, 0.0)
        acc += given
    return acc


@triton.jit(
    do_not_specialize=["num_slots"],
    do_not_specialize_on_alignment=[
        "query_spans_ptr",
        "key_spans_ptr",
        "block_table_ptr",
        "carry_ptr",
    ],
)
def _score_keys_kernel(
    score_ptr,
    query_ptr,
    key_ptr,
    shift_ptr,
    query_spans_ptr,
    key_spans_ptr,
    block_table_ptr,
    carry_ptr,
    counter_ptr,
    factor,
    score_stride_block,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    table_stride,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KEY_IN_REGISTERS: tl.constexpr,
):
    """Add to the scores of a tile of keys what the queries of their segment give them.

    Grid: (KV heads times segments, tiles of the longest segment's keys). A program updates the
    scores of BLOCK_K keys of one KV head in the pages; one past its segment's end returns.

    Args:
        score_ptr: `Pages.score`, whose blocks lie `score_stride_block` elements apart.
        query_ptr: [queries, query heads, HEAD_SIZE], rotated and packed.
        key_ptr: [workspace rows, KV heads, HEAD_SIZE], rotated.
        shift_ptr: [KV heads, num_slots, HEADS * BLOCK_Q] float32 from `_shifts_kernel`.
        query_spans_ptr: `Segments.query_spans`; the next three pointers are fields likewise.
        counter_ptr: [1] int64 that gains the pairs of a query and a key it sees, or None.
        factor: Factor on a dot product that gives the base-2 logarithm of a raised exponential.
        GROUP: Query heads that share a KV head.
        HEADS: GROUP rounded up to a power of two.
        BLOCK_K: Keys of a program.
        BLOCK_Q: Queries of a step.
        BLOCK_D: HEAD_SIZE rounded up to a power of two, at least 16.
        MEAN: Whether the gain is the mean over query heads, else the maximum.
        SOFT_CAP: Soft cap on logits, times the score's power; or 0 for none.
        KEY_IN_REGISTERS: `ScoreConfig.key_in_registers`.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    segment = tl.program_id(0) // NUM_KV_HEADS
    # The most queries see early keys: these go first, so that the last programs are short.
    first_place = tl.program_id(1) * BLOCK_K
    key_start = tl.load(key_spans_ptr + 2 * segment)
    key_len = tl.load(key_spans_ptr + 2 * segment + 1) - key_start
    if first_place >= key_len:
        return
    query_start = tl.load(query_spans_ptr + 2 * segment)
    query_len = tl.load(query_spans_ptr + 2 * segment + 1) - query_start
    prefix = key_len - query_len

    # [BLOCK_K, BLOCK_D]. Past the end the last key is loaded again; the store below masks it there.
    place = first_place + tl.arange(0, BLOCK_K)
    row = (key_start + tl.minimum(place, key_len - 1)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    inside = (channel < HEAD_SIZE)[None, :]
    key = tl.load(
        key_ptr + kv_head * key_stride_head + row[:, None] * key_stride_token + channel[None, :],
        mask=inside,
        other=0.0,
    )
    if KEY_IN_REGISTERS:
        # Passed through an accumulator, the keys have a layout from which they become an operand
        # without leaving their registers. Otherwise each step would read them from shared memory.
        left = tl.zeros([BLOCK_K, 16], key.dtype)
        right = tl.zeros([16, BLOCK_D], key.dtype)
        key = tl.dot(left, right, acc=key.to(tl.float32)).to(key.dtype)

    # Steps of BLOCK_Q queries. Step `begin` is the first with a query that sees the program's first
    # key; from step `clear` on every query sees the program's last key.
    steps = tl.cdiv(query_len, BLOCK_Q)
    begin = tl.maximum(first_place - prefix, 0) // BLOCK_Q
    clear = tl.cdiv(tl.maximum(first_place + BLOCK_K - 1 - prefix, 0), BLOCK_Q)
    clear = tl.minimum(clear, steps)
    shift_ptr += (kv_head.to(tl.int64) * num_slots + query_start // BLOCK_Q + segment) * (
        HEADS * BLOCK_Q
    )
    acc = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    last_query = query_start + query_len - 1
    acc = _gain(
        acc, key, query_ptr, shift_ptr, begin, clear, query_start, last_query, kv_head, place,
        prefix, factor, query_stride_token, query_stride_head,
        GROUP, HEADS, HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_D, MEAN, SOFT_CAP, True,
    )  # fmt: skip
    acc = _gain(
        acc, key, query_ptr, shift_ptr, clear, steps, query_start, last_query, kv_head, place,
        prefix, factor, query_stride_token, query_stride_head,
        GROUP, HEADS, HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_D, MEAN, SOFT_CAP, False,
    )  # fmt: skip
    # [BLOCK_K]
    gained = tl.sum(acc, axis=1)

    valid = place < key_len
    table_ptr = block_table_ptr + segment.to(tl.int64) * table_stride
    block = tl.load(table_ptr + place // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    slot_ptr = score_ptr + block * score_stride_block + kv_head * BLOCK_SIZE + place % BLOCK_SIZE
    old = tl.load(slot_ptr, mask=place < prefix, other=0.0)
    tl.store(slot_ptr, old * tl.load(carry_ptr + segment) + gained, mask=valid)
    if counter_ptr is not None:
        pairs = tl.where(valid, query_len - tl.maximum(place - prefix, 0), 0)
        tl.atomic_add(counter_ptr, tl.sum(pairs.to(tl.int64)))


def shifts_elements(num_queries: int, num_segments: int, num_heads: int, num_kv_heads: int) -> int:
    """Count the elements that `score_keys` needs of `shifts`, whatever `launch_config` chooses.

    Args:
        num_queries: Most queries of a wave.
        num_segments: Most segments of a wave.
        num_heads: Query heads.
        num_kv_heads: KV heads.

    Returns:
        Number of float32 elements.
    """
    heads = num_kv_heads * next_power_of_2(num_heads // num_kv_heads)
    return heads * num_queries + num_kv_heads * num_segments * MAX_COLUMNS


def score_keys(
    pages: Pages,
    segments: Segments,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    decay: float,
    power: float,
    reduction: str,
    counter: torch.Tensor | None,
    soft_cap: float = 0.0,
    shifts: torch.Tensor | None = None,
    config: ScoreConfig | str | None = None,
) -> None:
    """Add to every key's score what the queries of the key's segment give the key.

    With ``p[h, i, j] = exp(scale * q[h, i] . k[j] - lse[h, i])``, query i gives a key j that it
    sees ``decay ** (exponent - i)`` times the maximum (or mean) of ``p ** power`` over the query
    heads of the KV head. The sums go to the pages: ``score = score * carry + gained``. A key of the
    segment's own tokens had no score before: ``score = gained``.

    Args:
        pages: The layer's pages; `score`, dense within a block, is updated.
        segments: Where queries and keys start, and the blocks that hold the scores.
        query: [>= num_queries, num_heads, head_size], rotated and packed, channels dense.
        key: [>= num_rows, num_kv_heads, head_size] in the dtype of `query`, rotated, channels
            dense.
        lse: [num_heads, >= num_queries] float32 natural log of each query's summed exponentials,
            queries dense.
        scale: Factor on the logits.
        decay: Base of the queries' weights, positive.
        power: Exponent on the probability, positive.
        reduction: "max" or "mean" over the query heads of a KV head.
        counter: [1] int64 or None; gains the pairs of a query and a key it sees, once per KV head.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 for no cap.
        shifts: [>= shifts_elements(...)] float32 scratch, dense; None allocates it.
        config: How to launch, or a name in `SCORE_CONFIGS`; None for `launch_config`'s choice.

    Raises:
        ValueError: If `reduction` is unknown, pages have no scores, or a shape, stride or dtype
            does not fit.
    """
    if reduction not in ("max", "mean"):
        raise ValueError(f"reduction is 'max' or 'mean', got {reduction!r}")
    if pages.score is None:
        raise ValueError("to keep scores, pages need room for them")
    _, num_heads, head_size = query.shape
    num_kv_heads, block_size = pages.score.shape[1:]
    num_segments = len(segments.carry)
    if num_segments == 0 or segments.num_queries == 0:
        return
    if key.shape[1:] != (num_kv_heads, head_size) or key.dtype != query.dtype:
        raise ValueError(
            f"key must be [num_rows, {num_kv_heads}, {head_size}] of {query.dtype}, "
            f"got {list(key.shape)} of {key.dtype}"
        )
    if lse.shape[0] != num_heads or lse.dtype != torch.float32 or lse.stride(1) != 1:
        raise ValueError(
            f"lse must be float32 with {num_heads} dense rows, got {lse.dtype} of "
            f"{list(lse.shape)} with strides {lse.stride()}"
        )
    if not query.stride(2) == key.stride(2) == 1:
        raise ValueError("the channels of query and key must be dense")
    if pages.score.stride()[1:] != (block_size, 1):
        raise ValueError(f"scores must be dense in a block, got strides {pages.score.stride()}")
    group = num_heads // num_kv_heads
    heads = next_power_of_2(group)
    if config is None:
        config = launch_config(query.dtype, head_size, group)
    elif isinstance(config, str):
        config = SCORE_CONFIGS[config]
    block_q = config.columns // heads
    block_d = max(16, next_power_of_2(head_size))
    num_slots = segments.num_queries // block_q + num_segments
    elements = num_kv_heads * num_slots * config.columns
    if shifts is None:
        shifts = torch.empty(elements, dtype=torch.float32, device=query.device)
    if shifts.numel() < elements or not shifts.is_contiguous():
        raise ValueError(
            f"shifts must be {elements} dense elements or more, got {list(shifts.shape)} with "
            f"strides {shifts.stride()}"
        )

    grid = (cdiv(segments.max_query_len, block_q), num_segments, num_kv_heads)
    launch(
        _shifts_kernel,
        grid,
        shifts,
        lse,
        segments.query_spans,
        segments.exponents,
        power * LOG2_E,
        math.log2(decay),
        math.log2(group) if reduction == "mean" else 0.0,
        lse.stride(0),
        num_slots,
        GROUP=group,
        HEADS=heads,
        BLOCK_Q=block_q,
        num_warps=1,
    )
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    grid = (num_kv_heads * num_segments, cdiv(segments.max_key_len, config.block_k))
    launch(
        _score_keys_kernel,
        grid,
        pages.score,
        query,
        key,
        shifts,
        segments.query_spans,
        segments.key_spans,
        segments.block_table,
        segments.carry,
        counter,
        scale * power * LOG2_E,
        pages.score.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        segments.block_table.stride(0),
        num_slots,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEADS=heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        BLOCK_K=config.block_k,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        MEAN=reduction == "mean",
        # The kernel's logits are multiplied by the power, and so is their cap.
        SOFT_CAP=soft_cap * power,
        KEY_IN_REGISTERS=config.key_in_registers,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
