"""The rotary embedding of a layer, taken out of the model so that the backend can apply it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from vllm_cascade.support.names import is_cascade
from vllm_cascade.support.rotation import RotationError, check_rotation


@dataclass(frozen=True, eq=False)
class Rope:
    """What it takes to rotate a head: a table by position, and how its rows are laid out.

    Args:
        cos_sin_cache: [num_positions, rotary_dim]; a row is the cosines, then the sines. On
            a CPU in the model's dtype, as vLLM rotates there; on a GPU in float32, because decode
            composes rotations, which a rounded table does not allow.
        is_neox_style: Whether element i is paired with i + rotary_dim / 2, or 2i with 2i + 1.
        rotary_dim: Leading elements of a head that are rotated.
    """

    cos_sin_cache: torch.Tensor
    is_neox_style: bool
    rotary_dim: int

    @cached_property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [num_positions, rotary_dim / 2], float32; made once for all layers."""
        cos, sin = self.cos_sin_cache.float().chunk(2, dim=-1)
        return cos.contiguous(), sin.contiguous()

    @classmethod
    def from_vllm(cls, module: nn.Module, layer_name: str, num_positions: int) -> Rope:
        """Read one of vLLM's rotary embeddings.

        Args:
            module: The model's rotary embedding.
            layer_name: For the message.
            num_positions: Positions the backend will rotate at.

        Raises:
            RotationError: Not one of the classes whose result depends on the table and the position
                alone, or its table is too short.
        """
        # By exact class: a subclass may rotate differently.
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
    """Stands where the model's rotary embedding stood; returns query and key as they come."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


def take_over(model: nn.Module) -> None:
    """Move the rotary embedding of every CASCADE layer from the model to the layer's backend.

    Layers of other backends keep theirs. A model without CASCADE layers is left as it is.

    Args:
        model: A loaded model.

    Raises:
        RotationError: A CASCADE layer's rotary embedding cannot be taken over.
    """
    from vllm.model_executor.layers.attention import Attention

    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention) and is_cascade(child.attn_backend.get_name())
    ]
    # Layers that share a module share its tables.
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
