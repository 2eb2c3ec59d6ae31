"""Rotation in models of vLLM's Transformers backend: found by trying what a layer does."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_cascade.support.rotation import RotationError

# Places of the tokens that a layer is tried with, of as many as a table has.
PLACES = (1, 3, 17, 40)
# A place in the text that no table reaches.
FAR = 1 << 20
# What a decoder gives its rotary embedding beside hidden states, and hands on of the result.
MADE_AND_HANDED = (
    (["position_ids"], {"position_embeddings"}),
    (["position_ids", "layer_type"], {"position_embeddings[self.config.layer_types[i]]"}),
)
# How far a rotated number may be off, as a share of the largest.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class Turn:
    """How a layer rotates query and key.

    Args:
        rotary_emb: The model's rotary embedding.
        layout: What tells this table from another of the same embedding.
        table: [num_positions, rotary_dim] cosines of a position, then its sines.
        is_neox_style: Whether channel i is paired with i + rotary_dim / 2, or 2i with 2i + 1.
    """

    rotary_emb: nn.Module
    layout: tuple[Any, ...]
    table: torch.Tensor
    is_neox_style: bool


class _CaughtError(Exception):
    """Ends a layer's forward pass where it would attend.

    Args:
        query: [num_tokens, num_heads * head_size].
        key: [num_tokens, num_kv_heads * head_size].
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a whole model that vLLM runs by Transformers' own code."""
    from vllm.model_executor.models.transformers.base import Base

    return isinstance(module, Base)


def rotary_of(model: nn.Module, layer_name: str) -> nn.Module:
    """Find the one rotary embedding of a model, from which all its layers get cosines and sines.

    Args:
        model: vLLM's wrapper of a Transformers model; its weights need not be loaded.
        layer_name: A layer's name, for the message.

    Returns:
        The decoder's rotary embedding.

    Raises:
        RotationError: The decoder has none, or does not apply it to plain positions.
    """
    decoder = model.model.get_decoder()
    rotary_emb = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary_emb, nn.Module):
        raise RotationError(layer_name, "is in a decoder without a rotary embedding")
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(decoder).forward)))
    except OSError as error:
        raise RotationError(layer_name, "is in a decoder without source code to check") from error
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) == "self.rotary_emb"]
    if len(made) != 1:
        raise RotationError(layer_name, f"is in a decoder that makes {len(made)} rotations")
    given = [ast.unparse(each) for each in made[0].args[1:]]
    given += [ast.unparse(each.value) for each in made[0].keywords]
    handed = {
        ast.unparse(each.value)
        for call in calls
        for each in call.keywords
        if each.arg == "position_embeddings"
    }
    if (given, handed) not in MADE_AND_HANDED:
        raise RotationError(layer_name, f"gets its rotation from `{ast.unparse(made[0])}`")
    return rotary_emb


def take_over(model: nn.Module, parent: nn.Module, attention: Any) -> Turn | None:
    """Have a layer of a Transformers model attend with what it has not rotated.

    The layer is tried with random hidden states, once with cosines and sines of some places and
    once with those of no rotation. The pairing and the number of channels that explain the
    difference are how it rotates.

    Args:
        model: vLLM's wrapper of the loaded Transformers model.
        parent: The module that attends; its `forward` is replaced if it rotates.
        attention: Its attention layer, which is CASCADE's.

    Returns:
        How the layer rotated; None if it does not.

    Raises:
        RotationError: The layer does more than rotate, or rotates in another way.
    """
    name = attention.layer_name
    rotary_emb = rotary_of(model, name)
    if "position_embeddings" not in inspect.signature(parent.forward).parameters:
        raise RotationError(name, "does not take its cosines and sines from the decoder")
    kinds = getattr(model.text_config, "layer_types", None)
    kind = kinds[parent.layer_idx] if kinds else None
    dtype = model.model_config.dtype
    cos, sin = _cos_sin(rotary_emb, kind, attention, dtype)
    places = torch.tensor([p for p in PLACES if p < len(cos)], device=cos.device)
    pair = cos[places].to(dtype), sin[places].to(dtype)
    # A factor that goes with the place in the text, beside the rotation, tells the two apart.
    after = _attended(model, parent, attention, pair, FAR)
    before = _attended(model, parent, attention, _neutral(pair), 0)
    if not all(x.any() for x in before):
        raise RotationError(name, "has a query or a key of zeros, so that no rotation shows")
    if _close(after, before, dtype):
        return None
    for half in _halves(cos, sin):
        for is_neox_style in (True, False):
            turned = [_rotate(x, half[0][places], half[1][places], is_neox_style) for x in before]
            if _close(after, turned, dtype):
                parent.forward = _without_rotation(parent.forward)
                table = torch.cat(half, dim=-1)
                return Turn(rotary_emb, (kind, is_neox_style, table.shape), table, is_neox_style)
    raise RotationError(name, "does more than rotate query and key before it attends")


def _cos_sin(
    rotary_emb: nn.Module, kind: str | None, attention: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all places, [num_positions, width] each, as the layer's kind gets."""
    device = next(rotary_emb.buffers()).device
    # On a GPU rotations are composed, which a rounded table does not allow.
    like = torch.empty(1, 1, 1, dtype=dtype if device.type == "cpu" else torch.float32).to(device)
    given = [like, torch.arange(attention.impl.num_positions, device=device).unsqueeze(0)]
    if "layer_type" in inspect.signature(rotary_emb.forward).parameters:
        given.append(kind)
    name = attention.layer_name
    try:
        with torch.no_grad():
            made = rotary_emb(*given)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise RotationError(
            name, f"has a rotary embedding without one position: {error}"
        ) from error
    if not isinstance(made, tuple) or len(made) != 2 or any(x.dim() != 3 for x in made):
        raise RotationError(name, "does not rotate by a pair of cosines and sines")
    return made[0][0], made[1][0]


def _neutral(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(pair[0]), torch.zeros_like(pair[1])


def _attended(
    model: nn.Module,
    parent: nn.Module,
    attention: Any,
    pair: tuple[torch.Tensor, torch.Tensor],
    first: int,
) -> list[torch.Tensor]:
    """Query and key, [num_tokens, heads, head_size] float32, that a layer attends with.

    Where it looks at the place in the text, tokens stand at `first` and behind it.
    """

    def catch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        raise _CaughtError(query, key)

    num_tokens, hidden_size = len(pair[0]), model.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, num_tokens, hidden_size, generator=generator)
    positions = first + torch.arange(num_tokens).unsqueeze(0)
    cos, sin = pair
    given = {
        "position_embeddings": (cos.unsqueeze(0), sin.unsqueeze(0)),
        "position_ids": positions.to(cos.device),
        "attention_mask": None,
    }
    accepted = inspect.signature(parent.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        given = {name: value for name, value in given.items() if name in accepted}
    attention.forward = catch
    try:
        with torch.no_grad():
            parent(hidden.to(cos.device, model.model_config.dtype), **given)
    except _CaughtError as caught:
        found = []
        for x, num_heads in (
            (caught.query, attention.num_heads),
            (caught.key, attention.num_kv_heads),
        ):
            if x.numel() != num_tokens * num_heads * attention.head_size:
                raise RotationError(
                    attention.layer_name,
                    f"attends with {x.numel() // num_tokens} channels where vLLM expects "
                    f"{num_heads} heads of {attention.head_size}",
                ) from None
            found.append(x.reshape(num_tokens, num_heads, attention.head_size).float())
        return found
    finally:
        del attention.forward
    raise RotationError(attention.layer_name, "does not attend by vLLM's attention layer")


def _halves(cos: torch.Tensor, sin: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each pair of channels once: tables name an angle once, or twice in one of two orders."""
    half = cos.shape[-1] // 2
    for first, second in ((slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
        if all(torch.equal(x[..., first], x[..., second]) for x in (cos, sin)):
            yield cos[..., first], sin[..., first]
    yield cos, sin


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool
) -> torch.Tensor:
    """Rotate the leading channels of `x` [num_tokens, heads, head_size], where there are enough."""
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    width = 2 * cos.shape[-1]
    if width > x.shape[-1]:
        return torch.full_like(x, float("nan"))
    turned, rest = x[..., :width], x[..., width:]
    a, b = turned.chunk(2, dim=-1) if is_neox_style else (turned[..., ::2], turned[..., 1::2])
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat(parts, -1) if is_neox_style else torch.stack(parts, -1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def _close(found: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> bool:
    return all(
        bool((a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max())
        for a, b in zip(found, wanted, strict=True)
    )


def _without_rotation(forward: Callable[..., Any]) -> Callable[..., Any]:
    def unrotated(*args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        return forward(*args, position_embeddings=_neutral(position_embeddings), **kwargs)

    return unrotated
