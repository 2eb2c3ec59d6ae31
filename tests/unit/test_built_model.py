"""A built model's CASCADE layers: which are refused, and what is taken over of the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding as vllm_rope
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

from vllm_cascade.attention.rope import Rope, Unrotated, take_over
from vllm_cascade.support.rotation import RotationError
from vllm_cascade.support.selection import check_served
from vllm_cascade.support.unsupported import UnsupportedError

HEAD_SIZE = 16
POSITIONS = 64
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def get_rope(parameters: dict) -> nn.Module:
    with set_current_vllm_config(VllmConfig()):
        return vllm_rope.get_rope(HEAD_SIZE, POSITIONS, True, parameters, dtype=torch.float32)


def rotated(rope: Rope, x: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_heads, HEAD_SIZE] rotated by their places, from 0 on."""
    cos, sin = (t[: len(x)].unsqueeze(1) for t in rope.tables)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class FakeAttention(Attention):
    """vLLM's layer without its engine, with as much of an implementation as is bound to."""

    def __init__(self, backend: str, num_positions: int = POSITIONS):
        nn.Module.__init__(self)
        self.layer_name = f"model.layers.0.{backend}"
        self.head_size = self.head_size_v = HEAD_SIZE
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
    """A layer with a cache of its own."""

    def __init__(self, backend: str, spec: Any = None):
        super().__init__(backend)
        self.spec = spec

    def get_kv_cache_spec(self, vllm_config):
        assert self.attn_backend.get_name() != "CASCADE", "its spec would say that it serves"
        return self.spec


def served_by(backend: str = "CASCADE", device: str = "cpu", ranks: int = 1) -> SimpleNamespace:
    """As much of vLLM's configuration as a built model is checked against."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=SimpleNamespace(name=backend), backend_per_kind={}
        ),
        device_config=SimpleNamespace(device_type=device, device=device),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        load_config=SimpleNamespace(device=None),
    )


def plain_layer(needs_scores: bool = False, **changes: int) -> FakeAttention:
    """A layer of CASCADE's."""
    layer = FakeAttention("CASCADE")
    layer.impl.config = SimpleNamespace(needs_scores=needs_scores, policy="blend")
    vars(layer).update(changes)
    return layer


SHAPE = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=8)


def test_a_layer_that_attends_in_full_by_itself_is_refused():
    own = [OwnAttention("CPU_ATTN", WINDOW), OwnAttention("ENCODER")]
    check_served(nn.Sequential(plain_layer(), *own), served_by())
    check_served(nn.Sequential(OwnAttention("CPU_ATTN", FULL)), served_by("CPU_ATTN"))
    for spec in (
        FULL,
        MLAAttentionSpec(**SHAPE),
        SinkFullAttentionSpec(**SHAPE, sink_len=16),
        CrossAttentionSpec(**SHAPE),
    ):
        model = nn.Sequential(plain_layer(), OwnAttention("FLASH_ATTN_DIFFKV", spec))
        with pytest.raises(UnsupportedError, match=r"layer 1.*in full by FLASH_ATTN_DIF.*Serve it"):
            check_served(model, served_by())


@pytest.mark.parametrize(
    ("layer", "where", "words"),
    [
        (OwnAttention("CASCADE"), {}, "layer 0: it is a OwnAttention, which keeps more"),
        (plain_layer(head_size_v=8), {}, "layer 0: its values have 8 channels and its keys 16"),
        (plain_layer(head_size=192, head_size_v=192), {"device": "cuda"}, "head size 192 on a GPU"),
    ],
    ids=["cache", "values", "head"],
)
def test_what_a_layer_has_of_its_own_is_checked(layer, where, words):
    with pytest.raises(UnsupportedError, match=words):
        check_served(nn.Sequential(layer), served_by(**where))


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_wide_heads_need_a_gpu_with_room_for_their_tiles(monkeypatch, capability):
    from vllm.platforms import current_platform

    given = classmethod(lambda cls, device_id=0: capability)
    monkeypatch.setattr(type(current_platform), "get_device_capability", given)
    model = nn.Sequential(plain_layer(head_size=512, head_size_v=512))
    if capability == (9, 0):
        check_served(model, served_by(device="cuda"))
        return
    with pytest.raises(UnsupportedError, match=r"head size 512 on a GPU of .* 8\.6"):
        check_served(model, served_by(device="cuda"))


def test_each_layers_own_number_of_kv_heads_is_checked():
    def model(**layer):
        parent = nn.Sequential(plain_layer(**layer))
        parent.total_num_kv_heads = 2
        return nn.Sequential(parent)

    check_served(model(needs_scores=True), served_by(ranks=2))
    check_served(model(), served_by(ranks=4))
    with pytest.raises(UnsupportedError, match="tensor_parallel_size 4 with 2 KV heads"):
        check_served(model(needs_scores=True), served_by(ranks=4))


def test_a_refusal_comes_before_weights_are_read():
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_cascade import plugin

    class Loader(BaseModelLoader):
        def __init__(self, model):
            self.model = model

        def create_model(self, vllm_config, model_config, prefix=""):
            return self.model

        def download_model(self, model_config):
            raise AssertionError

        load_weights = download_model

    class ScaledBlock(Block):
        def forward(self, positions, q, k, v):
            q, k = self.rotary_emb(positions, q, k)
            return self.attn(q * 2, k, v)

    plugin.register()
    block = ScaledBlock("CASCADE", get_rope(PLAIN))
    block.attn = plain_layer()
    dtype = SimpleNamespace(dtype=torch.float32)
    for model, error in ((block, RotationError), (plain_layer(head_size_v=8), UnsupportedError)):
        loader = Loader(nn.Sequential(model))
        with pytest.raises(error):
            loader.load_model(served_by(), dtype)
        assert "load_weights" not in vars(loader)


def test_a_layer_without_rotation_gets_ones_and_zeros():
    class Still(Block):
        def forward(self, hidden_states):
            return self.attn(hidden_states, hidden_states, hidden_states)

    model = nn.Sequential(Still("CASCADE", get_rope(PLAIN)), Block("CASCADE", get_rope(PLAIN)))
    take_over(model)
    x = torch.randn(POSITIONS, 2, HEAD_SIZE)
    still, turning = (rotated(block.attn.impl.rope, x) for block in model)
    assert torch.equal(still, x)
    assert not torch.allclose(turning[1:], x[1:])
    assert not isinstance(model[0].rotary_emb, Unrotated)


@pytest.mark.parametrize("original", [POSITIONS, POSITIONS - 1])
def test_a_temperature_is_left_out_where_it_is_one(original):
    class Warm(Block):
        do_llama_4_scaling = True
        llama_4_scaling_original_max_position_embeddings = original

        def forward(self, positions, q, k, v):
            q, k = self.rotary_emb(positions, q, k)
            if self.do_llama_4_scaling:
                q = q * positions
            return self.attn(q, k, v)

    block = Warm("CASCADE", get_rope(PLAIN))
    if original < POSITIONS:
        with pytest.raises(RotationError, match="changes the rotated"):
            take_over(block)
        return
    take_over(block)
    q = torch.ones(3, HEAD_SIZE)
    assert torch.equal(block(torch.arange(3), q, q, q), q + q)


@pytest.mark.parametrize("scale", [POSITIONS + 1, POSITIONS])
def test_a_temperature_without_rotation_is_left_out_where_it_is_one(scale):
    class Warm(Block):
        attn_temperature_tuning = True
        floor_scale = scale

        def forward(self, positions, hidden_states):
            q = hidden_states
            if self.attn_temperature_tuning:
                q = q * (positions + 1)[:, None].div(self.floor_scale).floor().add(1)
            return self.attn(q, hidden_states, hidden_states)

    block = Warm("CASCADE", None)
    if scale == POSITIONS:  # the last place has a factor of 2
        with pytest.raises(RotationError, match="uses `positions`"):
            take_over(block)
        return
    x = torch.ones(POSITIONS, HEAD_SIZE)
    before = block(torch.arange(POSITIONS), x)
    take_over(block)
    assert torch.equal(block(torch.full((POSITIONS,), 10**6), x), before)


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
    with pytest.raises(RotationError, match="one of several that a module attends with"):
        take_over(model)
