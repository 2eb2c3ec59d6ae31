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


@triton.jit
def keys_per_split(
    length, places_ptr, splits_ptr, num_rows, KEYS: tl.constexpr, ROWS: tl.constexpr
):
    """Return the keys of each split of a row: even, whole tiles, no fewer than pay for a program.

    How many splits a full row has depends on how many rows have a token. A CUDA graph may have
    other rows as well; their programs return at once.

    Args:
        length: Keys of the row.
        places_ptr: [num_rows] int32 `DecodeRows.places`.
        splits_ptr: `Splits.table`.
        num_rows: Rows of the launch.
        KEYS: Keys of a tile.
        ROWS: Most rows of a launch, rounded up to a power of two.
    """
    row = tl.arange(0, ROWS)
    has_token = tl.load(places_ptr + row, mask=row < num_rows, other=-1) >= 0
    busy = tl.maximum(tl.sum(has_token.to(tl.int32)), _MIN_BUSY_QUARTERS * num_rows // 4)
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
        partial: [max_rows, num_heads, max_splits, head_size] float32 normalised partial outputs.
        lse: [max_rows, num_heads, max_splits] float32 log-sum-exps, base 2.
        logits: [max_rows, num_heads, width] float32 scaled logits, base 2; `width` is `max_places`
            rounded up to whole tiles of `MAX_BLOCK_SIZE`, or 0 where no call keeps scores.
        max_places: Most keys of a row.
        splits: What `launch_config` chooses for every number of rows.
    """

    partial: torch.Tensor
    lse: torch.Tensor
    logits: torch.Tensor
    max_places: int
    splits: Splits


def make_scratch(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    element_size: int,
    max_places: int,
    max_splits: int,
    device: torch.device,
    scored: bool = True,
) -> Scratch:
    """Allocate all that `decode` needs beside its arguments.

    Args:
        max_rows: Most rows of a launch; `decode` processes more in turn.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        element_size: Bytes of an element of the pages.
        max_places: Most keys of a row.
        max_splits: Most splits of a row.
        device: Where.
        scored: Whether any call keeps scores; else there is no room for logits.

    Returns:
        The scratch, but for `splits` uninitialised.
    """
    padded = cdiv(max_places, MAX_BLOCK_SIZE) * MAX_BLOCK_SIZE if scored else 0
    kinds = {"dtype": torch.float32, "device": device}
    num_sms = 1
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    choices = []
    for rows in range(max_rows + 1):
        config = launch_config(
            max(rows, 1), num_kv_heads, head_size, max_places, element_size, True, num_sms
        )
        choices.append((min(config.splits, max_splits), config.min_keys))
    return Scratch(
        partial=torch.empty(max_rows, num_heads, max_splits, head_size, **kinds),
        lse=torch.empty(max_rows, num_heads, max_splits, **kinds),
        logits=torch.empty(max_rows, num_heads, padded, **kinds),
        max_places=max_places,
        splits=Splits.of(choices, device),
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
) -> Config:
    """Choose the launch from shapes alone.

    Args:
        num_rows: Rows of one launch.
        num_kv_heads: KV heads.
        head_size: Channels of a head.
        max_places: Most keys of a row.
        element_size: Bytes of an element of the pages.
        exact_table: Whether the rotary table is float32, so that rotations compose.
        num_sms: Multiprocessors of the device.

    Returns:
        Tile sizes and numbers of programs.
    """
    # Two warps hold a tile's keys and rotary angles without spilling. A thread takes all the
    # registers it can have, so a multiprocessor runs eight warps.
    num_warps = 2 if element_size <= 2 and head_size <= 128 else 4
    # With many rows a short row is not split at all; with few rows even a short split pays.
    programs = num_rows * num_kv_heads
    min_keys = 4096 if programs >= 512 else 512 if programs >= 64 else 256
    return Config(
        keys=32,
        splits=choose_splits(programs, max_places, min_keys, num_sms * 8 // num_warps),
        min_keys=min_keys,
        by_place=not exact_table,
        num_warps=num_warps,
        num_stages=3 if element_size <= 2 else 2,
        max_registers=None,
        score_tile=512,
        score_pieces=max(1, min(64, cdiv(max_places, 2048))),
        score_warps=4,
    )
