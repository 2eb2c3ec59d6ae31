"""A whole LFM2: layers that attend, a short convolution before each, teacher-forced as `Llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from reference.attention import full_attention, rotate
from reference.cascade_attention import CascadeRun
from reference.llama import Llama


class Lfm2(Llama):
    """A model whose layer 2 i is a convolution, and layer 2 i + 1 the i-th that attends.

    Args:
        config: As in config.json.
        tensors: The weights by their Hugging Face names, in any dtype.
        dtype: float64 or float32: what everything is computed in.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        kinds = config["layer_types"]
        assert kinds == ["conv", "full_attention"] * (len(kinds) // 2)
        like_llama = {
            **config,
            "num_hidden_layers": len(kinds) // 2,
            "rms_norm_eps": config["norm_eps"],
            "tie_word_embeddings": True,
        }
        named = {**tensors, "model.norm.weight": tensors["model.embedding_norm.weight"]}
        super().__init__(like_llama, named, dtype)

    def _layer(
        self, layer: int, hidden: Tensor, rope: Tensor, cascade: CascadeRun | None
    ) -> Tensor:
        name = f"model.layers.{2 * layer}"
        hidden = hidden + self._convolve(self._norm(hidden, f"{name}.operator_norm"), name)
        hidden = hidden + self._feed(hidden, name)
        name, heads = f"model.layers.{2 * layer + 1}", self.config.num_key_value_heads
        normed = self._norm(hidden, f"{name}.operator_norm")
        query = self._project(normed, f"{name}.self_attn.q_proj")
        query = self._norm(query, f"{name}.self_attn.q_layernorm").unflatten(0, (heads, -1))
        key = self._project(normed, f"{name}.self_attn.k_proj")
        key = self._norm(key, f"{name}.self_attn.k_layernorm")
        value = self._project(normed, f"{name}.self_attn.v_proj")
        if cascade is None:
            attended = full_attention(rotate(query, rope), rotate(key, rope), value)
        else:
            attended = cascade.attend(layer, query, key, value, rope)
        attended = attended.flatten(0, 1).transpose(0, 1).flatten(1)
        hidden = hidden + attended @ self._weight(f"{name}.self_attn.out_proj").T
        return hidden + self._feed(hidden, name)

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        """A causal convolution of each channel, between two gates."""
        before, after, x = (x @ self._weight(f"{name}.conv.in_proj").T).chunk(3, dim=-1)
        weight = self._weight(f"{name}.conv.conv")
        padded = pad((before * x).T, (weight.shape[-1] - 1, 0))
        mixed = conv1d(padded, weight, groups=len(weight)).T
        return (after * mixed) @ self._weight(f"{name}.conv.out_proj").T

    def _feed(self, hidden: Tensor, name: str) -> Tensor:
        normed = self._norm(hidden, f"{name}.ffn_norm")
        gate, down, up = (self._weight(f"{name}.feed_forward.w{i}") for i in (1, 2, 3))
        return (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
