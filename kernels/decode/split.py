"""First launch of paged decode: a program attends a few tokens to one split of their keys.

A token's drafts are further rows of its request. They hold the same keys, but for the drafts' own,
so a program attends several of them together and loads keys once. Scores are kept of single tokens
only.

Pages hold keys before RoPE. To turn a key at place ``base + o`` by its whole angle takes a row of
the rotary table per key, as much traffic as the keys themselves. But rotations compose:
``<R(place) q, R(base + o) k> = <R(place - base) q, R(o) k>``. So a tile of keys is turned by the
angles of places 0, 1, 2 and so on, which stay in registers, and the few queries by the rest.

Keys are the rows of the matrix products and query heads their columns, and so are the channels of
values: tensor cores take 16 rows by 8 columns, and a KV head has few query heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_cascade.kernels.decode.launch_config import first_of_team, keys_per_split, last_of_team
from vllm_cascade.kernels.primitives import cap_logits, load_scale, split_words

# The smallest dimension over which tl.dot sums, and the fewest columns that tensor cores take.
MIN_DOT = 16
MIN_COLUMNS = 8


@triton.jit
def _queries_of(
    row,
    number,
    rows_ptr,
    places_ptr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Find COUNT queries of a team: GROUP of its first row, GROUP of its second, and so on.

    Returns:
        [COUNT] of each query: which of the KV head's query heads, its row, the row's place or -1,
        its row in the batch, and whether there is such a query.
    """
    query = tl.arange(0, COUNT)
    is_row = (query // GROUP < TOKENS) & (number + query // GROUP < PER_REQUEST)
    query_row = row + query // GROUP
    place = tl.load(places_ptr + query_row, mask=is_row, other=-1)
    token = tl.load(rows_ptr + query_row, mask=place >= 0, other=0).to(tl.int64)
    return query % GROUP, query_row, place, token, place >= 0


@triton.jit
def _load(at, held, zero, MASKED: tl.constexpr):
    """Load a tile, `zero` where MASKED and not `held`. Without a mask the loop is shorter."""
    if MASKED:
        return tl.load(at, mask=held, other=zero)
    return tl.load(at)


@triton.jit
def _repeat(x, HEADS: tl.constexpr):
    """Repeat the rows of ``x`` until there are HEADS. So padding costs no arithmetic."""
    WIDTH: tl.constexpr = x.shape[1]
    if x.shape[0] == HEADS:
        return x
    TIMES: tl.constexpr = HEADS // x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :, :], [TIMES, x.shape[0], WIDTH]), [HEADS, WIDTH])


@triton.jit(do_not_specialize=["max_splits"])
def split_kernel(
    output_ptr,
    partial_ptr,
    lse_ptr,
    logits_ptr,
    query_ptr,
    kv_ptr,
    key_scale_ptr,
    value_scale_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    places_ptr,
    block_table_ptr,
    splits_ptr,
    scale_log2,
    num_positions,
    output_stride_token,
    output_stride_head,
    query_stride_token,
    query_stride_head,
    kv_stride_block,
    key_scale_stride,
    value_scale_stride,
    table_stride_row,
    logits_stride_head,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BY_PLACE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCORED: tl.constexpr,
    DIRECT: tl.constexpr,
    WORDS: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend the query heads of a KV head, of a row or of a team of rows, to one split of its keys.

    Grid: (KV heads, teams, splits). A program leaves partial outputs, their log-sum-exps and, if
    SCORED, the logits of its keys. A program whose split is past the team's end returns, as do all
    programs of a team whose rows are at place -1.

    Args:
        output_ptr: [tokens, query heads, HEAD_SIZE], written where DIRECT and there is one split.
        partial_ptr: [rows, query heads, max_splits, HEAD_SIZE] float32 normalised outputs, written.
        lse_ptr: [rows, query heads, max_splits] float32 log-sum-exps, base 2, written.
        logits_ptr: [rows, query heads, logits_stride_head] float32 scaled logits, base 2, written
            if SCORED.
        key_scale_ptr: `Pages.key_scale`, None where pages are not in FP8; the next pointer is
            `Pages.value_scale` likewise.
        rows_ptr: `DecodeRows.rows`; the next two pointers are fields likewise.
        splits_ptr: `Splits.table`.
        scale_log2: Factor on a dot product that gives a logit in units of log 2.
        num_positions: Rows of the rotary table.
        GROUP: Query heads that share a KV head.
        HALF: Pairs of channels that are rotated.
        QUERIES: Queries of a team, GROUP of each token, rounded up to a power of two.
        HEADS: QUERIES, or MIN_COLUMNS if there are fewer.
        KEYS: Keys of a tile.
        PAIRS: HALF rounded up to a power of two, at least MIN_DOT.
        REST: Channels that are not rotated, rounded up likewise.
        CHANNELS: HEAD_SIZE rounded up to a power of two.
        ROWS: Most teams of a launch, rounded up to a power of two.
        PER_REQUEST: `DecodeRows.per_request`.
        TOKENS: `tokens_together`.
        IS_NEOX: Whether channel i pairs with i + HALF (else 2i with 2i + 1).
        BY_PLACE: Whether each key is turned by the angles of its own place.
        SOFT_CAP: Soft cap on logits (`cap_logits`), or 0 for none.
        SCORED: Whether scores are kept.
        DIRECT: Whether to write the output of a row that has a single split.
        WORDS: Whether FP8 values are loaded as 16-bit words (`split_words`).
        KEY_WORDS: Whether keys are. Then channels i and i + HALF have to be pairs, HALF even.
        COMPILED: Whether the kernel is compiled, not interpreted.
        PRECISION: Input precision of tl.dot for float32.
    """
    kv_head = tl.program_id(0)
    # Splits are the last dimension: the first splits of all rows start before any empty split.
    team = tl.program_id(1)
    split = tl.program_id(2)
    row = first_of_team(team, PER_REQUEST, TOKENS).to(tl.int64)
    number = (row % PER_REQUEST).to(tl.int32)
    last_row, place = last_of_team(number, row, places_ptr, PER_REQUEST, TOKENS)
    length = place + 1
    split_keys = keys_per_split(
        length, places_ptr, splits_ptr, tl.num_programs(1), KEYS, ROWS, PER_REQUEST, TOKENS
    )
    start = split * split_keys
    if start >= length:
        return
    stop = tl.minimum(start + split_keys, length)

    offset = tl.arange(0, KEYS)
    pair = tl.arange(0, PAIRS)
    channel = tl.arange(0, CHANNELS)
    # Channels of a pair.
    first = pair if IS_NEOX else 2 * pair
    second = pair + HALF if IS_NEOX else 2 * pair + 1
    turned = pair < HALF

    # [QUERIES] what is asked
    asked_head, _, asked_place, asked_token, is_asked = _queries_of(
        row, number, rows_ptr, places_ptr, QUERIES, GROUP, PER_REQUEST, TOKENS
    )
    query_at = query_ptr + asked_token * query_stride_token
    # [QUERIES, 1]
    query_at = (query_at + (kv_head * GROUP + asked_head) * query_stride_head)[:, None]
    is_asked = is_asked[:, None]
    # [HEADS] what is written
    head, query_row, own_place, token, in_group = _queries_of(
        row, number, rows_ptr, places_ptr, HEADS, GROUP, PER_REQUEST, TOKENS
    )
    in_group = in_group[:, None]
    # [QUERIES, PAIRS]
    asked = is_asked & turned[None, :]
    query_first = tl.load(query_at + first[None, :], mask=asked, other=0.0).to(tl.float32)
    query_second = tl.load(query_at + second[None, :], mask=asked, other=0.0).to(tl.float32)
    # Of what is multiplied, and of what turns keys.
    dtype = kv_ptr.dtype.element_ty
    turning = tl.float32
    if key_scale_ptr is not None:
        # FP8's numbers are exact in any of these dtypes; their scales come afterwards.
        dtype = query_ptr.dtype.element_ty
        scale_log2 *= load_scale(key_scale_ptr, kv_head, key_scale_stride)
        if query_ptr.dtype.element_ty != tl.float32:
            # Two numbers in an instruction, unlike float32, and more exact than bfloat16. Queries
            # of any size fit: each head's is divided by its largest element.
            dtype = tl.float16
            turning = tl.float16
            largest = tl.maximum(
                tl.max(tl.abs(query_first), axis=1), tl.max(tl.abs(query_second), axis=1)
            )
    if HEAD_SIZE > 2 * HALF:
        # [QUERIES, REST] the channels that RoPE leaves alone
        rest = 2 * HALF + tl.arange(0, REST)
        is_rest = rest < HEAD_SIZE
        query_rest = tl.load(query_at + rest[None, :], mask=is_asked & is_rest[None, :], other=0.0)
        if turning == tl.float16:
            query_rest = query_rest.to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(query_rest), axis=1))
    if turning == tl.float16:
        largest = tl.where(largest > 0, largest, 1.0)[:, None]
        query_first /= largest
        query_second /= largest
        scale_log2 *= tl.trans(_repeat(largest, HEADS))
        if HEAD_SIZE > 2 * HALF:
            query_rest /= largest
    if HEAD_SIZE > 2 * HALF:
        query_rest = tl.trans(_repeat(query_rest.to(dtype), HEADS))

    if BY_PLACE:
        if TOKENS == 1:
            angle_at = (place * HALF + pair)[None, :]
        else:
            angle_at = tl.maximum(asked_place, 0)[:, None] * HALF + pair[None, :]
        cos = tl.load(cos_ptr + angle_at, mask=turned[None, :], other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle_at, mask=turned[None, :], other=0.0).to(tl.float32)
        asked_first = _repeat((query_first * cos - query_second * sin).to(dtype), HEADS)
        asked_second = _repeat((query_second * cos + query_first * sin).to(dtype), HEADS)
    elif TOKENS > 1:
        # All are turned as if they were at the last token's place, so that tiles turn them alike. A
        # table may be scaled (YaRN): its row 0 is the factor, which counts but once.
        unit = tl.load(cos_ptr + pair, mask=turned, other=1.0).to(tl.float32)[None, :]
        behind = tl.where(asked_place >= 0, place - asked_place, 0)
        behind_at = behind[:, None] * HALF + pair[None, :]
        back_cos = tl.load(cos_ptr + behind_at, mask=turned[None, :], other=0.0).to(tl.float32)
        back_sin = tl.load(sin_ptr + behind_at, mask=turned[None, :], other=0.0).to(tl.float32)
        back_cos /= unit
        back_sin /= unit
        back = query_first * back_cos + query_second * back_sin
        query_second = query_second * back_cos - query_first * back_sin
        query_first = back
    if BY_PLACE:
        # The keys' angles are loaded with them.
        pass
    elif KEY_WORDS:
        # [PAIRS / 2, KEYS] of even and of odd pairs
        word = tl.arange(0, PAIRS // 2)
        table_at = offset[None, :] * HALF + 2 * word[:, None]
        within = (offset < num_positions)[None, :] & (2 * word < HALF)[:, None]
        even_cos = tl.load(cos_ptr + table_at, mask=within, other=0.0).to(turning)
        even_sin = tl.load(sin_ptr + table_at, mask=within, other=0.0).to(turning)
        odd_cos = tl.load(cos_ptr + table_at + 1, mask=within, other=0.0).to(turning)
        odd_sin = tl.load(sin_ptr + table_at + 1, mask=within, other=0.0).to(turning)
    else:
        # [PAIRS, KEYS]
        table_at = offset[None, :] * HALF + pair[:, None]
        within = (offset < num_positions)[None, :] & turned[:, None]
        key_cos = tl.load(cos_ptr + table_at, mask=within, other=0.0).to(turning)
        key_sin = tl.load(sin_ptr + table_at, mask=within, other=0.0).to(turning)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    # Summed over keys after the last tile: a sum in every tile would make warps exchange data.
    norms = tl.zeros([KEYS, HEADS], tl.float32)
    if WORDS:
        even_acc = tl.zeros([CHANNELS // 2, HEADS], tl.float32)
        odd_acc = tl.zeros([CHANNELS // 2, HEADS], tl.float32)
    else:
        acc = tl.zeros([CHANNELS, HEADS], tl.float32)
    table_at_row = block_table_ptr + last_row * table_stride_row
    logits_at = logits_ptr + (row * tl.num_programs(0) + kv_head) * GROUP * logits_stride_head
    logits_at += (head * logits_stride_head)[None, :]

    # Block ids are loaded one tile ahead. If they were loaded where they are used, the compiler
    # would copy them asynchronously, and a wait for them would wait for all keys on their way.
    TILE_BLOCKS: tl.constexpr = (KEYS + BLOCK_SIZE - 1) // BLOCK_SIZE
    tile_block = tl.arange(0, TILE_BLOCKS)
    blocks_at = table_at_row + start // BLOCK_SIZE + tile_block
    blocks = tl.load(blocks_at, mask=tile_block * BLOCK_SIZE < stop - start, other=0)
    # A tile begins at a multiple of KEYS, so what is inside of a block does not depend on the tile,
    # or is one number for all of it.
    slot = kv_head * BLOCK_SIZE + offset % BLOCK_SIZE
    for base in range(start, stop, KEYS):
        num_left = stop - base
        key_place = base + offset
        valid = offset < num_left
        block = tl.zeros([KEYS], tl.int32)
        for i in tl.static_range(TILE_BLOCKS):
            found = tl.sum(tl.where(tile_block == i, blocks, 0), axis=0)
            block = tl.where(offset // BLOCK_SIZE == i, found, block)
        blocks_at = table_at_row + (base + KEYS) // BLOCK_SIZE + tile_block
        blocks = tl.load(blocks_at, mask=tile_block * BLOCK_SIZE < num_left - KEYS, other=0)
        # [KEYS]
        key_at = kv_ptr + slot * (2 * HEAD_SIZE) + block.to(tl.int64) * kv_stride_block
        if WORDS:
            words_at = kv_ptr.to(tl.pointer_type(tl.int16)) + slot * HEAD_SIZE
            words_at += block.to(tl.int64) * (kv_stride_block // 2)
        if BLOCK_SIZE > KEYS:
            key_at += base % BLOCK_SIZE * (2 * HEAD_SIZE)
            if WORDS:
                words_at += base % BLOCK_SIZE * HEAD_SIZE
        # Keys past the end are those of whatever block; their logits count for nothing.
        if KEY_WORDS:
            # [PAIRS / 2, KEYS]
            held = (2 * word < HALF)[:, None]
            word_at = words_at[None, :] + word[:, None]
            first_words = _load(word_at, held, 0, PAIRS != HALF)
            second_words = _load(word_at + HALF // 2, held, 0, PAIRS != HALF)
            even_first, odd_first = split_words(first_words, COMPILED)
            even_second, odd_second = split_words(second_words, COMPILED)
        else:
            # [PAIRS, KEYS]
            held = turned[:, None]
            key_first = _load(key_at[None, :] + first[:, None], held, 0.0, PAIRS != HALF)
            key_second = _load(key_at[None, :] + second[:, None], held, 0.0, PAIRS != HALF)
            key_first = key_first.to(turning)
            key_second = key_second.to(turning)
        if BY_PLACE:
            held = turned[:, None] & valid[None, :]
            key_angle_at = key_place[None, :] * HALF + pair[:, None]
            key_cos = tl.load(cos_ptr + key_angle_at, mask=held, other=0.0).to(turning)
            key_sin = tl.load(sin_ptr + key_angle_at, mask=held, other=0.0).to(turning)
        else:
            angle_at = ((place - base) * HALF + pair)[None, :]
            cos = tl.load(cos_ptr + angle_at, mask=turned[None, :], other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle_at, mask=turned[None, :], other=0.0).to(tl.float32)
            asked_first = _repeat((query_first * cos - query_second * sin).to(dtype), HEADS)
            asked_second = _repeat((query_second * cos + query_first * sin).to(dtype), HEADS)
        # [KEYS, HEADS]
        if KEY_WORDS:
            even_asked, odd_asked = tl.split(tl.reshape(asked_first, [HEADS, PAIRS // 2, 2]))
            part = even_first * even_cos - even_second * even_sin
            logits = tl.dot(tl.trans(part), tl.trans(even_asked))
            part = odd_first * odd_cos - odd_second * odd_sin
            logits = tl.dot(tl.trans(part), tl.trans(odd_asked), logits)
            even_asked, odd_asked = tl.split(tl.reshape(asked_second, [HEADS, PAIRS // 2, 2]))
            part = even_second * even_cos + even_first * even_sin
            logits = tl.dot(tl.trans(part), tl.trans(even_asked), logits)
            part = odd_second * odd_cos + odd_first * odd_sin
            logits = tl.dot(tl.trans(part), tl.trans(odd_asked), logits)
        else:
            part = tl.trans((key_first * key_cos - key_second * key_sin).to(dtype))
            logits = tl.dot(part, tl.trans(asked_first), input_precision=PRECISION)
            part = tl.trans((key_second * key_cos + key_first * key_sin).to(dtype))
            logits = tl.dot(part, tl.trans(asked_second), logits, input_precision=PRECISION)
        if HEAD_SIZE > 2 * HALF:
            key_rest = _load(key_at[None, :] + rest[:, None], is_rest[:, None], 0.0, True)
            key_rest = tl.trans(key_rest.to(dtype))
            logits = tl.dot(key_rest, query_rest, logits, input_precision=PRECISION)
        logits *= scale_log2
        if SOFT_CAP > 0:
            logits = cap_logits(logits, SOFT_CAP)
        if SCORED:
            # Not masked by keys, so that words are wide: rows of logits have room for whole tiles.
            tl.store(logits_at + key_place[:, None], logits, mask=tl.trans(in_group))
        if TOKENS == 1:
            seen = valid[:, None]
        else:
            seen = valid[:, None] & (key_place[:, None] <= own_place[None, :])
        logits = tl.where(seen, logits, float("-inf"))

        new_top = tl.maximum(top, tl.max(logits, axis=0))
        shift = new_top
        if TOKENS > 1:
            # A token may have seen no key of this split yet.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        faded = tl.exp2(top - shift)[None, :]
        probs = tl.exp2(logits - shift[None, :])
        norms = norms * faded + probs
        held = valid[None, :]
        if WORDS:
            # [CHANNELS / 2, KEYS]
            value_word = tl.arange(0, CHANNELS // 2)
            if CHANNELS != HEAD_SIZE:
                held = held & (2 * value_word < HEAD_SIZE)[:, None]
            word_at = words_at[None, :] + (HEAD_SIZE // 2 + value_word)[:, None]
            even_value, odd_value = split_words(tl.load(word_at, mask=held, other=0), COMPILED)
            even_acc = tl.dot(even_value, probs.to(dtype), even_acc * faded)
            odd_acc = tl.dot(odd_value, probs.to(dtype), odd_acc * faded)
        else:
            # [CHANNELS, KEYS]
            if CHANNELS != HEAD_SIZE:
                held = held & (channel < HEAD_SIZE)[:, None]
            value_at = key_at[None, :] + (HEAD_SIZE + channel)[:, None]
            value = tl.load(value_at, mask=held, other=0.0).to(dtype)
            acc = tl.dot(value, probs.to(dtype), acc * faded, input_precision=PRECISION)
        top = new_top

    norm = tl.sum(norms, axis=0)
    # [HEADS, CHANNELS]
    acc = tl.interleave(tl.trans(even_acc), tl.trans(odd_acc)) if WORDS else tl.trans(acc)
    attended = acc / (norm if TOKENS == 1 else tl.where(norm > 0, norm, 1.0))[:, None]
    if value_scale_ptr is not None:
        attended *= load_scale(value_scale_ptr, kv_head, value_scale_stride)
    written = in_group & (channel < HEAD_SIZE)[None, :]
    if DIRECT and split_keys >= length:
        # A single split: its output is the row's.
        output_at = output_ptr + token * output_stride_token
        output_at += (kv_head * GROUP + head) * output_stride_head
        output_at = output_at[:, None] + channel[None, :]
        tl.store(output_at, attended.to(output_ptr.dtype.element_ty), mask=written)
    else:
        split_at = ((query_row * tl.num_programs(0) + kv_head) * GROUP + head) * max_splits + split
        tl.store(lse_ptr + split_at, top + tl.log2(norm), mask=tl.reshape(in_group, [HEADS]))
        partial_at = partial_ptr + split_at[:, None] * HEAD_SIZE + channel[None, :]
        tl.store(partial_at, attended, mask=written)
