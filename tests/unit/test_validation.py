"""Each refusal that a configuration shows, on stand-ins for vLLM's objects."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from transformers import LlamaConfig
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_cascade import plugin
from vllm_cascade.attention.impl import check_layer
from vllm_cascade.attention.scales import check_scales, scales_of
from vllm_cascade.structure.config import ConfigError
from vllm_cascade.support import resolved
from vllm_cascade.support import validate as validation
from vllm_cascade.support.hybrid import delegate_windows
from vllm_cascade.support.resolved import resolve_options
from vllm_cascade.support.selection import check_selection, selects_cascade
from vllm_cascade.support.states import leave_states
from vllm_cascade.support.unsupported import UnsupportedError
from vllm_cascade.support.validate import log_prefix_caching, validate

LAYER = {
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "logits_soft_cap": None,
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
}


class FakeModel(SimpleNamespace):
    """As much of vLLM's `ModelConfig` as is asked."""

    def get_sliding_window(self):
        return self.sliding_window

    def get_total_num_kv_heads(self):
        return 2

    def get_head_size(self):
        return self.head_size

    def using_transformers_backend(self):
        return self.model_impl == "transformers"


@pytest.fixture
def served(monkeypatch):
    """A configuration that CASCADE serves, for a test to spoil."""
    plugin.register()
    for module in (validation, resolved):
        monkeypatch.setattr(module, "position_limit", lambda model_config: 4096)
    text = LlamaConfig(max_position_embeddings=4096)
    model = FakeModel(
        runner_type="generate",
        attn_type="decoder",
        head_size=64,
        use_mla=False,
        model_impl="vllm",
        sliding_window=None,
        attention_chunk_size=None,
        uses_alibi=False,
        uses_mrope=False,
        multimodal_config=None,
        is_mm_prefix_lm=False,
        rswa_window=None,
        hf_text_config=text,
        dtype=torch.float32,
        max_model_len=4096,
        original_max_model_len=None,
    )
    cascade = plugin.register_name()
    return SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=cascade, backend_per_kind={}, use_non_causal=False
        ),
        additional_config={},
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=model,
        cache_config=SimpleNamespace(
            block_size=128,
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            kv_sharing_fast_prefill=False,
            enable_prefix_caching=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )


def rope(**parameters):
    return {
        "hf_text_config.rope_parameters": {"rope_theta": 1e4, "rope_type": "default"} | parameters
    }


MIXED = {
    "sliding_window": 512,
    "hf_text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# What is spoilt (a path in the configuration, or in the model's) -> words of the message.
SPOILT = [
    ({"device_config.device_type": "xpu"}, "a model on 'xpu'.*NVIDIA"),
    ({"runner_type": "pooling"}, "runner 'pooling'"),
    ({"attn_type": "encoder_decoder"}, "type 'encoder_decoder'"),
    ({"attn_type": "encoder_only"}, "type 'encoder_only'"),
    ({"use_mla": True}, "MLA.*latent"),
    ({"hf_text_config.v_head_dim": 128}, "v_head_dim = 128 and a head size of 64.*of their own"),
    ({"hf_text_config.v_channels": 32}, "v_channels = 32"),
    ({"sliding_window": 512}, "sliding-window layers alone .window 512 tokens"),
    (
        {"sliding_window": 512, "hf_text_config.layer_types": ["sliding_attention"] * 2},
        "sliding-window layers alone .window 512 tokens",
    ),
    (MIXED | {"max_model_len": 4097}, "max_model_len 4097 .*--max-model-len 4096 or less"),
    (
        MIXED
        | {
            "max_model_len": 3000,
            "hf_text_config.max_position_embeddings": 2048,
            "hf_text_config.rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
        "--max-model-len 2048 or less",
    ),
    (MIXED | {"cache_config.block_size": 16}, "block size 16 .*on a CPU.*multiples of 32"),
    (
        {
            "hf_text_config.rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "ntk"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            }
        },
        "RoPE of type 'ntk'",
    ),
    ({"attention_chunk_size": 8192}, "chunked local attention .attention_chunk_size 8192"),
    ({"uses_alibi": True}, "ALiBi"),
    ({"hf_text_config.rope_parameters": None}, "without RoPE parameters"),
    ({"hf_text_config.position_embedding_type": "learned"}, "type 'learned'"),
    (
        {"uses_mrope": True, "multimodal_config": SimpleNamespace(language_model_only=False)},
        "M-RoPE with images.*by its side.*Use --language-model-only",
    ),
    (
        {"sliding_window": 512, "hf_text_config.hybrid_layer_pattern": [0, 1]},
        "sliding-window layers by hybrid_layer_pattern.*layer_types",
    ),
    (
        {"hf_text_config.dual_chunk_attention_config": {"chunk_size": 8192}},
        "dual chunk attention",
    ),
    (rope(rope_type="ntk"), "RoPE of type 'ntk'"),
    (rope(rope_type="something_new"), "RoPE of type 'something_new'"),
    (rope(use_fope=True), "Fourier"),
    ({"hf_text_config.attn_temperature_tuning": True}, "attn_temperature_tuning"),
    ({"hf_text_config.use_logn_attn": True}, "use_logn_attn"),
    ({"hf_text_config.attn_logit_softcapping": 50.0}, "logit soft-capping .50"),
    ({"hf_text_config.num_kv_shared_layers": 4}, "num_kv_shared_layers = 4"),
    ({"hf_text_config.use_cla": True}, "use_cla"),
    ({"cache_config.kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill.*Leave the flag out"),
    (
        {
            "parallel_config.tensor_parallel_size": 4,
            "additional_config": {"cascade": {"policy": "blend"}},
        },
        "4 with 2 KV heads and policy 'blend'.*size 2 or less",
    ),
    ({"parallel_config.decode_context_parallel_size": 2}, "Leave out --decode-context-parallel"),
    ({"parallel_config.prefill_context_parallel_size": 2}, "Leave out --prefill-context-parallel"),
    (
        {"speculative_config": SimpleNamespace(method="eagle3")},
        "method 'eagle3': .* KV cache of their own.* method \"ngram\".*--speculative-config",
    ),
    ({"speculative_config": SimpleNamespace(method="medusa")}, "'medusa': nobody has tried"),
    (
        {
            "speculative_config": SimpleNamespace(method="ngram"),
            "additional_config": {"cascade": {"policy": "blend"}},
        },
        "speculative decoding with policy 'blend'.*a policy without attention scores",
    ),
    ({"kv_transfer_config": object()}, "KV connector.*--kv-transfer-config"),
    ({"cache_config.cache_dtype": "fp8_e5m2"}, "dtype 'fp8_e5m2'.*--kv-cache-dtype auto or fp8"),
    ({"cache_config.cache_dtype": "nvfp4"}, "dtype 'nvfp4'"),
    (
        {
            "cache_config.cache_dtype": "fp8",
            "cache_config.kv_cache_dtype_skip_layers": ["0", "sliding_window"],
        },
        "layers left out .0, sliding_window.*Leave out --kv-cache-dtype-skip-layers",
    ),
    ({"cache_config.cache_dtype": "bfloat16"}, "dtype 'bfloat16'"),
    ({"original_max_model_len": -1}, "auto-fit.*--max-model-len as a number"),
    ({"dtype": torch.float64}, "dtype not supported"),
    ({"is_mm_prefix_lm": True}, "image tokens attend in both.*--language-model-only"),
    ({"rswa_window": 8}, "R-SWA not supported"),
    ({"attention_config.use_non_causal": True}, "non-causal attention not supported"),
    ({"attention_config.backend_per_kind": {"full_attention": "CPU_ATTN"}}, "full_attention = CPU"),
    ({"attention_config.backend_per_kind": {"sliding_window": "CASCADE"}}, "sliding_window = CAS"),
    ({"additional_config": "a text"}, "additional_config = 'a text'.*JSON object"),
]


def spoil(vllm_config, path, value):
    owner = vllm_config
    *parents, name = path.split(".")
    if not hasattr(owner, parents[0] if parents else name):
        owner = owner.model_config
    for parent in parents:
        owner = getattr(owner, parent)
    if name == "backend_per_kind":
        value = {kind: SimpleNamespace(name=backend) for kind, backend in value.items()}
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


@pytest.mark.parametrize(
    ("spoilt", "capability", "words"),
    [
        ({}, (7, 5), r"compute capability 7\.5: .*8\.0"),
        ({}, None, "compute capability unknown"),
        (
            {"cache_config.cache_dtype": "fp8"},
            (8, 6),
            r"'fp8' on a GPU of compute capability 8\.6: .*8\.9.*--kv-cache-dtype auto",
        ),
        ({"head_size": 72}, (9, 0), "head size 72 on a GPU.*64, 80, 96, 128, 256"),
        ({"cache_config.block_size": 256}, (9, 0), "block size 256 .*--block-size"),
        (
            {
                "additional_config.cascade": {
                    "cache_tokens": 8192,
                    "num_sub_caches": 2,
                    "stride": 2048,
                    "selection_window": 2048,
                }
            },
            (9, 0),
            "selection_window 2048 on a GPU.*1024",
        ),
        (
            {"model_config.max_model_len": 10**10},
            (9, 0),
            "10000000000 in strides of 1024 on a GPU.*--max-model-len 2147483648 or less",
        ),
    ],
)
def test_refused_on_a_gpu(served, monkeypatch, spoilt, capability, words):
    from vllm.platforms import current_platform

    monkeypatch.setattr(
        type(current_platform),
        "get_device_capability",
        classmethod(lambda cls, device_id=0: capability),
    )
    for module in (validation, resolved):
        monkeypatch.setattr(module, "position_limit", lambda model_config: 1 << 16)
    served.model_config.max_model_len = 1 << 16
    served.device_config.device_type = "cuda"
    served.cache_config.block_size = 16
    for path, value in spoilt.items():
        spoil(served, path, value)
    with pytest.raises((UnsupportedError, ConfigError), match=words):
        validate(served)


def test_what_the_fixture_describes_is_served(served):
    validate(served)


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu"])
@pytest.mark.parametrize("policy", ["distinct", "window"])
def test_drafts_from_the_text_are_served(served, method, policy):
    served.speculative_config = SimpleNamespace(method=method)
    served.additional_config = {"cascade": {"policy": policy}}
    validate(served)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("policy", ["distinct", "window", "blend", "paper"])
def test_fp8_is_served(served, dtype, policy):
    served.cache_config.cache_dtype = dtype
    served.additional_config = {"cascade": {"policy": policy}}
    validate(served)


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


@pytest.mark.parametrize(
    ("spoilt", "words"),
    SPOILT,
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_refused(served, spoilt, words):
    for path, value in spoilt.items():
        spoil(served, path, value)
    with pytest.raises(UnsupportedError) as refused:
        validate(served)
    message = str(refused.value)
    assert re.search(words, message), message
    # What was asked, why not, what to do; in one paragraph.
    assert re.fullmatch(r"CASCADE cannot serve .+: .+\. [A-Z].+\.", message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "proportional"},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_ropes_that_are_tables_are_served(served, parameters):
    for path, value in rope(**parameters).items():
        spoil(served, path, value)
    validate(served)


@pytest.mark.parametrize(
    "changes",
    [
        {"uses_mrope": True},
        {"uses_mrope": True, "multimodal_config": SimpleNamespace(language_model_only=True)},
        {"hf_text_config.rope_parameters": None, "hf_text_config.rotary_dim": 64},
        {"hf_text_config.rope_parameters": None, "hf_text_config.position_embedding_type": "nope"},
        {"model_impl": "transformers"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_ways_to_rotate_are_left_to_the_models_code(served, changes):
    for path, value in changes.items():
        spoil(served, path, value)
    validate(served)


def test_full_attention_layers_with_an_unused_window_are_served(served):
    served.model_config.sliding_window = 512
    served.model_config.hf_text_config.layer_types = ["full_attention"] * 2
    validate(served)


@pytest.mark.parametrize("sliding", ["default", "longrope"])
def test_sliding_windows_beside_full_attention_are_left_to_vllm(served, sliding):
    cascade = served.attention_config.backend
    for path, value in MIXED.items():
        spoil(served, path, value)
    served.model_config.hf_text_config.rope_parameters = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": sliding},
    }
    for _ in range(2):  # the second time nothing is left to do
        validate(served)
        delegate_windows(served)
        assert served.attention_config.backend is None
        assert served.attention_config.backend_per_kind == {"full_attention": cascade}
    assert selects_cascade(served.attention_config)


@pytest.mark.parametrize("given", ["CASCADE", "CPU_ATTN", None])
def test_only_cascade_for_a_mixed_model_is_delegated(served, given):
    plain = given == "CASCADE"
    for path, value in {} if plain else MIXED.items():
        spoil(served, path, value)
    if not plain:
        served.attention_config.backend = given and SimpleNamespace(name=given)
    before = served.attention_config.backend
    delegate_windows(served)
    assert served.attention_config.backend is before
    assert not served.attention_config.backend_per_kind


def test_pages_stretched_to_those_of_other_layers_are_refused():
    from dataclasses import replace

    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_cascade.kv_cache.spec import CascadeSpec
    from vllm_cascade.structure.options import CascadeOptions
    from vllm_cascade.structure.resolve import resolve

    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)

    def spec_of(**options):
        config = resolve(
            CascadeOptions.parse(options), block_size=16, max_model_len=9000, position_limit=4096
        )
        return CascadeSpec.of(full, config)

    for spec in (spec_of(), spec_of(policy="blend"), spec_of(trace_tokens=True)):
        assert replace(spec) == spec
        stretched = spec.page_size_bytes + 64
        if spec.page_size_padded is None:
            # Nothing is behind keys and values, so that it does not matter where a page ends.
            assert replace(spec, page_size_padded=stretched).page_size_bytes == stretched
            # Three of the cascade's blocks lie in one of vLLM's.
            assert replace(spec, block_size=48).max_blocks == -(-spec.max_blocks // 3)
            continue
        with pytest.raises(UnsupportedError, match="behind keys and values would be read as such"):
            replace(spec, block_size=32)
        with pytest.raises(UnsupportedError, match="behind keys and values would be read as such"):
            replace(spec, page_size_padded=stretched)


@pytest.mark.parametrize(
    ("options", "longest", "tail"),
    [
        ({}, 9000, 0),
        ({"policy": "window"}, 9000, 0),
        ({"trace_tokens": True}, 9000, 4),
        ({"policy": "blend"}, 9000, 4),
        ({"policy": "paper"}, 9000, 4),
        ({"policy": "blend", "trace_tokens": True}, 9000, 8),
        ({"policy": "blend", "score_weight": 0}, 9000, 0),
        # Nothing ever has to go, so nothing is scored.
        ({"policy": "blend", "cache_tokens": 1024}, 1000, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_page_is_vllms_own_unless_something_is_behind_it(options, longest, tail, dtype):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_cascade.kv_cache.spec import CascadeSpec
    from vllm_cascade.structure.options import CascadeOptions
    from vllm_cascade.structure.resolve import resolve

    config = resolve(
        CascadeOptions.parse(options), block_size=16, max_model_len=longest, position_limit=4096
    )
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=dtype)
    spec = CascadeSpec.of(full, config)
    assert spec.unpadded_page_size_bytes == full.page_size_bytes
    assert spec.page_size_bytes == full.page_size_bytes + 2 * 16 * tail
    assert (spec.page_size_padded is None) == (tail == 0)


def test_full_attention_by_kind_is_served(served):
    served.attention_config.backend_per_kind = {"full_attention": served.attention_config.backend}
    served.attention_config.backend = None
    validate(served)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"budget": 1024}, "budget"),
        ({"policy": "best"}, "policy"),
        ({"stride": 1}, "stride"),
        ({"cache_tokens": 1_000_000}, "cache_tokens"),
        ("blend", "cascade"),
        (None, "cascade"),
    ],
)
def test_bad_options_are_refused_in_the_words_of_the_configuration(served, options, field):
    served.additional_config = {"cascade": options}
    with pytest.raises(ConfigError, match=f"'{field}'") as refused:
        validate(served)
    assert refused.value.field == field


def test_options_of_other_plugins_do_not_matter(served):
    served.additional_config = {"other": 1, "cascade": {"policy": "paper"}}
    validate(served)


@pytest.mark.parametrize("backend", [None, SimpleNamespace(name="CPU_ATTN")])
def test_options_without_the_backend_are_refused(served, backend):
    served.attention_config.backend = backend
    validate(served)
    served.additional_config = {"cascade": {}}
    with pytest.raises(UnsupportedError, match="Add --attention-backend CASCADE"):
        validate(served)


def test_without_cascade_anything_goes(served):
    served.attention_config.backend = None
    served.additional_config = object()
    served.model_config.use_mla = True
    validate(served)


@pytest.mark.parametrize("given", ["CASCADE", "cascade", SimpleNamespace(name="CASCADE")])
def test_every_way_to_select_cascade(given):
    def config(backend=None, **per_kind):
        return SimpleNamespace(backend=backend, backend_per_kind=per_kind)

    assert selects_cascade(config(), given)
    assert selects_cascade(config(given))
    assert selects_cascade(config(full_attention=given))
    assert not selects_cascade(config())
    assert not selects_cascade(config("auto", full_attention="CPU_ATTN"), "TRITON_ATTN")


@pytest.fixture
def said(monkeypatch):
    """What vLLM's logger prints."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    # vLLM's own logger prints what is logged below it, and nothing else.
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def forget_once():
    """vLLM's logger remembers what it has warned of; it forgets here, and whenever called."""
    from vllm.logger import _print_warning_once

    _print_warning_once.cache_clear()
    return _print_warning_once.cache_clear


def test_prefix_caching_is_left_on_and_logged_once(served, said):
    served.cache_config.enable_prefix_caching = True
    validate(served)
    validate(served)
    assert sum("Prefix caching with CASCADE" in message for message in said) == 1
    assert served.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("options", "changed", "former"),
    [
        (
            {},
            "ranks values as well and compares 128 neighbours, not 64",
            '"value_weight": 0, "selection_window": 64',
        ),
        ({"selection_window": 64}, "ranks values as well", '"value_weight": 0'),
        ({"value_weight": 0}, "compares 128 neighbours, not 64", '"selection_window": 64'),
    ],
    ids=str,
)
def test_who_asks_for_blend_is_told_once_what_it_has_become(
    served, said, forget_once, options, changed, former
):
    served.model_config.max_model_len = 100_000
    served.additional_config = {"cascade": {"policy": "blend", **options}}
    validate(served)
    validate(served)
    (message,) = [message for message in said if "blend" in message]
    assert message == (
        f'Policy "blend" now {changed}. Its former rule comes back with {former} in the '
        "cascade's options."
    )
    # As it says.
    served.additional_config["cascade"] |= json.loads(f"{{{former}}}")
    config = resolve_options(served)
    assert (config.score_weight, config.key_weight, config.value_weight) == (1, 1, 0)
    assert config.selection_window == 64
    said.clear()
    forget_once()
    validate(served)
    assert not said


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "distinct"},
        {"policy": "paper"},
        {"policy": "blend", "value_weight": 1, "selection_window": 128},
        {"policy": "blend", "num_sub_caches": 1},
        {"policy": "blend", "num_sub_caches": 2, "cache_tokens": 3584, "max_model_len": 3000},
    ],
    ids=str,
)
def test_others_are_told_nothing_of_blend(served, said, forget_once, options):
    """Nor is who has said what it should be, or for whom it never chooses."""
    served.model_config.max_model_len = options.pop("max_model_len", 100_000)
    served.additional_config = {"cascade": options}
    validate(served)
    assert not said


def test_prefix_caching_never_hits_beside_other_backends(said):
    log_prefix_caching(
        SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            model_config=None,
            attention_config=SimpleNamespace(backend_per_kind={"full_attention": "CASCADE"}),
        )
    )
    assert sum("never hits" in message for message in said) == 1


@pytest.mark.parametrize("caches", [True, False])
def test_prefix_caching_is_turned_off_beside_states(served, said, caches):
    served.model_config.attn_type = "hybrid"
    cache = served.cache_config
    cache.enable_prefix_caching, cache.user_specified_block_size = caches, False
    validate(served)
    leave_states(served)
    assert (cache.enable_prefix_caching, cache.mamba_cache_mode) == (False, "none")
    assert cache.mamba_block_size == served.model_config.max_model_len
    (line,) = (message for message in said if "layers with states" in message)
    assert ("Prefix caching is off" in line) == caches
    assert not any("requests share whole blocks" in message for message in said)


KV_DTYPES = ["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]


@pytest.mark.parametrize("kv_cache_dtype", KV_DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 0, 0.0])
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
        ({"logits_soft_cap": 30.0}, "soft-capping .30"),
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


def test_the_reasons_of_vllms_own_check_are_passed_on():
    from vllm_cascade.attention.backend import CascadeBackend

    layer = AttentionSelectorConfig(64, torch.float32, "auto", 16)
    check_selection(CascadeBackend, layer)
    with pytest.raises(UnsupportedError, match="sliding window not supported, PCP not supported"):
        check_selection(CascadeBackend, layer._replace(has_sliding_window=True, use_pcp=True))
