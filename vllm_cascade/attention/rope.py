"""The rotary embedding of a layer, taken out of the model so that the backend can apply it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from vllm_cascade.attention.scales import check_scales
from vllm_cascade.support.names import is_cascade
from vllm_cascade.support.rotation import RotationError, check_rotation


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotary embedding: a table by position, and which channels of a head are paired.

    Args:
        cos_sin_cache: [num_positions, rotary_dim] cosines of a position, then its sines. On a CPU
            in the model's dtype, in which vLLM rotates there. On a GPU in float32: decode composes
            two rotations into one, which a rounded table does not allow.
        is_neox_style: Whether channel i is paired with i + rotary_dim / 2, or 2i with 2i + 1.
        rotary_dim: Number of leading channels of a head that are rotated.
    """

    cos_sin_cache: torch.Tensor
    is_neox_style: bool
    rotary_dim: int

    @cached_property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [num_positions, rotary_dim / 2] float32, shared by all layers."""
        cos, sin = self.cos_sin_cache.float().chunk(2, dim=-1)
        return cos.contiguous(), sin.contiguous()

    @classmethod
    def from_vllm(cls, module: nn.Module, layer_name: str, num_positions: int) -> Rope:
        """Read one of vLLM's rotary embeddings.

        Args:
            module: The model's rotary embedding.
            layer_name: The layer's name, for the message.
            num_positions: Positions that the backend will rotate at.

        Returns:
            The embedding, its table cut to `num_positions`.

        Raises:
            RotationError: The module is of a class whose result depends on more than its table and
                the position, or its table is too short.
        """
        # The exact class counts, because a subclass may rotate differently.
        if type(module) not in _position_tables():
            raise RotationError(
                layer_name, f"has a {type(module).__name__}, which is no plain RoPE"
            )
        if len(getattr(module, "scaling_factors", ())) > 1:
            raise RotationError(layer_name, "has a rotary embedding with several scaling factors")
        table = module.cos_sin_cache
        if table.shape[0] < num_positions:
            raise RotationError(
                layer_name,
                f"has a rotary table of {table.shape[0]} positions, but this configuration needs "
                f"{num_positions}; lower cache_tokens",
            )
        if table.device.type != "cpu":
            table = module._compute_cos_sin_cache().to(table.device, torch.float32)
        return cls(table[:num_positions], module.is_neox_style, module.rotary_dim)


class Unrotated(nn.Module):
    """Stands in the model where its rotary embedding stood, and does not rotate."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query and key unchanged.

        Args:
            positions: Not used.
            query: Of any shape.
            key: Of any shape.

        Returns:
            `query` and `key`.
        """
        return query, key


def take_over(model: nn.Module) -> None:
    """Move the rotary embedding of every CASCADE layer from the model to the layer's backend.

    Layers of other backends keep their rotary embeddings.

    Args:
        model: A loaded model, changed in place.

    Raises:
        RotationError: A CASCADE layer's rotary embedding cannot be taken over.
        UnsupportedError: A CASCADE layer keeps FP8 with scales that cannot be.
    """
    from vllm.model_executor.layers.attention import Attention

    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention) and is_cascade(child.attn_backend.get_name())
    ]
    # Layers that share a rotary embedding share its tables.
    ropes: dict[tuple[nn.Module, int], Rope] = {}
    for parent, name, attention in layers:
        layer_name = attention.layer_name
        rotary_emb = getattr(parent, "rotary_emb", None)
        if not isinstance(rotary_emb, nn.Module):
            raise RotationError(layer_name, "has no rotary embedding of its own")
        check_rotation(parent, name, layer_name)
        shared = (rotary_emb, attention.impl.num_positions)
        if shared not in ropes:
            ropes[shared] = Rope.from_vllm(rotary_emb, layer_name, shared[1])
        parent.rotary_emb = Unrotated()
        attention.impl.bind_rope(ropes[shared])
        check_scales(attention)


def _position_tables() -> tuple[type, ...]:
    from vllm.model_executor.layers import rotary_embedding as vllm_rope

    return (
        vllm_rope.RotaryEmbedding,
        vllm_rope.Llama3RotaryEmbedding,
        vllm_rope.LinearScalingRotaryEmbedding,
        vllm_rope.YaRNScalingRotaryEmbedding,
        vllm_rope.DynamicNTKAlphaRotaryEmbedding,
        vllm_rope.DynamicNTKScalingRotaryEmbedding,
    )
