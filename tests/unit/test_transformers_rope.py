"""Layers of Transformers' own code: how they rotate is found by trying, or they are refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm_cascade.attention.transformers_rope import rotary_of, take_over
from vllm_cascade.support.rotation import RotationError

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, POSITIONS = 4, 2, 16, 32, 64


class Rotary(nn.Module):
    """Cosines and sines of `width` channels; each angle twice, unless `once`."""

    def __init__(self, width=HEAD_SIZE, pairs=False, once=False, scale=1.0):
        super().__init__()
        self.pairs, self.once, self.scale = pairs, once, scale
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, width, 2) / width))

    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq
        if not self.once:
            freqs = freqs.repeat_interleave(2, -1) if self.pairs else torch.cat((freqs, freqs), -1)
        return (freqs.cos() * self.scale).to(x.dtype), (freqs.sin() * self.scale).to(x.dtype)


def turn(x, cos, sin, interleaved):
    """[1, heads, tokens, head] rotated; cosines and sines name each angle twice."""
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if interleaved:
        other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return torch.cat((part * cos + other * sin, rest), -1)


class Layer(nn.Module):
    """An attention module as Transformers has them; a test overrides `attend`."""

    layer_idx = 0

    def __init__(self, interleaved=False, twice=lambda x: x):
        super().__init__()
        self.interleaved, self.twice = interleaved, twice
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_SIZE)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_SIZE)
        self.attn = nn.Identity()
        names = {"layer_name": "layers.0.attn", "head_size": HEAD_SIZE, "num_heads": HEADS}
        vars(self.attn).update(names, num_kv_heads=KV_HEADS)
        self.attn.impl = SimpleNamespace(num_positions=POSITIONS)

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        q, k = (
            f(hidden_states).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
            for f in (self.q, self.k)
        )
        cos, sin = (self.twice(x) for x in position_embeddings)
        q, k = self.attend(q, k, cos, sin, **kwargs)
        q, k = (x.transpose(1, 2).reshape(x.shape[2], -1) for x in (q, k))
        return self.attn.forward(q, k, k)

    def attend(self, q, k, cos, sin, **kwargs):
        return turn(q, cos, sin, self.interleaved), turn(k, cos, sin, self.interleaved)


class Decoder(nn.Module):
    """Makes one pair for all layers."""

    def __init__(self, rotary_emb, layer):
        super().__init__()
        self.rotary_emb, self.layer = rotary_emb, layer

    def forward(self, hidden_states, position_ids):
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        return self.layer(hidden_states, position_embeddings=position_embeddings)


def wrapped(decoder):
    """As much of vLLM's wrapper as is asked."""
    model = nn.Module()
    model.model = decoder
    decoder.get_decoder = lambda: decoder
    model.text_config = SimpleNamespace(hidden_size=HIDDEN)
    model.model_config = SimpleNamespace(dtype=torch.float32)
    return model


def taken(layer, rotary_emb=None):
    torch.manual_seed(0)
    return take_over(wrapped(Decoder(rotary_emb or Rotary(), layer)), layer, layer.attn)


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize(
    ("rotary", "layer"),
    [
        ({}, {}),
        ({"scale": 1.3}, {}),
        ({"pairs": True}, {"interleaved": True}),
        ({"once": True}, {"twice": lambda x: torch.cat((x, x), -1)}),
        ({}, {"interleaved": True, "twice": lambda x: x.chunk(2, -1)[0].repeat_interleave(2, -1)}),
    ],
    ids=["halves", "scaled", "pairs", "once", "pairs-of-halves"],
)
def test_how_a_layer_rotates_is_found(rotary, layer, width):
    rotary_emb, layer = Rotary(width, **rotary), Layer(**layer)
    found = taken(layer, rotary_emb)
    assert found.is_neox_style != layer.interleaved
    angles = torch.arange(POSITIONS)[:, None] * rotary_emb.inv_freq
    expected = torch.cat((angles.cos(), angles.sin()), -1) * rotary_emb.scale
    torch.testing.assert_close(found.table, expected)

    attended = []
    layer.attn.forward = lambda q, k, v: attended.append((q, k))
    hidden, positions = torch.randn(1, 5, HIDDEN), torch.arange(5).unsqueeze(0)
    layer(hidden, position_embeddings=rotary_emb(hidden, positions), attention_mask=None)
    assert torch.equal(attended[0][0], layer.q(hidden)[0])
    assert torch.equal(attended[0][1], layer.k(hidden)[0])


class Still(Layer):
    def attend(self, q, k, cos, sin, **kwargs):
        return q, k


class NormAfter(Layer):
    def attend(self, q, k, cos, sin, **kwargs):
        q, k = super().attend(q, k, cos, sin)
        return q * torch.arange(1, HEAD_SIZE + 1), k


class QueryAlone(Layer):
    def attend(self, q, k, cos, sin, **kwargs):
        return super().attend(q, k, cos, sin)[0], k


class Warm(Layer):
    def attend(self, q, k, cos, sin, position_ids):
        q, k = super().attend(q, k, cos, sin)
        return q * (1 + position_ids[:, None, :, None] // 1000), k


class Zeros(Layer):
    def attend(self, q, k, cos, sin, **kwargs):
        return q * 0, k


class OtherHeads(Layer):
    def attend(self, q, k, cos, sin, **kwargs):
        return q, q


def test_a_layer_that_does_not_rotate_is_left_as_it_is():
    layer = Still()
    assert taken(layer) is None
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (NormAfter(), "does more than rotate"),
        (QueryAlone(), "does more than rotate"),
        (Warm(), "does more than rotate"),
        (Zeros(), "has a query or a key of zeros"),
        (OtherHeads(), "attends with 64 channels where vLLM expects 2 heads of 16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_more_is_refused(layer, why):
    with pytest.raises(RotationError, match=rf"layer layers.0.attn {why}"):
        taken(layer)
    assert "forward" not in vars(layer)
    assert "forward" not in vars(layer.attn)


class Shifted(Decoder):
    def forward(self, hidden_states, position_ids):
        position_embeddings = self.rotary_emb(hidden_states, position_ids + 2)
        return self.layer(hidden_states, position_embeddings=position_embeddings)


class HandsOn(Decoder):
    def forward(self, hidden_states, position_ids):
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        return self.layer(hidden_states, position_embeddings=position_embeddings[::-1])


class Twice(Decoder):
    def forward(self, hidden_states, position_ids):
        self.rotary_emb(hidden_states, position_ids)
        return self.layer(self.rotary_emb(hidden_states, position_ids))


@pytest.mark.parametrize(
    ("decoder", "why"),
    [
        (Decoder(None, Layer()), "without a rotary embedding"),
        (Shifted(Rotary(), Layer()), "gets its rotation from `self.rotary_emb"),
        (HandsOn(Rotary(), Layer()), "gets its rotation from"),
        (Twice(Rotary(), Layer()), "makes 2 rotations"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_decoder_whose_code_does_not_show_the_pair_is_refused(decoder, why):
    with pytest.raises(RotationError, match=why):
        rotary_of(wrapped(decoder), "layer")
