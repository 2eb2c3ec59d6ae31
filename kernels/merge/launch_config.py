"""How the launches that merge groups are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_cascade.kernels.launch import next_power_of_2

# Programs of a launch per multiprocessor; all of them are resident at once.
PROGRAMS_PER_SM = 4


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Sizes of tiles.

    Args:
        sum_keys: Keys of a tile of the sums.
        sum_warps: Warps of a program of the first launch.
        group_keys: Keys of a tile whose cosine to the mean is taken.
        tokens: Tokens compared with as many at a time.
        move: Survivors moved at a time.
        merge_warps: Warps of a program of the second launch.
        max_registers: Bound on a thread's registers, for all programs to be resident at once.
    """

    sum_keys: int
    sum_warps: int
    group_keys: int
    tokens: int
    move: int
    merge_warps: int
    max_registers: int


def launch_config(head_size: int, element_size: int, group: int) -> LaunchConfig:
    """Choose the sizes of tiles.

    Args:
        head_size: Channels of a key.
        element_size: Bytes of a channel.
        group: Tokens of a merge group, a power of two.

    Returns:
        Sizes that divide the group, or half of it where survivors move.
    """
    channels = next_power_of_2(head_size)
    keys = max(8192 // channels, 16)
    row_bytes = next_power_of_2(2 * head_size) * element_size
    return LaunchConfig(
        sum_keys=max(4096 // channels, 16 if channels <= 256 else 8),
        sum_warps=4,
        group_keys=min(keys, 32, group),
        tokens=min(32, group),
        move=min(max(16384 // row_bytes, 8 if channels <= 256 else 4), group // 2),
        merge_warps=4,
        max_registers=65536 // (4 * 32 * PROGRAMS_PER_SM),
    )
