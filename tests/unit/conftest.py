"""A model of two layers and tokens for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.llama import Llama, random_tensors
from small_model import NUM_TOKENS, TINY


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(TINY, seed=0)


@pytest.fixture(scope="module")
def model(tensors) -> Llama:
    return Llama(TINY, tensors)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=generator).tolist()
