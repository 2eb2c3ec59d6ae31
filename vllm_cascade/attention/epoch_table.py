"""The cascade's structure on the device, filled as far as the longest request so far has come."""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from vllm_cascade.kernels.block_tables import CascadeTable
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import Layout

# Least epochs to fill at a time: some 20 ms of work on the host.
EPOCHS_AT_ONCE = 64


class EpochTable:
    """The epochs of a layout as tensors.

    Room for all epochs is allocated at once, because CUDA graphs hold the tensors' addresses. The
    host takes a third of a millisecond for an epoch, so it lays out an epoch only when a request
    is about to reach it.

    Args:
        layout: The cascade's structure.
        device: Where the tensors are.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._filled = layout, 0
        config, number = layout.config, len(layout.epochs)
        # int16 halves the table, and suffices for rows of up to half a million places.
        kind = torch.int16 if layout.max_blocks < 1 << 15 else torch.int32
        group_blocks = config.group_tokens // config.block_size
        groups = (number, max(1, layout.max_groups), group_blocks)
        self.table = CascadeTable(
            entries=torch.zeros(number, layout.max_blocks, dtype=kind, device=device),
            groups=torch.zeros(groups, dtype=kind, device=device),
            num_groups=torch.zeros(number, dtype=torch.int32, device=device),
            starts=torch.zeros(number, dtype=torch.int32, device=device),
            prefixes=torch.zeros(number, dtype=torch.int32, device=device),
            first_end=layout.epochs[0].end,
            stride=config.stride,
            num_sink_tokens=config.num_sink_tokens,
            block_size=config.block_size,
            decay=config.score_decay,
        )
        self.cover(1)

    def cover(self, num_tokens: int) -> None:
        """Fill the table for requests of up to `num_tokens` tokens, without waiting for the device.

        Args:
            num_tokens: Tokens that the longest request has once the step is done.
        """
        layout, table = self._layout, self.table
        # One epoch more: after a boundary the request's next token lies in the next epoch.
        needed = layout.epoch_of(num_tokens) + 2
        if needed <= self._filled or self._filled == len(layout.epochs):
            return
        part = slice(self._filled, max(needed, self._filled + EPOCHS_AT_ONCE))
        epochs = layout.epochs[part]
        self._filled = part.start + len(epochs)
        entries = np.zeros((len(epochs), *table.entries.shape[1:]), dtype=np.int32)
        groups = np.zeros((len(epochs), *table.groups.shape[1:]), dtype=np.int32)
        for row, epoch in enumerate(epochs):
            entries[row, : len(epoch.table)] = epoch.table
            groups[row, : len(epoch.groups)] = epoch.groups
        _put(table.entries[part], entries)
        _put(table.groups[part], groups)
        _put(table.num_groups[part], np.array([len(epoch.groups) for epoch in epochs]))
        _put(table.starts[part], np.array([epoch.start for epoch in epochs]))
        _put(table.prefixes[part], np.array([epoch.prefix_tokens for epoch in epochs]))


# A table lives as long as somebody that uses it.
_tables: WeakValueDictionary[tuple[CascadeConfig, torch.device], EpochTable] = WeakValueDictionary()


def shared_epochs(layout: Layout, device: torch.device) -> EpochTable:
    """Give the table of all that plan steps of one layout; the first that asks allocates it.

    A drafter's steps may replay without the host, and find what the model's steps have filled.

    Args:
        layout: The cascade's structure.
        device: Where the tensors are.

    Returns:
        The table, the same object for equal arguments.
    """
    key = layout.config, device
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = EpochTable(layout, device)
    return table


def _put(target: torch.Tensor, values: npt.NDArray[np.integer]) -> None:
    host = torch.from_numpy(values).to(target.dtype)
    if target.is_cuda:
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)
