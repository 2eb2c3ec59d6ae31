"""The rotary embedding of a layer, taken out of the model so that the backend can apply it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_cascade.attention import transformers_rope
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
        from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding

        check_rotary_class(module, layer_name)
        if isinstance(module, Phi3LongRoPEScaledRotaryEmbedding):
            return cls._from_longrope(module, layer_name, num_positions)
        table = module.cos_sin_cache
        _check_length(table.shape[0], layer_name, num_positions)
        if table.device.type != "cpu":
            table = module._compute_cos_sin_cache().to(table.device, torch.float32)
        return cls(table[:num_positions], module.is_neox_style, module.rotary_dim)

    @classmethod
    def _from_longrope(cls, module: nn.Module, layer_name: str, num_positions: int) -> Rope:
        """Take the set of factors that is made for as many positions as the backend rotates at.

        vLLM takes the set for the longest text; here positions are places, which texts do not
        pass.
        """
        original = module.original_max_position_embeddings
        if num_positions <= original:
            length, factors, scale = original, module.short_factor, module.short_mscale
        else:
            length, factors = module.max_position_embeddings, module.long_factor
            scale = module.long_mscale
        _check_length(length, layer_name, num_positions)
        stored = module.long_short_cos_sin_cache
        table = module._compute_cos_sin_cache(num_positions, factors, scale).to(stored.device)
        if stored.device.type == "cpu":
            table = table.to(stored.dtype)
        return cls(table, True, module.rotary_dim)

    @classmethod
    def without_rotation(cls, num_positions: int, head_size: int, device: torch.device) -> Rope:
        """Make the embedding of a layer that rotates nothing: ones and zeros.

        Args:
            num_positions: Positions that the backend will rotate at.
            head_size: Channels of a head.
            device: Where the table is.
        """
        ones = torch.ones(num_positions, head_size // 2, device=device, dtype=torch.float32)
        return cls(torch.cat((ones, torch.zeros_like(ones)), dim=-1), True, head_size)


def check_rotary_class(module: nn.Module, layer_name: str) -> None:
    """Refuse a rotary embedding of vLLM's whose result is not a table's by position.

    Args:
        module: The model's rotary embedding.
        layer_name: The layer's name, for the message.

    Raises:
        RotationError: The message names the class.
    """
    # The exact class counts, because a subclass may rotate differently.
    if type(module) not in _position_tables():
        raise RotationError(layer_name, f"has a {type(module).__name__}, which is no plain RoPE")
    if len(getattr(module, "scaling_factors", ())) > 1:
        raise RotationError(layer_name, "has a rotary embedding with several scaling factors")


def _check_length(length: int, layer_name: str, num_positions: int) -> None:
    if length < num_positions:
        raise RotationError(
            layer_name,
            f"has a rotary table of {length} positions, but this configuration needs "
            f"{num_positions}; lower cache_tokens",
        )


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


class _Site(NamedTuple):
    """A CASCADE layer, the module that attends with it, and the Transformers model it is in."""

    parent: nn.Module
    name: str
    attention: Any
    transformers: nn.Module | None


def check_layers(model: nn.Module) -> None:
    """Refuse a model whose code shows that a CASCADE layer's rotation cannot be taken over.

    Args:
        model: A model whose weights need not be loaded.

    Raises:
        RotationError: The message names the layer and what its code does.
        UnsupportedError: vLLM adds something to the layer's keys and values.
    """
    for site in _sites(model):
        if site.transformers is None:
            _rotary_of(site)
        else:
            transformers_rope.rotary_of(site.transformers, site.attention.layer_name)


def take_over(model: nn.Module) -> None:
    """Move the rotary embedding of every CASCADE layer from the model to the layer's backend.

    Layers of other backends keep their rotary embeddings.

    Args:
        model: A loaded model, changed in place.

    Raises:
        RotationError: A CASCADE layer's rotary embedding cannot be taken over.
        UnsupportedError: A CASCADE layer keeps FP8 with scales that cannot be.
    """
    # Layers that share a rotary embedding share its tables.
    ropes: dict[tuple[Any, ...], Rope] = {}
    for site in _sites(model):
        parent, attention = site.parent, site.attention
        num_positions, head_size = attention.impl.num_positions, attention.head_size
        rotary_emb = turn = None
        if site.transformers is None:
            rotary_emb = _rotary_of(site)
        elif turn := transformers_rope.take_over(site.transformers, parent, attention):
            rotary_emb = turn.rotary_emb
        shared = (rotary_emb, turn and turn.layout, num_positions, head_size)
        if shared not in ropes:
            if turn is not None:
                ropes[shared] = Rope(turn.table, turn.is_neox_style, turn.table.shape[-1])
            elif rotary_emb is not None:
                ropes[shared] = Rope.from_vllm(rotary_emb, attention.layer_name, num_positions)
            else:
                # vLLM's layer has its scales as buffers; weights may be kept on a CPU.
                tensors = chain(attention.buffers(), parent.parameters(), (torch.empty(0),))
                device = next(tensors).device
                ropes[shared] = Rope.without_rotation(num_positions, head_size, device)
        if site.transformers is None and rotary_emb is not None:
            parent.rotary_emb = Unrotated()
        attention.impl.bind_rope(ropes[shared])
        check_scales(attention)


def _sites(model: nn.Module) -> list[_Site]:
    from vllm.model_executor.layers.attention import Attention

    roots = [each for each in model.modules() if transformers_rope.is_transformers(each)]
    inside = {part: root for root in roots for part in root.modules()}
    return [
        _Site(parent, name, child, inside.get(parent))
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention) and is_cascade(child.attn_backend.get_name())
    ]


def _rotary_of(site: _Site) -> nn.Module | None:
    """The rotary embedding that one of vLLM's own models applies before a layer, if it does."""
    parent, name, attention, _ = site
    layer_name = attention.layer_name
    if isinstance(parent, nn.ModuleList | nn.ModuleDict):
        raise RotationError(layer_name, "is one of several that a module attends with")
    _switch_off_temperature(parent, attention)
    _switch_off_fusion(parent)
    if not check_rotation(parent, name, layer_name):
        return None
    rotary_emb = getattr(parent, "rotary_emb", None)
    if not isinstance(rotary_emb, nn.Module):
        raise RotationError(layer_name, "has no rotary embedding of its own")
    check_rotary_class(rotary_emb, layer_name)
    return rotary_emb


def _switch_off_temperature(parent: nn.Module, attention: Any) -> None:
    """Leave out a factor on queries that is exactly 1 at every place that the cache has.

    Ministral 3 scales queries by their place in the text, 1 + beta * log(1 + floor(place / n)), and
    Llama 4 those of layers without rotation, 1 + beta * log(1 + floor((place + 1) / n)).
    """
    num_positions = attention.impl.num_positions
    original = getattr(parent, "llama_4_scaling_original_max_position_embeddings", 0)
    if getattr(parent, "do_llama_4_scaling", False) and num_positions <= original:
        parent.do_llama_4_scaling = False
    floor_scale = getattr(parent, "floor_scale", 0)
    if getattr(parent, "attn_temperature_tuning", False) and num_positions < floor_scale:
        parent.attn_temperature_tuning = False


def _switch_off_fusion(parent: nn.Module) -> None:
    """Have a model rotate in an operator of its own, which can be left out.

    On a GPU Qwen3-Next and Qwen3.5 normalize, rotate and split off a gate in one operator.
    """
    if getattr(parent, "use_fused_qk_norm_rope_gate", False):
        parent.use_fused_qk_norm_rope_gate = False


def _position_tables() -> tuple[type, ...]:
    from vllm.model_executor.layers import rotary_embedding as vllm_rope

    return (
        vllm_rope.RotaryEmbedding,
        vllm_rope.Llama3RotaryEmbedding,
        vllm_rope.LinearScalingRotaryEmbedding,
        vllm_rope.YaRNScalingRotaryEmbedding,
        vllm_rope.DynamicNTKAlphaRotaryEmbedding,
        vllm_rope.DynamicNTKScalingRotaryEmbedding,
        vllm_rope.Phi3LongRoPEScaledRotaryEmbedding,
        # Channels that are not rotated have an angle of zero.
        vllm_rope.Gemma4RotaryEmbedding,
        # A text's three positions are equal; `validate` refuses models that are given images.
        vllm_rope.MRotaryEmbedding,
    )
