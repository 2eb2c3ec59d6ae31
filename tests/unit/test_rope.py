"""The rotary embedding taken out of the model: which are taken, and that the table is all of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding as vllm_rope

from vllm_cascade.attention.rope import Rope
from vllm_cascade.support.rotation import RotationError, check_rotation

HEAD_SIZE = 16
POSITIONS = 64
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MROPE = {"mrope_section": [2, 3, 3]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def get_rope(parameters: dict, is_neox_style: bool = True) -> nn.Module:
    with set_current_vllm_config(VllmConfig()):
        return vllm_rope.get_rope(
            HEAD_SIZE, POSITIONS, is_neox_style, parameters, dtype=torch.float32
        )


def rotate(rope: Rope, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_heads, HEAD_SIZE] rotated by nothing but the table and the positions."""
    cos, sin = rope.cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated, rest = x[..., : rope.rotary_dim], x[..., rope.rotary_dim :]
    if rope.is_neox_style:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, rest), dim=-1)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [
        PLAIN,
        PLAIN | {"partial_rotary_factor": 0.5},
        PLAIN | {"rope_type": "linear", "factor": 2.0},
        PLAIN | {"rope_type": "dynamic", "factor": 2.0},
        PLAIN | {"rope_type": "dynamic", "alpha": 1000.0},
        PLAIN | LLAMA3,
        PLAIN | YARN,
        PLAIN | YARN | {"attention_factor": 1.3},
        PLAIN | MROPE,
        PLAIN | MROPE | {"mrope_interleaved": True},
        PLAIN | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ],
    ids=lambda parameters: "-".join(str(value) for value in parameters.values()),
)
def test_the_table_and_the_position_say_it_all(parameters, is_neox_style):
    module = get_rope(parameters, is_neox_style)
    rope = Rope.from_vllm(module, "layer", POSITIONS)
    positions = torch.randperm(POSITIONS)[:19]
    query, key = torch.randn(19, 4, HEAD_SIZE), torch.randn(19, 2, HEAD_SIZE)
    # Of a text each token's three positions are equal.
    given = positions.expand(3, -1) if "mrope_section" in parameters else positions
    expected = module.forward_native(given, query.clone(), key.clone())
    for x, rotated in zip((query, key), expected, strict=True):
        torch.testing.assert_close(rotate(rope, x, positions), rotated, rtol=1e-6, atol=1e-6)


def test_a_subclass_is_refused():
    class OtherRotation(vllm_rope.RotaryEmbedding):
        pass

    with set_current_vllm_config(VllmConfig()):
        module = OtherRotation(HEAD_SIZE, HEAD_SIZE, POSITIONS, 10000.0, True, torch.float32)
    with pytest.raises(RotationError, match=r"layers\.3\.attn has a OtherRotation"):
        Rope.from_vllm(module, "layers.3.attn", POSITIONS)


@pytest.mark.parametrize(
    "name",
    [
        "DualChunkRotaryEmbedding",
        "FourierRotaryEmbedding",
        "DeepseekScalingRotaryEmbedding",
        "NTKScalingRotaryEmbedding",
    ],
)
def test_other_rotations_are_refused(name):
    module = object.__new__(getattr(vllm_rope, name))
    with pytest.raises(RotationError, match=f"{name}, which is no plain RoPE"):
        Rope.from_vllm(module, "layer", 8)


def test_several_scaling_factors_are_refused():
    with set_current_vllm_config(VllmConfig()):
        module = vllm_rope.LinearScalingRotaryEmbedding(
            HEAD_SIZE, HEAD_SIZE, POSITIONS, 10000.0, True, [2.0, 4.0], torch.float32
        )
    with pytest.raises(RotationError, match="several scaling factors"):
        Rope.from_vllm(module, "layer", 8)


def test_a_short_table_is_refused():
    module = get_rope(PLAIN)
    assert Rope.from_vllm(module, "layer", POSITIONS).cos_sin_cache.shape == (POSITIONS, HEAD_SIZE)
    with pytest.raises(RotationError, match=f"table of {POSITIONS} positions.*{POSITIONS + 1}"):
        Rope.from_vllm(module, "layer", POSITIONS + 1)


@pytest.mark.parametrize(("num_positions", "factors"), [(16, "short"), (17, "long")])
def test_longrope_by_the_factors_for_as_many_positions_as_the_cache_has(num_positions, factors):
    half = HEAD_SIZE // 2
    parameters = PLAIN | {
        "rope_type": "longrope",
        "short_factor": [1.0 + i for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)],
        "original_max_position_embeddings": 16,
    }
    vllm_config = VllmConfig()
    # vLLM goes by the longest text.
    vllm_config.model_config = SimpleNamespace(max_model_len=16 if factors == "short" else 17)
    with set_current_vllm_config(vllm_config):
        module = vllm_rope.get_rope(HEAD_SIZE, POSITIONS, True, parameters, dtype=torch.float32)
        vllm_rope._ROPE_DICT.clear()
    module.use_long_rope = factors == "long"
    rope = Rope.from_vllm(module, "layer", num_positions)
    assert len(rope.cos_sin_cache) == num_positions
    positions, x = torch.arange(num_positions), torch.randn(num_positions, 2, HEAD_SIZE)
    expected, _ = module(positions, x.flatten(1), x.flatten(1))
    found = rotate(rope, x, positions)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(RotationError, match="table of 64 positions"):
        Rope.from_vllm(module, "layer", POSITIONS + 1)


class Layer(nn.Module):
    """An attention module as vLLM's models have them; a test overrides `forward`."""

    def __init__(self, **flags):
        super().__init__()
        self.rotary_emb = nn.Identity()
        self.attn = nn.Identity()
        vars(self).update(flags)

    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        q = self.q_norm(q)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        return self.o_proj(attn_output)


class Flagged(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        if self.rotates or self.window is not None:
            q, k = self.rotary_emb(positions, q, k)
        if self.scales:
            q = q * self.scale(positions)
        return self.o_proj(self.attn(q, k, v))


class NormAfter(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        q, k = self.rotary_emb(positions, q, k)
        k = self.k_norm(k)
        return self.attn(q, k, v)


class Conditional(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        if positions.shape[0] > 1:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v)


class Swapped(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(k, q, v)


class KeyOnly(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        _, k = self.rotary_emb(positions, k, k)
        return self.attn(q, k, v)


class Twice(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        q, k = self.rotary_emb(positions, q, k)
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v)


class ScaledInCall(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v) + k


class Elsewhere(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.project_and_rotate(positions, hidden_states)
        return self.attn(q, k, v)


class Unused(Layer):
    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)
        _a, _b = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(),
        Flagged(rotates=True, window=None, scales=False),
        Flagged(rotates=False, window=7, scales=False),
    ],
)
def test_a_rotation_that_goes_straight_into_attention_is_taken(layer):
    assert check_rotation(layer, "attn", "layer")


class Named(Layer):
    def forward(self, positions, hidden_states, **kwargs):
        del positions
        q, k, v = self.qkv_proj(hidden_states)
        q, k = self.normalized(q, k)
        return self.attn(q * 2, k, v)


@pytest.mark.parametrize(
    "layer", [Flagged(rotates=False, window=None, scales=False), Named()], ids=["flagged", "named"]
)
def test_a_layer_that_knows_no_position_does_not_rotate(layer):
    assert check_rotation(layer, "attn", "layer") is False


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Flagged(rotates=True, window=None, scales=True), "changes the rotated query or key: `q ="),
        (
            Flagged(rotates=False, window=None, scales=True),
            "uses `positions` by `q = q \\* self.scale",
        ),
        (NormAfter(), "changes the rotated query or key: `k = self.k_norm"),
        (Conditional(), "rotates by `if positions"),
        (Swapped(), "changes the rotated"),
        (KeyOnly(), "changes the rotated|does not attend"),
        (Twice(), "rotates query and key 2 times"),
        (ScaledInCall(), "changes the rotated"),
        (Elsewhere(), "uses `positions` by `q, k, v = self.project_and_rotate"),
        (Unused(), "does not attend"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_rotation_is_refused(layer, why):
    with pytest.raises(RotationError, match=why) as refused:
        check_rotation(layer, "attn", "model.layers.3.attn")
    for part in ("CASCADE cannot serve", "model.layers.3.attn", "--attention-backend CASCADE"):
        assert part in str(refused.value)


GATED = {"attn_output_gate": True}
FUSED = "use_fused_qk_norm_rope_gate"
NOPE_SCALED = {"rotary_emb": None, "qk_norm": None, "attn_temperature_tuning": True, "nope": True}


@pytest.mark.parametrize(
    ("module", "name", "flags", "taken"),
    [
        ("llama", "LlamaAttention", {}, True),
        ("qwen2", "Qwen2Attention", {"qk_norm": False}, True),
        ("qwen3", "Qwen3Attention", {}, True),
        ("mixtral", "MixtralAttention", {}, True),
        ("mistral", "MistralAttention", {"do_llama_4_scaling": False}, True),
        ("mistral", "MistralAttention", {"do_llama_4_scaling": True}, False),
        ("granite", "GraniteAttention", {"use_rope": True}, True),
        ("granite", "GraniteAttention", {"use_rope": False}, None),
        ("commandr", "CohereAttention", {"v1": False, "sliding_window": 8, "use_qk_norm": 0}, True),
        ("commandr", "CohereAttention", {"v1": False, "sliding_window": 0, "use_qk_norm": 0}, None),
        ("jamba", "JambaAttentionDecoderLayer", {}, None),
        ("falcon_h1", "FalconH1AttentionDecoderLayer", {}, True),
        ("nemotron_h", "NemotronHAttention", {}, None),
        ("granitemoehybrid", "GraniteMoeHybridAttention", {"rotary_emb": None}, None),
        ("granitemoehybrid", "GraniteMoeHybridAttention", {"rotary_emb": nn.Identity()}, True),
        ("lfm2", "Lfm2Attention", {}, True),
        ("lfm2_moe", "Lfm2MoeAttention", {}, True),
        ("olmo_hybrid", "OlmoHybridAttention", {"_use_rope": True}, True),
        ("qwen3_next", "Qwen3NextAttention", {**GATED, FUSED: False}, True),
        ("qwen3_next", "Qwen3NextAttention", {**GATED, FUSED: True}, False),
        ("llama4", "Llama4Attention", NOPE_SCALED, False),
        ("llama4", "Llama4Attention", NOPE_SCALED | {"attn_temperature_tuning": False}, None),
        ("deepseek_v2", "DeepseekV2Attention", {"q_lora_rank": None}, False),
    ],
)
def test_vllm_models(module, name, flags, taken):
    from importlib import import_module

    model = import_module(f"vllm.model_executor.models.{module}")
    layer = Layer.__new__(type("Bare", (getattr(model, name),), {}))
    nn.Module.__init__(layer)
    vars(layer).update(flags)
    if taken is not False:
        assert check_rotation(layer, "attn", "layer") == bool(taken)
    else:
        with pytest.raises(RotationError):
            check_rotation(layer, "attn", "layer")
