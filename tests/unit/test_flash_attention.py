"""Which layers FlashAttention-3 serves in prefill; the others attend by a kernel of CASCADE's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_cascade.attention.gpu_workspace import Shape, flash_attention


@pytest.mark.parametrize(
    ("head_size", "dtype", "sinks", "taken"),
    [
        (256, torch.bfloat16, None, True),
        (512, torch.bfloat16, None, False),
        (64, torch.float16, None, True),
        (64, torch.float32, None, False),
        (64, torch.bfloat16, torch.bfloat16, True),
        (64, torch.bfloat16, torch.float32, False),
    ],
)
def test_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
    head_size: int,
    dtype: torch.dtype,
    sinks: torch.dtype | None,
    taken: bool,
) -> None:
    flash = object()
    module = SimpleNamespace(FA3_AVAILABLE=True, flash_attn_varlen_func=flash)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = flash_attention(Shape(8, 2, head_size, dtype, sinks))
    assert found is (flash if taken else None)
