"""What a layer of vLLM's may ask of its attention, and the scales that it brings for FP8."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_cascade.attention.impl import check_layer
from vllm_cascade.attention.scales import check_scales, scales_of
from vllm_cascade.support.unsupported import UnsupportedError

LAYER = {
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "logits_soft_cap": None,
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
}


KV_DTYPES = ["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]


@pytest.mark.parametrize("kv_cache_dtype", KV_DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 0, 0.0, 30.0])
def test_a_plain_layer_is_served(kv_cache_dtype, soft_cap):
    plain = {"kv_cache_dtype": kv_cache_dtype, "logits_soft_cap": soft_cap, "chunk_lookback": -1}
    check_layer(**LAYER | plain)


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"sliding_window": 512}, "window 512 tokens"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "dtype 'fp8_e5m2'"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "dtype 'fp8_per_token_head'"),
        ({"kv_cache_dtype": "int8"}, "dtype 'int8'"),
        ({"logits_soft_cap": -30.0}, "soft-capping .-30.: a cap is a positive number"),
        ({"logits_soft_cap": float("inf")}, "soft-capping .inf"),
        ({"attn_type": "encoder"}, "encoder attention"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "layers.3.attn"}, "KV cache of layers.3.attn"),
        ({"chunk_lookback": 1}, "a layer with chunk_lookback = 1"),
    ],
)
def test_a_layer_that_is_not_plain_is_refused(spoilt, words):
    with pytest.raises(UnsupportedError, match=words):
        check_layer(**LAYER | spoilt)


def attention(key, value, quant_method=None, kv_cache_dtype="fp8"):
    """As much of a loaded attention layer of two KV heads as has to do with scales."""
    return SimpleNamespace(
        layer_name="layers.3.attn",
        kv_cache_dtype=kv_cache_dtype,
        num_kv_heads=2,
        _k_scale=torch.as_tensor(key),
        _v_scale=torch.as_tensor(value),
        quant_method=quant_method,
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (0.0, 1.0, "FP8 scale k_scale.*it is 0.0"),
        (1.0, -1.0, "FP8 scale v_scale.*it is -1.0"),
        ([1.0, float("nan")], [1.0, 1.0], "k_scale.*nan"),
        (1.0, [1.0, float("inf")], "v_scale.*inf"),
        ([1.0, 1.0, 1.0], 1.0, "layers.3.attn.*each of 2 KV heads; it has 3 numbers"),
    ],
)
def test_scales_that_fp8_cannot_use_are_refused(key, value, words):
    with pytest.raises(UnsupportedError, match=words):
        check_scales(attention(key, value))
    check_scales(attention(key, value, kv_cache_dtype="auto"))


def test_missing_scales_are_told_of_once(said, forget_once):
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    ours = "the checkpoint brings no scales"
    # vLLM has warned, or there are scales.
    check_scales(attention(1.0, 1.0, BaseKVCacheMethod(None)))
    check_scales(attention(1.0, 0.5))
    check_scales(attention([1.0, 0.5], 1.0))
    assert not said
    for _ in range(2):
        check_scales(attention(1.0, 1.0))
    assert [ours in message for message in said] == [True]


def test_scales_are_views_of_vllms_own():
    layer = attention(0.5, [1.0, 2.0])
    key, value = scales_of(layer, 2)
    layer._k_scale.fill_(4.0)
    assert key.tolist() == [4.0, 4.0] and value.tolist() == [1.0, 2.0]
    assert key.stride() == (0,) and value.stride() == (1,)
