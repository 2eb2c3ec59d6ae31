"""Waves of a prefill with random contents, and the bound on a kernel's error.

The bound is that of the same computation by eager PyTorch in the kernel's dtype, times 1.5 for
another order of additions, plus the rounding of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import KEY_PADDING, Segments

NAN = float("nan")
# Triton's interpreter multiplies the bit patterns of bfloat16 operands as integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Queries and keys of each segment: nothing before it, a long prefix, one query, whole blocks.
LENGTHS = ((37, 37), (19, 83), (1, 50), (32, 64))


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's attention, and how its pages are laid out."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    lengths: tuple[tuple[int, int], ...] = LENGTHS


@dataclass(frozen=True, slots=True)
class Case:
    """A wave: its segments, the pages, and rotated queries and keys."""

    segments: Segments
    pages: Pages
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5


def spans(lengths: list[int], padding: int = 0) -> Tensor:
    """[len(lengths), 2] first and last + 1 of each, with `padding` between."""
    ends = torch.tensor(lengths).cumsum(0) + padding * torch.arange(len(lengths))
    return torch.stack([ends - torch.tensor(lengths), ends], dim=1).int()


def make_case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """Random contents; NaN in every slot that no segment holds, and past the workspaces' ends."""
    generator = torch.Generator().manual_seed(seed)
    query_lens = [q for q, _ in shape.lengths]
    key_lens = [k for _, k in shape.lengths]
    most = max(-(-k // shape.block_size) for k in key_lens) + 1
    needed = most * len(key_lens)
    num_blocks = needed + 3
    table = torch.randperm(num_blocks, generator=generator)[:needed].view(len(key_lens), most)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    channels = 2 * shape.head_size
    slots = shape.num_kv_heads * shape.block_size
    per_word = 4 // shape.dtype.itemsize
    # K and V, then a score per slot, then padding.
    stride = slots * channels + slots * per_word + 16
    storage = torch.full((num_blocks * stride,), NAN, dtype=shape.dtype)
    kv = storage.as_strided(
        (num_blocks, shape.num_kv_heads, shape.block_size, channels),
        (stride, shape.block_size * channels, channels, 1),
    )
    pages = Pages.view(kv, has_score=True, has_token=False)
    assert pages.score is not None
    pages.score.fill_(NAN)
    for index, (q, k) in enumerate(shape.lengths):
        place = torch.arange(k)
        blocks = table[index][place // shape.block_size]
        kv[blocks, :, place % shape.block_size] = random(k, shape.num_kv_heads, channels)
        # The segment's own keys have no score yet: NaN stays there.
        old = torch.rand(k - q, shape.num_kv_heads, generator=generator)
        pages.score[blocks[: k - q], :, place[: k - q] % shape.block_size] = old
    pages = Pages.view(
        storage.to(device).as_strided(kv.shape, kv.stride()), has_score=True, has_token=False
    )

    query_spans, key_spans = spans(query_lens), spans(key_lens, KEY_PADDING)
    num_queries, num_rows = sum(query_lens), int(key_spans[-1, 1]) + KEY_PADDING
    query = torch.full((num_queries + 9, shape.num_heads, shape.head_size), NAN, dtype=shape.dtype)
    key = torch.full((num_rows + 9, shape.num_kv_heads, shape.head_size), NAN, dtype=shape.dtype)
    value = key.clone()
    query[:num_queries] = 2 * random(num_queries, shape.num_heads, shape.head_size)
    for start, end in key_spans.tolist():
        key[start:end] = random(end - start, shape.num_kv_heads, shape.head_size)
        value[start:end] = random(end - start, shape.num_kv_heads, shape.head_size)
        value[end : end + KEY_PADDING] = 0
    segments = Segments(
        query_spans=query_spans.to(device),
        key_spans=key_spans.to(device),
        block_table=table.to(device=device, dtype=torch.int32),
        carry=torch.tensor([0.5 + 0.1 * s for s in range(len(key_lens))], device=device),
        exponents=torch.tensor([float(3 * s - 4) for s in range(len(key_lens))], device=device),
        num_queries=num_queries,
        num_rows=num_rows,
        max_query_len=max(query_lens),
        max_key_len=max(key_lens),
        max_prefix_len=max(k - q for q, k in shape.lengths),
        num_groups=torch.tensor([s % 3 for s in range(len(key_lens))], device=device).int(),
    )
    return Case(segments, pages, query.to(device), key.to(device), value.to(device))


def table_of(rotary_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(200.0)[:, None] * 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def assert_close(
    got: Tensor,
    exact: Tensor,
    eager: Tensor,
    slack: float = 1.5,
    condition: float = 0,
    error: float = 0,
) -> None:
    """Compare two errors against float64; roundings of the result come on top.

    Args:
        got: What the kernel gives.
        exact: The same in float64.
        eager: The same by PyTorch in the kernel's dtype.
        slack: Factor on the error of `eager`.
        condition: Relative error of the result per relative error of a constant that the kernel
            has rounded.
        error: What the kernel's own approximations add.
    """
    assert not exact.isnan().any()
    rounding = (1 + condition) * torch.finfo(got.dtype).eps * exact.abs().max()
    allowed = slack * (eager.double() - exact).abs().max() + rounding + error
    found = (got.double() - exact).abs()
    assert found.max() <= allowed, f"error {found.max():.3g}, allowed {allowed:.3g}"
