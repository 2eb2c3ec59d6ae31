"""One query of each of several requests attends to its paged keys and scores them, exactly.

Two launches. The first splits each row's keys over programs, which leave a normalised partial
output, its log-sum-exp and, where scores are kept, every logit. The second joins the splits and
turns the logits into scores with the log-sum-exp of all keys. How many programs there are depends
on the number of rows and on the bound of the scratch, never on lengths, so both can be captured in
a CUDA graph; programs beyond a row's length return at once.

Keys lie in the pages before RoPE. Turning a key at place ``base + o`` by its whole angle takes a
row of the rotary table per key, as much traffic as the keys themselves. As rotations compose,
``<R(place) q, R(base + o) k> = <R(place - base) q, R(o) k>``: a tile of keys is turned by the
angles of its first places, which stay in registers, and the few queries by the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.primitives import LOG2_E
from vllm_cascade.kernels.segments import DecodeRows

# What tl.dot asks of every dimension.
MIN_DOT = 16
# Rows of logits end on a whole block, and on a whole tile, of any size up to this.
MAX_BLOCK_SIZE = 128


@triton.jit
def _split_keys(length, num_splits, MIN_KEYS: tl.constexpr, KEYS: tl.constexpr):
    """Keys per split of a row: even, whole tiles, and no fewer than pay for a program."""
    active = tl.maximum(tl.minimum(tl.cdiv(length, MIN_KEYS), num_splits), 1)
    return tl.cdiv(tl.cdiv(length, active), KEYS) * KEYS


@triton.jit
def _join(lse_ptr, active, SPLITS: tl.constexpr):
    """Log-sum-exp (base 2) of a query head over its splits, and each split's share of it."""
    split = tl.arange(0, SPLITS)
    lse = tl.load(lse_ptr + split, mask=split < active, other=float("-inf"))
    top = tl.max(lse, axis=0)
    total = top + tl.log2(tl.sum(tl.exp2(lse - top), axis=0))
    return total, tl.exp2(lse - total)


@triton.jit
def _split_kernel(
    partial_ptr,
    lse_ptr,
    logits_ptr,
    query_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    places_ptr,
    block_table_ptr,
    scale_log2,
    num_positions,
    query_stride_token,
    query_stride_head,
    kv_stride_block,
    table_stride_row,
    logits_stride_head,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    CHANNELS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BY_PLACE: tl.constexpr,
    SCORED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    # Splits last: all rows' first splits start before any that may be empty.
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    place = tl.load(places_ptr + row)
    length = place + 1
    split_keys = _split_keys(length, tl.num_programs(2), MIN_KEYS, KEYS)
    start = split * split_keys
    if start >= length:
        return
    stop = tl.minimum(start + split_keys, length)

    offset = tl.arange(0, KEYS)
    pair = tl.arange(0, PAIRS)
    channel = tl.arange(0, CHANNELS)
    group = tl.arange(0, HEADS)
    # Channels of a pair.
    first = pair if IS_NEOX else 2 * pair
    second = pair + HALF if IS_NEOX else 2 * pair + 1
    turned = pair < HALF

    token = tl.load(rows_ptr + row).to(tl.int64)
    # [HEADS, 1]
    query_at = query_ptr + token * query_stride_token
    query_at += ((kv_head * GROUP + group) * query_stride_head)[:, None]
    in_group = (group < GROUP)[:, None]
    # [HEADS, PAIRS]
    asked = in_group & turned[None, :]
    query_first = tl.load(query_at + first[None, :], mask=asked, other=0.0).to(tl.float32)
    query_second = tl.load(query_at + second[None, :], mask=asked, other=0.0).to(tl.float32)
    dtype = kv_ptr.dtype.element_ty
    if HEAD_SIZE > 2 * HALF:
        # [HEADS, REST] the channels that RoPE leaves alone
        rest = 2 * HALF + tl.arange(0, REST)
        is_rest = rest < HEAD_SIZE
        query_rest = tl.load(query_at + rest[None, :], mask=in_group & is_rest[None, :], other=0.0)
        query_rest = query_rest.to(dtype)

    if BY_PLACE:
        cos = tl.load(cos_ptr + place * HALF + pair, mask=turned, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + place * HALF + pair, mask=turned, other=0.0).to(tl.float32)[None, :]
        asked_first = (query_first * cos - query_second * sin).to(dtype)
        asked_second = (query_second * cos + query_first * sin).to(dtype)
    else:
        # [PAIRS, KEYS]
        table_at = offset[None, :] * HALF + pair[:, None]
        within = (offset < num_positions)[None, :] & turned[:, None]
        key_cos = tl.load(cos_ptr + table_at, mask=within, other=0.0).to(tl.float32)
        key_sin = tl.load(sin_ptr + table_at, mask=within, other=0.0).to(tl.float32)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    # Summed over keys at the end: a sum per tile would be an exchange between warps.
    norms = tl.zeros([HEADS, KEYS], tl.float32)
    acc = tl.zeros([HEADS, CHANNELS], tl.float32)
    table_at_row = block_table_ptr + row * table_stride_row
    logits_at = logits_ptr + (row * tl.num_programs(0) + kv_head) * GROUP * logits_stride_head
    logits_at += (group * logits_stride_head)[:, None]

    # Block ids are carried from tile to tile: were they loaded where they are used, the compiler
    # would copy them asynchronously, and to wait for them is to wait for all keys on their way.
    TILE_BLOCKS: tl.constexpr = (KEYS + BLOCK_SIZE - 1) // BLOCK_SIZE
    tile_block = tl.arange(0, TILE_BLOCKS)
    begin = start + tile_block * BLOCK_SIZE
    blocks = tl.load(table_at_row + begin // BLOCK_SIZE, mask=begin < stop, other=0)
    for base in range(start, stop, KEYS):
        key_place = base + offset
        valid = key_place < stop
        block = tl.zeros([KEYS], tl.int32)
        for i in tl.static_range(TILE_BLOCKS):
            found = tl.sum(tl.where(tile_block == i, blocks, 0), axis=0)
            block = tl.where(offset // BLOCK_SIZE == i, found, block)
        begin = base + KEYS + tile_block * BLOCK_SIZE
        blocks = tl.load(table_at_row + begin // BLOCK_SIZE, mask=begin < stop, other=0)
        slot = kv_head * BLOCK_SIZE + key_place % BLOCK_SIZE
        # [KEYS]
        key_at = kv_ptr + block.to(tl.int64) * kv_stride_block + slot * (2 * HEAD_SIZE)
        # [PAIRS, KEYS]
        held = valid[None, :]
        if PAIRS != HALF:
            held = held & turned[:, None]
        key_first = tl.load(key_at[None, :] + first[:, None], mask=held, other=0.0)
        key_second = tl.load(key_at[None, :] + second[:, None], mask=held, other=0.0)
        key_first = key_first.to(tl.float32)
        key_second = key_second.to(tl.float32)
        if BY_PLACE:
            angle_at = key_place[None, :] * HALF + pair[:, None]
            key_cos = tl.load(cos_ptr + angle_at, mask=held, other=0.0).to(tl.float32)
            key_sin = tl.load(sin_ptr + angle_at, mask=held, other=0.0).to(tl.float32)
        else:
            angle_at = (place - base) * HALF + pair
            cos = tl.load(cos_ptr + angle_at, mask=turned, other=0.0).to(tl.float32)[None, :]
            sin = tl.load(sin_ptr + angle_at, mask=turned, other=0.0).to(tl.float32)[None, :]
            asked_first = (query_first * cos - query_second * sin).to(dtype)
            asked_second = (query_second * cos + query_first * sin).to(dtype)
        turned_first = (key_first * key_cos - key_second * key_sin).to(dtype)
        turned_second = (key_second * key_cos + key_first * key_sin).to(dtype)
        # [HEADS, KEYS]
        logits = tl.dot(asked_first, turned_first, input_precision=PRECISION)
        logits = tl.dot(asked_second, turned_second, logits, input_precision=PRECISION)
        if HEAD_SIZE > 2 * HALF:
            held = valid[None, :] & is_rest[:, None]
            key_rest = tl.load(key_at[None, :] + rest[:, None], mask=held, other=0.0)
            logits = tl.dot(query_rest, key_rest, logits, input_precision=PRECISION)
        logits *= scale_log2
        if SCORED:
            # Past the end too, in wide words: rows of logits have room for whole tiles.
            tl.store(logits_at + key_place[None, :], logits, mask=in_group)
        logits = tl.where(valid[None, :], logits, float("-inf"))

        new_top = tl.maximum(top, tl.max(logits, axis=1))
        faded = tl.exp2(top - new_top)
        probs = tl.exp2(logits - new_top[:, None])
        norms = norms * faded[:, None] + probs
        # [KEYS, CHANNELS]
        held = valid[:, None]
        if CHANNELS != HEAD_SIZE:
            held = held & (channel < HEAD_SIZE)[None, :]
        value_at = key_at[:, None] + (HEAD_SIZE + channel)[None, :]
        value = tl.load(value_at, mask=held, other=0.0)
        acc = acc * faded[:, None]
        acc = tl.dot(probs.to(dtype), value, acc, input_precision=PRECISION)
        top = new_top

    norm = tl.sum(norms, axis=1)
    split_at = (row * tl.num_programs(0) + kv_head) * GROUP * max_splits + split
    split_at += group * max_splits
    tl.store(lse_ptr + split_at, top + tl.log2(norm), mask=group < GROUP)
    # [HEADS, CHANNELS]
    partial_at = partial_ptr + split_at[:, None] * HEAD_SIZE + channel[None, :]
    tl.store(partial_at, acc / norm[:, None], mask=in_group & (channel < HEAD_SIZE)[None, :])


@triton.jit
def _combine_kernel(
    output_ptr,
    score_ptr,
    counter_ptr,
    partial_ptr,
    lse_ptr,
    logits_ptr,
    rows_ptr,
    places_ptr,
    block_table_ptr,
    carry_ptr,
    weights_ptr,
    power,
    num_splits,
    output_stride_token,
    output_stride_head,
    score_stride_block,
    table_stride_row,
    logits_stride_head,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCORED: tl.constexpr,
    MEAN: tl.constexpr,
    COUNTED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    place = tl.load(places_ptr + row)
    if place < 0:
        return
    length = place + 1
    active = tl.cdiv(length, _split_keys(length, num_splits, MIN_KEYS, KEYS))
    head = (row * tl.num_programs(0) + kv_head) * GROUP

    if piece < GROUP:
        # [SPLITS]
        split_at = (head + piece) * max_splits
        _, share = _join(lse_ptr + split_at, active, SPLITS)
        split = tl.arange(0, SPLITS)
        channel = tl.arange(0, CHANNELS)
        # [SPLITS, CHANNELS]
        held = (split < active)[:, None] & (channel < HEAD_SIZE)[None, :]
        partial_at = partial_ptr + (split_at + split)[:, None] * HEAD_SIZE + channel[None, :]
        partial = tl.load(partial_at, mask=held, other=0.0)
        output = tl.sum(partial * share[:, None], axis=0)
        output_at = output_ptr + tl.load(rows_ptr + row).to(tl.int64) * output_stride_token
        output_at += (kv_head * GROUP + piece) * output_stride_head + channel
        tl.store(output_at, output.to(output_ptr.dtype.element_ty), mask=channel < HEAD_SIZE)

    if COUNTED:
        tl.atomic_add(counter_ptr, length.to(tl.int64), mask=piece == 0)

    if SCORED:
        carry = tl.load(carry_ptr + row)
        weight = tl.load(weights_ptr + row)
        TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
        piece_keys = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), TILE) * TILE
        start = piece * piece_keys
        for base in range(start, tl.minimum(start + piece_keys, length), TILE):
            first = base + tl.arange(0, BLOCKS) * BLOCK_SIZE
            slot = tl.arange(0, BLOCK_SIZE)
            # [BLOCKS, BLOCK_SIZE]
            key_place = first[:, None] + slot[None, :]
            # Whole blocks are loaded and stored, in wide words; what lies past the end keeps its
            # bits.
            held = (first < length)[:, None]
            logits_at = logits_ptr + head * logits_stride_head + key_place
            best = tl.full([BLOCKS, BLOCK_SIZE], float("-inf"), tl.float32)
            total = tl.zeros([BLOCKS, BLOCK_SIZE], tl.float32)
            for member in tl.static_range(GROUP):
                norm, _ = _join(lse_ptr + (head + member) * max_splits, active, SPLITS)
                logit = tl.load(logits_at + member * logits_stride_head, mask=held, other=0.0)
                if MEAN:
                    total += tl.exp2((logit - norm) * power)
                else:
                    best = tl.maximum(best, logit - norm, propagate_nan=tl.PropagateNan.ALL)
            gained = total / GROUP if MEAN else tl.exp2(best * power)
            table_at = block_table_ptr + row * table_stride_row + first // BLOCK_SIZE
            block = tl.load(table_at, mask=first < length, other=0).to(tl.int64)
            score_at = score_ptr + (block * score_stride_block + kv_head * BLOCK_SIZE)[:, None]
            score_at += slot[None, :]
            score = tl.load(score_at, mask=held, other=0.0)
            # The query's own key has no score yet: whatever its slot holds is dropped.
            kept = tl.where(key_place < place, score * carry, 0.0)
            score = tl.where(key_place < length, kept + gained * weight, score)
            tl.store(score_at, score, mask=held)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Intermediate results of `decode`, shared by all layers.

    Args:
        partial: [max_rows, num_heads, max_splits, head_size] float32 partial outputs.
        lse: [max_rows, num_heads, max_splits] float32 log-sum-exps, base 2.
        logits: [max_rows, num_heads, max_places] float32 scaled logits, base 2; `max_places` is
            rounded up.
        max_places: Most keys of a row.
    """

    partial: torch.Tensor
    lse: torch.Tensor
    logits: torch.Tensor
    max_places: int


def make_scratch(
    max_rows: int,
    num_heads: int,
    head_size: int,
    max_places: int,
    max_splits: int,
    device: torch.device,
    scored: bool = True,
) -> Scratch:
    """Allocate all that `decode` needs beside its arguments.

    Args:
        max_rows: Rows per launch; more are processed in turn.
        num_heads: Query heads.
        head_size: Channels of a head.
        max_places: Most keys of a row.
        max_splits: Most splits of a row.
        device: Where.
        scored: Whether any call keeps scores; else there is no room for logits.

    Returns:
        Uninitialised tensors.
    """
    padded = triton.cdiv(max_places, MAX_BLOCK_SIZE) * MAX_BLOCK_SIZE if scored else 0
    kinds = {"dtype": torch.float32, "device": device}
    return Scratch(
        partial=torch.empty(max_rows, num_heads, max_splits, head_size, **kinds),
        lse=torch.empty(max_rows, num_heads, max_splits, **kinds),
        logits=torch.empty(max_rows, num_heads, padded, **kinds),
        max_places=max_places,
    )


@dataclass(frozen=True, slots=True)
class Config:
    """How `decode` is launched.

    Args:
        keys: Keys of a tile.
        splits: Programs per row and KV head.
        min_keys: Fewest keys worth a program.
        by_place: Turn each key by the angles of its own place instead of composing rotations.
        num_warps: Warps of a split program.
        num_stages: Depth of its loads.
        max_registers: Registers of its threads, or None for as many as it wants. Composed rotations
            keep a table in registers: bounds that were tried made it spill.
        score_tile: Keys of a tile of the second launch.
        score_pieces: Programs per row and KV head of the second launch, where scores are kept.
        score_warps: Warps of such a program.
    """

    keys: int
    splits: int
    min_keys: int
    by_place: bool
    num_warps: int
    num_stages: int
    max_registers: int | None
    score_tile: int
    score_pieces: int
    score_warps: int


def launch_config(
    num_rows: int,
    num_kv_heads: int,
    head_size: int,
    max_places: int,
    element_size: int,
    exact_table: bool,
) -> Config:
    """Choose the launch from shapes alone.

    Args:
        num_rows: Rows of one launch.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        max_places: Most keys of a row.
        element_size: Bytes of an element of the pages.
        exact_table: Whether the rotary table is float32, so that rotations compose.

    Returns:
        Tile sizes and numbers of programs.
    """
    # Many more programs than an H200 runs at a time (about 400), or the last ones leave it idle.
    # With many rows short ones are not split at all, with few even a short split pays.
    programs = num_rows * num_kv_heads
    min_keys = 2048 if programs >= 512 else 512 if programs >= 64 else 256
    most = max(1, min(64, max_places // min_keys))
    splits = min(most, triton.next_power_of_2(triton.cdiv(4096, programs)))
    return Config(
        keys=32,
        splits=splits,
        min_keys=min_keys,
        by_place=not exact_table,
        # Two warps hold the offset table of a tile and its keys without spilling.
        num_warps=2 if element_size == 2 and head_size <= 128 else 4,
        num_stages=3 if element_size == 2 else 2,
        max_registers=None,
        score_tile=512,
        score_pieces=max(1, min(64, triton.cdiv(max_places, 2048))),
        score_warps=4,
    )


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
    config: Config | None = None,
) -> None:
    """Attend one query of each row to all it holds, and score the keys.

    Args:
        output: [num_tokens, num_heads, head_size]; the batch's rows are written.
        query: [num_tokens, num_heads, head_size] before RoPE, channels dense.
        pages: The layer's pages, the queries' own keys and values already written.
        batch: Which rows and blocks. Rows at place -1 are neither read nor written.
        cos: [num_positions, rotary_dim / 2]. In float32 rotations compose; a table in the model's
            dtype is too coarse for that and is read at every key's place.
        sin: As `cos`.
        is_neox: Whether channel i pairs with i + rotary_dim / 2 (else 2i with 2i + 1).
        scale: Factor on the logits.
        power: Exponent on the probability in the score.
        reduction: "max" or "mean" over the query heads of a KV head.
        scratch: From `make_scratch`.
        scored: Whether to update the scores.
        counter: [1] int64, or None. Gains the number of keys of each row and KV head.
        config: The launch; by default `launch_config`'s.

    Raises:
        ValueError: If a shape, stride or dtype does not fit.
    """
    _, num_kv_heads, block_size, channels = pages.kv.shape
    _, num_heads, head_size = query.shape
    max_rows, _, max_splits, _ = scratch.partial.shape
    half = cos.shape[1]
    if channels != 2 * head_size or num_heads % num_kv_heads or 2 * half > head_size:
        raise ValueError(
            f"{num_heads} query heads of {head_size} channels, {2 * half} of them rotary, do not "
            f"fit pages of {list(pages.kv.shape)}"
        )
    if pages.kv.stride()[1:] != (block_size * channels, channels, 1):
        raise ValueError("pages must be dense within a block")
    if query.stride(2) != 1 or output.stride(2) != 1 or batch.block_table.stride(1) != 1:
        raise ValueError("the last dimension of query, output and block table must be dense")
    if not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError("the rotary table must be contiguous")
    if block_size > MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size is a power of two up to {MAX_BLOCK_SIZE}, got {block_size}")
    if reduction not in ("max", "mean"):
        raise ValueError(f"reduction is 'max' or 'mean', got {reduction!r}")
    if scratch.partial.shape[1] != num_heads or scratch.partial.shape[3] != head_size:
        raise ValueError(f"scratch is for {list(scratch.partial.shape)}")
    if scored and (pages.score is None or scratch.logits.shape[2] < scratch.max_places):
        raise ValueError("to keep scores, pages and scratch need room for them")
    exact_table = cos.dtype == torch.float32
    if config is not None and not config.by_place and not exact_table:
        raise ValueError(f"composed rotations need a float32 table, got {cos.dtype}")
    if config is not None and config.keys > MAX_BLOCK_SIZE:
        raise ValueError(f"a tile has at most {MAX_BLOCK_SIZE} keys, got {config.keys}")

    group = num_heads // num_kv_heads
    score = pages.score if scored and pages.score is not None else scratch.lse
    for begin in range(0, len(batch.rows), max_rows):
        some = slice(begin, begin + max_rows)
        rows, places, table = batch.rows[some], batch.places[some], batch.block_table[some]
        chosen = config or launch_config(
            len(rows),
            num_kv_heads,
            head_size,
            scratch.max_places,
            pages.kv.element_size(),
            exact_table,
        )
        splits = min(chosen.splits, max_splits)
        _split_kernel[(num_kv_heads, len(rows), splits)](
            scratch.partial,
            scratch.lse,
            scratch.logits,
            query,
            pages.kv,
            cos,
            sin,
            rows,
            places,
            table,
            scale * LOG2_E,
            cos.shape[0],
            query.stride(0),
            query.stride(1),
            pages.kv.stride(0),
            table.stride(0),
            scratch.logits.stride(1),
            max_splits,
            GROUP=group,
            HEAD_SIZE=head_size,
            HALF=half,
            BLOCK_SIZE=block_size,
            HEADS=max(MIN_DOT, triton.next_power_of_2(group)),
            KEYS=chosen.keys,
            PAIRS=max(MIN_DOT, triton.next_power_of_2(half)),
            REST=max(MIN_DOT, triton.next_power_of_2(head_size - 2 * half)),
            CHANNELS=triton.next_power_of_2(head_size),
            MIN_KEYS=chosen.min_keys,
            IS_NEOX=is_neox,
            BY_PLACE=chosen.by_place,
            SCORED=scored,
            PRECISION="ieee" if pages.kv.dtype == torch.float32 else "tf32",
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            maxnreg=chosen.max_registers,
        )
        pieces = max(group, chosen.score_pieces) if scored else group
        _combine_kernel[(num_kv_heads, len(rows), pieces)](
            output,
            score,
            counter if counter is not None else rows,
            scratch.partial,
            scratch.lse,
            scratch.logits,
            rows,
            places,
            table,
            batch.carry[some],
            batch.weights[some],
            float(power),
            splits,
            output.stride(0),
            output.stride(1),
            score.stride(0),
            table.stride(0),
            scratch.logits.stride(1),
            max_splits,
            GROUP=group,
            HEAD_SIZE=head_size,
            BLOCK_SIZE=block_size,
            KEYS=chosen.keys,
            MIN_KEYS=chosen.min_keys,
            SPLITS=triton.next_power_of_2(splits),
            CHANNELS=triton.next_power_of_2(head_size),
            BLOCKS=max(1, chosen.score_tile // block_size),
            SCORED=scored,
            MEAN=reduction == "mean",
            COUNTED=counter is not None,
            num_warps=chosen.score_warps if scored else 4,
        )
