"""How paged decode is cut into programs, and what its two launches hand on to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vllm_cascade.kernels.launch import cdiv

# Most tokens of a block, and most keys of a tile. A row of logits ends on a multiple of this, so
# whole blocks and tiles fit.
MAX_BLOCK_SIZE = 128
# Splits are chosen as if at least this many quarters of a launch's rows had a token.
MIN_BUSY_QUARTERS = 3
_MIN_BUSY_QUARTERS = tl.constexpr(MIN_BUSY_QUARTERS)
# Queries that a program attends at most: query heads of a KV head, of one token or of several. With
# more of them, sums and rotated queries would no longer fit registers.
MAX_QUERIES = 64
# With heads of more than 256 channels.
MAX_WIDE_QUERIES = 16
# Registers of a thread with which a multiprocessor runs twelve warps, instead of eight.
FP8_REGISTERS = 168


def tokens_together(per_request: int, group: int, head_size: int) -> int:
    """Return how many of a request's tokens a program attends, so that they load keys once.

    Args:
        per_request: `DecodeRows.per_request`.
        group: Query heads that share a KV head.
        head_size: Channels of a head.
    """
    most = max(1, (MAX_QUERIES if head_size <= 256 else MAX_WIDE_QUERIES) // group)
    return cdiv(per_request, cdiv(per_request, most))


def count_teams(num_rows: int, per_request: int, group: int, head_size: int) -> int:
    """Return how many teams, runs of rows that a program attends together, are in `num_rows`."""
    tokens = tokens_together(per_request, group, head_size)
    return num_rows // per_request * cdiv(per_request, tokens)


@triton.jit
def first_of_team(team, PER_REQUEST: tl.constexpr, TOKENS: tl.constexpr):
    """Return a team's first row. A team is TOKENS rows of a request, or what is left of them.

    Args:
        team: Number of the team in the launch.
        PER_REQUEST: `DecodeRows.per_request`.
        TOKENS: `tokens_together`.
    """
    TEAMS: tl.constexpr = (PER_REQUEST + TOKENS - 1) // TOKENS
    return team // TEAMS * PER_REQUEST + team % TEAMS * TOKENS


@triton.jit
def last_of_team(number, first_row, places_ptr, PER_REQUEST: tl.constexpr, TOKENS: tl.constexpr):
    """Return the last row of a team that has a token, and its place; its first row and -1 if none.

    Args:
        number: Number of the team's first row in its request.
        first_row: The team's first row.
        places_ptr: `DecodeRows.places`.
        PER_REQUEST: `DecodeRows.per_request`.
        TOKENS: `tokens_together`.
    """
    row = first_row
    last = tl.load(places_ptr + first_row)
    for i in tl.static_range(1, TOKENS):
        place = tl.load(places_ptr + first_row + i, mask=number + i < PER_REQUEST, other=-1)
        row = tl.where(place >= 0, first_row + i, row)
        last = tl.maximum(last, place)
    return row, last


@triton.jit
def keys_per_split(
    length,
    places_ptr,
    splits_ptr,
    num_teams,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    PER_REQUEST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return the keys of each split of a team: even, whole tiles, no fewer than pay for a program.

    How many splits a full row has depends on how many teams have a token. A CUDA graph may have
    other rows as well; their programs return at once.

    Args:
        length: Keys of the team's last row that has a token.
        places_ptr: `DecodeRows.places`.
        splits_ptr: `Splits.table`.
        num_teams: Teams of the launch.
        KEYS: Keys of a tile.
        ROWS: Most teams of a launch, rounded up to a power of two.
        PER_REQUEST: `DecodeRows.per_request`.
        TOKENS: `tokens_together`.
    """
    team = tl.arange(0, ROWS)
    row = first_of_team(team, PER_REQUEST, TOKENS)
    has_token = tl.load(places_ptr + row, mask=team < num_teams, other=-1) >= 0
    busy = tl.maximum(tl.sum(has_token.to(tl.int32)), _MIN_BUSY_QUARTERS * num_teams // 4)
    num_splits = tl.load(splits_ptr + 2 * busy)
    min_keys = tl.load(splits_ptr + 2 * busy + 1)
    active = tl.maximum(tl.minimum(tl.cdiv(length, min_keys), num_splits), 1)
    return tl.cdiv(tl.cdiv(length, active), KEYS) * KEYS


def fewest_busy(num_rows: int) -> int:
    """Return how many rows splits are chosen for where fewer of `num_rows` rows have a token."""
    return MIN_BUSY_QUARTERS * num_rows // 4


@dataclass(frozen=True, slots=True)
class Splits:
    """How many programs share a row, by how many rows of a launch have a token.

    Rows that programs attend together, the tokens of a request, count as one.

    Args:
        table: [max_rows + 1, 2] int32 splits of a full row, and fewest keys worth a program.
        most: Most splits of a row in a launch of 0 rows, 1 row and so on, of which any number may
            have a token.
    """

    table: torch.Tensor
    most: tuple[int, ...]

    @classmethod
    def of(cls, choices: Sequence[tuple[int, int]], device: torch.device) -> Splits:
        """Put a choice for each number of rows with a token on the device.

        Args:
            choices: Splits of a full row and fewest keys worth a program, for 0 rows, 1 row, and so
                on up to the most rows of a launch.
            device: Where.
        """
        most = (
            max(splits for splits, _ in choices[fewest_busy(rows) : rows + 1])
            for rows in range(len(choices))
        )
        return cls(torch.tensor(choices, dtype=torch.int32, device=device), tuple(most))

    @property
    def max_rows(self) -> int:
        """Most rows of a launch."""
        return len(self.most) - 1


@lru_cache(maxsize=16)
def splits_for_all(choice: tuple[int, int], max_rows: int, device: torch.device) -> Splits:
    """The same choice for any number of rows; kept, so that a CUDA graph copies nothing to it."""
    return Splits.of([choice] * (max_rows + 1), device)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Intermediate results of `decode`, shared by all layers.

    Args:
        partial: [num_heads, room, head_size] float32, memory for normalised partial outputs. A
            launch lays them out as [rows, num_heads, splits, head_size].
        lse: [num_heads, room] float32, memory for log-sum-exps, base 2, laid out likewise.
        logits: [max_rows, num_heads, width] float32 scaled logits, base 2; `width` is `max_places`
            rounded up to whole tiles of `MAX_BLOCK_SIZE`, or 0 where no call keeps scores.
        max_places: Most keys of a row.
        max_rows: Most rows of a launch.
        splits: What `launch_config` chooses for every number of rows.
    """

    partial: torch.Tensor
    lse: torch.Tensor
    logits: torch.Tensor
    max_places: int
    max_rows: int
    splits: Splits


def make_scratch(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    element_size: int,
    max_places: int,
    min_splits: int,
    device: torch.device,
    scored: bool = True,
    per_request: int = 1,
) -> Scratch:
    """Allocate all that `decode` needs beside its arguments.

    Args:
        max_rows: Most rows of a launch; `decode` processes more in turn.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        element_size: Bytes of an element of the pages.
        max_places: Most keys of a row.
        min_splits: Splits of a row for which any launch has room, whatever `launch_config` chooses.
        device: Where.
        scored: Whether any call keeps scores; else there is no room for logits.
        per_request: `DecodeRows.per_request` of the rows.

    Returns:
        The scratch, but for `splits` uninitialised.
    """
    padded = cdiv(max_places, MAX_BLOCK_SIZE) * MAX_BLOCK_SIZE if scored else 0
    kinds = {"dtype": torch.float32, "device": device}
    num_sms = 1
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    choices = []
    group = num_heads // num_kv_heads
    num_queries = group * tokens_together(per_request, group, head_size)
    for teams in range(count_teams(max_rows, per_request, group, head_size) + 1):
        config = launch_config(
            max(teams, 1),
            num_kv_heads,
            head_size,
            max_places,
            element_size,
            True,
            num_sms,
            num_queries,
        )
        choices.append((config.splits, config.min_keys))
    splits = Splits.of(choices, device)
    # A launch of many rows splits them less.
    room = max(teams * num_queries // group * most for teams, most in enumerate(splits.most))
    room = max(room, max_rows * min_splits)
    return Scratch(
        partial=torch.empty(num_heads, room, head_size, **kinds),
        lse=torch.empty(num_heads, room, **kinds),
        logits=torch.empty(max_rows, num_heads, padded, **kinds),
        max_places=max_places,
        max_rows=max_rows,
        splits=splits,
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
            keep a table in registers: with 16-bit pages, bounds that were tried made it spill.
        score_tile: Keys of a tile of the second launch, where scores are kept.
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


def choose_splits(programs: int, max_places: int, min_keys: int, slots: int) -> int:
    """Choose the programs per row and KV head so that all programs end together.

    The choice supposes that all rows are full.

    Args:
        programs: Rows times KV heads.
        max_places: Most keys of a row.
        min_keys: Fewest keys worth a program.
        slots: Programs that the device runs at a time.

    Returns:
        Number of splits, from 1 to 64.
    """
    most = max(1, min(64, max_places // min_keys))
    # Several rounds of programs: in a single round a long row among short ones would end alone.
    fewest = min(most, cdiv(7 * slots, 2 * programs))

    def cost(splits: int) -> float:
        # To start a program takes as long as some 64 keys do.
        return cdiv(programs * splits, slots) * (max_places / splits + 64)

    return min(range(fewest, min(most, 2 * fewest) + 1), key=cost)


def launch_config(
    num_rows: int,
    num_kv_heads: int,
    head_size: int,
    max_places: int,
    element_size: int,
    exact_table: bool,
    num_sms: int = 132,
    num_queries: int = 1,
) -> Config:
    """Choose the launch from shapes alone.

    Args:
        num_rows: Rows of one launch; those that a program attends together count as one.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        max_places: Most keys of a row.
        element_size: Bytes of an element of the pages, or of float32 where keys are multiplied as
            such.
        exact_table: Whether the rotary table is float32, so that rotations compose.
        num_sms: Multiprocessors of the device.
        num_queries: Queries that a program attends.

    Returns:
        Tile sizes and numbers of programs.
    """
    # Two warps hold a tile's keys and rotary angles without spilling. A thread takes all the
    # registers it can have, so a multiprocessor runs eight warps. FP8's tiles need fewer.
    small = element_size <= 2 and head_size <= 128
    num_warps, keys, max_registers = (2 if small else 4), 32, None
    if num_queries > 16:
        # Queries are turned anew for every tile.
        num_warps = 4 if small else 8
        keys = 64 if small and num_queries <= 32 else 32
    elif element_size == 1 and small and exact_table:
        max_registers = FP8_REGISTERS
    num_stages = {1: 4, 2: 3}.get(element_size, 2)
    if element_size == 1 and head_size > 128 and num_queries > 32:
        # Queries take shared memory too, of which a multiprocessor has 227 KiB.
        num_stages = 3
    if head_size > 256:
        # A tile takes twice the registers and twice the shared memory.
        num_warps = 8
        if element_size > 2 or num_queries > MAX_WIDE_QUERIES:
            keys = 16
        if num_queries > MAX_WIDE_QUERIES:
            num_stages = 1 if element_size > 2 else 2
        elif num_queries > 8:
            num_stages = min(num_stages, 3 if element_size == 1 else 2)
        if not exact_table:
            # The angles of each key are loaded too.
            num_stages = min(num_stages, 2)
    num_slots = num_sms * (12 if max_registers else 8) // num_warps
    # With many rows a short row is not split at all; with few rows even a short split pays.
    programs = num_rows * num_kv_heads
    min_keys = 4096 if programs >= 512 else 512 if programs >= 64 else 256
    return Config(
        keys=keys,
        splits=choose_splits(programs, max_places, min_keys, num_slots),
        min_keys=min_keys,
        by_place=not exact_table,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers,
        score_tile=512,
        score_pieces=max(1, min(64, cdiv(max_places, 2048))),
        score_warps=4,
    )
