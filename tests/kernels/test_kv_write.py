"""Writing keys and values into pages."""

from __future__ import annotations

import pytest
import torch

from reference import kv_write as reference
from vllm_cascade.kernels import kv_write
from vllm_cascade.kernels.pages import Pages


def poisoned_pages(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    has_token: bool = True,
) -> Pages:
    """Pages full of NaN, with room for scores and token indices in every block's tail."""
    slots = num_kv_heads * block_size
    size = torch.empty(0, dtype=dtype).element_size()
    page = slots * 2 * head_size + slots * 4 * (1 + has_token) // size + 32
    pool = torch.full((num_blocks, page), float("nan"), dtype=dtype, device=device)
    shape = (num_blocks, num_kv_heads, block_size, 2 * head_size)
    strides = (page, block_size * 2 * head_size, 2 * head_size, 1)
    return Pages.view(pool.as_strided(shape, strides), has_score=True, has_token=has_token)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "head_size", "block_size"),
    [
        (torch.bfloat16, 8, 128, 16),
        (torch.float16, 3, 64, 32),
        (torch.float32, 1, 80, 16),
        (torch.bfloat16, 2, 256, 128),
        (torch.bfloat16, 1, 512, 32),
    ],
)
def test_writes_named_rows_into_their_slots_and_nothing_else(
    dtype: torch.dtype,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    traced: bool,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    num_blocks, num_tokens = 5, 11
    # One tensor for query, key and value, as a fused projection leaves them.
    width = (4 + 2) * num_kv_heads * head_size
    fused = torch.randn(num_tokens, width, device=device).to(dtype)
    _, key, value = fused.split([4 * width // 6, width // 6, width // 6], dim=1)
    key = key.view(num_tokens, num_kv_heads, head_size)
    value = value.view(num_tokens, num_kv_heads, head_size)
    rows = torch.randperm(num_tokens, device=device)[:9].int()
    slots = torch.randperm(num_blocks * block_size, device=device)[:9]
    slots[[0, 4]] = -1
    tokens = torch.randint(1 << 30, (9,), dtype=torch.int32, device=device)

    shape = (num_blocks, num_kv_heads, block_size, head_size, dtype, device, traced)
    found, expected = poisoned_pages(*shape), poisoned_pages(*shape)
    kv_write.write(found, key, value, rows, slots, tokens if traced else None)
    reference.write(expected, key, value, rows, slots, tokens)
    whole = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]
    for flat, pages in zip(whole, (found, expected), strict=True):
        flat.set_(pages.kv.untyped_storage())
    assert torch.equal(bits(whole[0]), bits(whole[1]))
    assert not torch.isnan(found.kv).all()


def test_no_entries(device: torch.device) -> None:
    pages = poisoned_pages(2, 1, 16, 64, torch.float32, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    key = torch.randn(3, 1, 64, device=device)
    kv_write.write(pages, key, key, none, none.long(), none)
    assert torch.isnan(pages.kv).all()


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    pages = poisoned_pages(2, 2, 16, 64, torch.float32, device)
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    key = torch.randn(3, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"must be \[num_tokens, 2, 64\]"):
        kv_write.write(pages, key[:, :1], key[:, :1], rows, rows.long(), rows)
    with pytest.raises(ValueError, match="dense"):
        strided = torch.randn(3, 2, 128, device=device)[..., ::2]
        kv_write.write(pages, strided, strided, rows, rows.long(), rows)
    with pytest.raises(ValueError, match="indices"):
        kv_write.write(pages, key, key, rows, rows.long(), None)
    with pytest.raises(ValueError, match="indices"):
        pages.write(key[:1], key[:1], rows.long(), rows.long(), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_past_two_gibibytes(device: torch.device) -> None:
    num_blocks = 70_000
    pages = poisoned_pages(num_blocks, 8, 16, 128, torch.bfloat16, device)
    key = torch.randn(2, 8, 128, device=device).bfloat16()
    rows = torch.tensor([1, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([(num_blocks - 1) * 16 + 3, 5], device=device)
    kv_write.write(pages, key, -key, rows, slots, rows)
    assert torch.equal(pages.kv[-1, :, 3, :128], key[1])
    assert torch.equal(pages.kv[-1, :, 3, 128:], -key[1])
    assert torch.isnan(pages.kv[1:-1]).all()
