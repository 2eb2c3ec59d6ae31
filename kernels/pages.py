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
        key_scale: [num_kv_heads] float32, of any stride: what a key in FP8 is multiplied by. None
            where `kv` is not in FP8 (float8_e4m3fn).
        value_scale: As `key_scale`, of values.

    Raises:
        ValueError: `kv` is in FP8 and has no scales, or the other way round, or scales are of
            another shape or dtype.
    """

    kv: torch.Tensor
    score: torch.Tensor | None
    token: torch.Tensor | None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All fields, in their order; None for those that pages lack."""
        return self.kv, self.score, self.token, self.key_scale, self.value_scale

    def __post_init__(self) -> None:
        scales = (self.key_scale, self.value_scale)
        if self.kv.dtype != torch.float8_e4m3fn:
            if scales != (None, None):
                raise ValueError(f"pages of {self.kv.dtype} have no scales, got {scales}")
            return
        shape = (self.kv.shape[1],)
        for scale in scales:
            if scale is None or scale.shape != shape or scale.dtype != torch.float32:
                raise ValueError(f"pages in FP8 need scales {list(shape)} of float32, got {scale}")

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are in FP8."""
        return self.key_scale is not None

    @property
    def scale_strides(self) -> tuple[int, int]:
        """Elements between the scales of two heads, of keys and of values; 0 without scales."""
        if self.key_scale is None or self.value_scale is None:
            return 0, 0
        return self.key_scale.stride(0), self.value_scale.stride(0)

    @classmethod
    def view(
        cls,
        kv: torch.Tensor,
        has_score: bool,
        has_token: bool,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> Pages:
        """Lay the views over a page pool whose blocks lie ``kv.stride(0)`` elements apart.

        Args:
            kv: [num_blocks, num_kv_heads, block_size, channels], dense within a block. Blocks start
                at multiples of 4 bytes.
            has_score: Whether a float32 per KV head and slot follows K and V.
            has_token: Whether an int32 per KV head and slot follows K, V and any scores.
            key_scale: As the field; given if `kv` is of float8_e4m3fn.
            value_scale: As the field; given if `kv` is of float8_e4m3fn.

        Returns:
            The views; they share storage with `kv`.
        """
        num_blocks, num_kv_heads, block_size, channels = kv.shape
        slots = num_kv_heads * block_size
        size = kv.element_size()
        stride = kv.stride(0) * size // 4
        offset = (kv.storage_offset() + slots * channels) * size // 4

        def tail(dtype: torch.dtype, start: int) -> torch.Tensor:
            flat = torch.empty(0, dtype=dtype, device=kv.device).set_(kv.untyped_storage())
            shape = (num_blocks, num_kv_heads, block_size)
            return flat.as_strided(shape, (stride, block_size, 1), start)

        score = tail(torch.float32, offset) if has_score else None
        token = tail(torch.int32, offset + slots * has_score) if has_token else None
        return cls(kv, score, token, key_scale, value_scale)

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
        if self.key_scale is not None and self.value_scale is not None:
            key, value = to_e4m3(key, self.key_scale), to_e4m3(value, self.value_scale)
        self.kv[block_ids, :, offsets] = torch.cat([key, value], dim=-1).to(self.kv.dtype)
        if self.token is None:
            return
        if tokens is None:
            raise ValueError("traced pages need the tokens' indices, got None")
        self.token[block_ids, :, offsets] = tokens[:, None]

    def read(self, block_ids: torch.Tensor, head_size: int) -> torch.Tensor:
        """Copy keys and values of whole blocks out, in plain PyTorch for a CPU.

        Args:
            block_ids: [num_ids] int64.
            head_size: Channels of a key.

        Returns:
            [num_ids, num_kv_heads, block_size, channels] in the dtype of `kv`; float32, multiplied
            by the scales, where `kv` is in FP8.
        """
        held = self.kv[block_ids]
        if self.key_scale is None or self.value_scale is None:
            return held
        held = held.float()
        held[..., :head_size] *= self.key_scale[:, None, None]
        held[..., head_size:] *= self.value_scale[:, None, None]
        return held


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8, to nearest, ties to even.

    Args:
        x: [num_tokens, num_kv_heads, channels], any floating dtype.
        scale: [num_kv_heads] float32.

    Returns:
        As `x`, float8_e4m3fn, of ``x / scale``. What is beyond +-448 becomes +-448; NaN stays NaN.
    """
    return (x.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


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
