"""Reference of `kernels/kv_write.py`: an entry at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def write(
    pages: Any, key: Tensor, value: Tensor, rows: Tensor, slots: Tensor, tokens: Tensor | None
) -> None:
    """Store row ``rows[p]`` of `key` and `value` in slot ``slots[p]``, unless that is -1."""
    block_size, head_size = pages.kv.shape[2], key.shape[2]
    for entry, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        pages.kv[block, :, offset, :head_size] = key[row].to(pages.kv.dtype)
        pages.kv[block, :, offset, head_size:] = value[row].to(pages.kv.dtype)
        if pages.token is not None:
            assert tokens is not None
            pages.token[block, :, offset] = tokens[entry]
