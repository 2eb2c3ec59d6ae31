"""One layer's KV pages as tensors: K and V, then, in the padded tail, scores and token indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Pages:
    """Views into one layer's block pool.

    Args:
        kv: [num_blocks, num_kv_heads, block_size, head_size + head_size_v]; K, then V.
        score: [num_blocks, num_kv_heads, block_size] float32, or None where none is kept.
        token: [num_blocks, num_kv_heads, block_size] int32 token index, or None.
    """

    kv: torch.Tensor
    score: torch.Tensor | None
    token: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`kv`, `score` and `token`; None for those that pages lack."""
        return self.kv, self.score, self.token

    @classmethod
    def view(cls, kv: torch.Tensor, has_score: bool, has_token: bool) -> Pages:
        """Lay the views over a page pool whose blocks lie ``kv.stride(0)`` elements apart.

        Args:
            kv: [num_blocks, num_kv_heads, block_size, channels], dense within a block. Blocks start
                at multiples of 4 bytes.
            has_score: Whether a float32 per KV head and slot follows K and V.
            has_token: Whether an int32 per KV head and slot follows K, V and any scores.

        Returns:
            The views; they share storage with `kv`.
        """
        num_blocks, num_kv_heads, block_size, channels = kv.shape
        slots = num_kv_heads * block_size
        words = kv.element_size() / 4
        stride = int(kv.stride(0) * words)
        offset = int((kv.storage_offset() + slots * channels) * words)

        def tail(dtype: torch.dtype, start: int) -> torch.Tensor:
            flat = torch.empty(0, dtype=dtype, device=kv.device).set_(kv.untyped_storage())
            shape = (num_blocks, num_kv_heads, block_size)
            return flat.as_strided(shape, (stride, block_size, 1), start)

        score = tail(torch.float32, offset) if has_score else None
        token = tail(torch.int32, offset + slots * has_score) if has_token else None
        return cls(kv, score, token)

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        block_ids: torch.Tensor,
        offsets: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        """Store new tokens' keys (before RoPE) and values, in plain PyTorch for a CPU.

        Args:
            key: [num_tokens, num_kv_heads, head_size].
            value: [num_tokens, num_kv_heads, head_size_v].
            block_ids: [num_tokens] int64 block of each token.
            offsets: [num_tokens] int64 slot in that block.
            tokens: [num_tokens] int32 index of each token in its request; None where pages have no
                token indices.

        Raises:
            ValueError: If pages with token indices get none.
        """
        self.kv[block_ids, :, offsets] = torch.cat([key, value], dim=-1).to(self.kv.dtype)
        if self.token is None:
            return
        if tokens is None:
            raise ValueError("traced pages need the tokens' indices, got None")
        self.token[block_ids, :, offsets] = tokens[:, None]


def copy_tails(pages: Sequence[Pages], copies: Sequence[tuple[int, int]]) -> None:
    """Copy the scores and token indices of whole blocks, without waiting for the device.

    Args:
        pages: The pages of one layer or more, on one device.
        copies: Pairs of a source block and a target block. No block is a source and a target.
    """
    tails = [tail for each in pages for tail in (each.score, each.token) if tail is not None]
    if not tails:
        return
    blocks = torch.tensor(copies)
    if pages[0].kv.is_cuda:
        blocks = blocks.pin_memory()
    source, target = blocks.to(pages[0].kv.device, non_blocking=True).unbind(1)
    for tail in tails:
        tail[target] = tail[source]
