"""The rotary embedding taken out of the model: which are taken, and that the table is all of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding as vllm_rope
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_cascade.attention.rope import Rope, Unrotated, take_over
from vllm_cascade.support.rotation import RotationError, check_rotation
from vllm_cascade.support.selection import check_served
from vllm_cascade.support.unsupported import UnsupportedError

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
    ],
    ids=lambda parameters: "-".join(str(value) for value in parameters.values()),
)
def test_the_table_and_the_position_say_it_all(parameters, is_neox_style):
    module = get_rope(parameters, is_neox_style)
    rope = Rope.from_vllm(module, "layer", POSITIONS)
    positions = torch.randperm(POSITIONS)[:19]
    query, key = torch.randn(19, 4, HEAD_SIZE), torch.randn(19, 2, HEAD_SIZE)
    expected = module.forward_native(positions, query.clone(), key.clone())
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
        "MRotaryEmbedding",
        "Phi3LongRoPEScaledRotaryEmbedding",
        "DualChunkRotaryEmbedding",
        "FourierRotaryEmbedding",
        "Gemma4RotaryEmbedding",
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
    check_rotation(layer, "attn", "layer")


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Flagged(rotates=True, window=None, scales=True), "changes the rotated query or key: `q ="),
        (Flagged(rotates=False, window=None, scales=False), "rotates query and key 0 times"),
        (NormAfter(), "changes the rotated query or key: `k = self.k_norm"),
        (Conditional(), "rotates by `if positions"),
        (Swapped(), "changes the rotated"),
        (KeyOnly(), "changes the rotated|does not attend"),
        (Twice(), "rotates query and key 2 times"),
        (ScaledInCall(), "changes the rotated"),
        (Elsewhere(), "rotates query and key 0 times"),
        (Unused(), "does not attend"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_rotation_is_refused(layer, why):
    with pytest.raises(RotationError, match=why) as refused:
        check_rotation(layer, "attn", "model.layers.3.attn")
    for part in ("CASCADE cannot serve", "model.layers.3.attn", "--attention-backend CASCADE"):
        assert part in str(refused.value)


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
        ("granite", "GraniteAttention", {"use_rope": False}, False),
        ("deepseek_v2", "DeepseekV2Attention", {"q_lora_rank": None}, False),
    ],
)
def test_vllm_models(module, name, flags, taken):
    from importlib import import_module

    model = import_module(f"vllm.model_executor.models.{module}")
    layer = Layer.__new__(type("Bare", (getattr(model, name),), {}))
    nn.Module.__init__(layer)
    vars(layer).update(flags)
    if taken:
        check_rotation(layer, "attn", "layer")
    else:
        with pytest.raises(RotationError):
            check_rotation(layer, "attn", "layer")


class FakeAttention(Attention):
    """vLLM's layer without its engine, with as much of an implementation as is bound to."""

    def __init__(self, backend: str, num_positions: int = POSITIONS):
        nn.Module.__init__(self)
        self.layer_name = f"model.layers.0.{backend}"
        self.kv_cache_dtype = "auto"
        self.attn_backend = type("Backend", (), {"get_name": staticmethod(lambda: backend)})
        self.impl = type(
            "Impl", (), {"bind_rope": lambda self, rope: setattr(self, "rope", rope)}
        )()
        self.impl.num_positions = num_positions

    def forward(self, q, k, v):
        return q + k


class Block(nn.Module):
    def __init__(self, backend: str, rotary_emb: nn.Module | None):
        super().__init__()
        self.rotary_emb = rotary_emb
        self.attn = FakeAttention(backend)

    def forward(self, positions, q, k, v):
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v)


def test_cascade_layers_hand_over_and_others_keep_theirs():
    shared = get_rope(PLAIN)
    model = nn.Sequential(*(Block(name, shared) for name in ("CASCADE", "CPU_ATTN", "CASCADE")))
    take_over(model)
    for block in (model[0], model[2]):
        assert isinstance(block.rotary_emb, Unrotated)
        assert block.attn.impl.rope.cos_sin_cache.data_ptr() == shared.cos_sin_cache.data_ptr()
    assert model[1].rotary_emb is shared
    assert not hasattr(model[1].attn.impl, "rope")


class OwnAttention(FakeAttention):
    """A layer whose backend the model named itself."""

    def __init__(self, backend: str, spec: Any):
        super().__init__(backend)
        self.spec = spec

    def get_attn_backend(self):
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config):
        assert self.attn_backend.get_name() != "CASCADE", "its spec would say that it serves"
        return self.spec


def test_a_layer_that_attends_in_full_by_itself_is_refused():
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=8)

    def check(*layers: tuple[str, Any], backend: str = "CASCADE") -> None:
        chosen = SimpleNamespace(backend=SimpleNamespace(name=backend), backend_per_kind={})
        model = nn.Sequential(*(OwnAttention(*layer) for layer in layers))
        check_served(model, SimpleNamespace(attention_config=chosen))

    check(("CASCADE", None), ("CPU_ATTN", window), ("ENCODER", None))
    check(("CASCADE", None), ("CPU_ATTN", full), backend="CPU_ATTN")
    with pytest.raises(UnsupportedError, match=r"layer 1.*in full by FLASH_ATTN_DIFFKV.*Serve it"):
        check(("CASCADE", None), ("FLASH_ATTN_DIFFKV", full))


def test_a_model_that_was_taken_over_still_compiles():
    block = Block("CASCADE", get_rope(PLAIN))
    take_over(block)
    positions, q, k = torch.arange(5), torch.randn(5, 32), torch.randn(5, 32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(positions, q, k, k), q + k)


def test_a_layer_that_changes_what_it_rotated_is_refused_and_left_as_it_is():
    class ScaledBlock(Block):
        def forward(self, positions, q, k, v):
            q, k = self.rotary_emb(positions, q, k)
            return self.attn(q * 2, k, v)

    block = ScaledBlock("CASCADE", get_rope(PLAIN))
    with pytest.raises(RotationError, match="changes the rotated"):
        take_over(block)
    assert not isinstance(block.rotary_emb, Unrotated)


@pytest.mark.parametrize("rotary_emb", [None, nn.Identity(), Unrotated()])
def test_a_layer_without_a_rope_of_its_own_is_refused(rotary_emb):
    with pytest.raises(RotationError, match=r"model\.layers\.0\.CASCADE has"):
        take_over(Block("CASCADE", rotary_emb))


def test_layers_in_a_list_are_refused():
    model = Block("CPU_ATTN", get_rope(PLAIN))
    model.attn = nn.ModuleList([FakeAttention("CASCADE")])
    with pytest.raises(RotationError, match="no rotary embedding of its own"):
        take_over(model)
