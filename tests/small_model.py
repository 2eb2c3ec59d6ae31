"""The model, the parameters and the tolerance of the oracle's own tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reference.cascade import CascadeParameters

TINY = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
}
NUM_TOKENS = 187


def parameters(**changes: object) -> CascadeParameters:
    small = CascadeParameters(
        block_size=4,
        num_sink_tokens=4,
        cache_tokens=48,
        num_sub_caches=3,
        stride=16,
        selection_window=2,
        score_decay=0.98,
    )
    return replace(small, **changes)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float64 sums, which may depend on where a tensor lies."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
