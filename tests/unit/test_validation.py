"""Each refusal that a configuration shows, on stand-ins for vLLM's objects."""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_cascade.structure.config import ConfigError
from vllm_cascade.support import resolved
from vllm_cascade.support.drafts import bound_drafter, is_drafters
from vllm_cascade.support.hybrid import delegate_windows, kinds_of
from vllm_cascade.support.selection import check_selection, selects_cascade
from vllm_cascade.support.unsupported import UnsupportedError
from vllm_cascade.support.validate import validate


def drafting(method, kinds=(), chunk=None, **fields):
    """Speculative decoding by a drafter with these kinds of layers."""
    config = SimpleNamespace(
        max_model_len=512,
        attention_chunk_size=chunk,
        hf_text_config=SimpleNamespace(
            layer_types=list(kinds), no_rope_layers=[1, 0] if chunk else None, num_hidden_layers=2
        ),
        get_sliding_window=lambda: 512 if "sliding_attention" in kinds else None,
    )
    given = {"attention_backend": None, **fields}
    return SimpleNamespace(method=method, draft_model_config=config, **given)


def rope(**parameters):
    return {
        "hf_text_config.rope_parameters": {"rope_theta": 1e4, "rope_type": "default"} | parameters
    }


MIXED = {
    "sliding_window": 512,
    "hf_text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CHUNKED = {"attention_chunk_size": 256, "hf_text_config.no_rope_layers": [1, 0, 1]}

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
    ({"attention_chunk_size": 8192}, "attention .attention_chunk_size 8192.*by no_rope_layers"),
    (CHUNKED | {"hf_text_config.no_rope_layers": [1, 1]}, "256. in all layers.*bounded already"),
    (CHUNKED | {"attention_chunk_size": 320}, "320. in blocks of 128 .*--block-size that divides"),
    (CHUNKED | {"max_model_len": 4097}, "4097 of a model with chunked-attention layers.*4096 or"),
    (CHUNKED | {"cache_config.block_size": 16}, "with chunked-attention layers on a CPU.*of 32"),
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
    ({"hf_text_config.attn_logit_softcapping": -50.0}, "logit soft-capping .-50"),
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
        {
            "speculative_config": drafting(
                "eagle3", attention_backend=SimpleNamespace(name="CPU_ATTN")
            )
        },
        "a drafter with attention backend CPU_ATTN.*Leave attention_backend out",
    ),
    (
        {"speculative_config": drafting("mtp", ["sliding_attention", "full_attention"])},
        "'mtp' with a drafter that has sliding-window layers.*full attention alone.*\"ngram\"",
    ),
    (
        {"speculative_config": drafting("draft_model", chunk=64)},
        "'draft_model' with a drafter that has chunked-attention layers",
    ),
    (
        MIXED | {"speculative_config": drafting("draft_model")},
        "'draft_model' for a model with sliding-window layers: .*V1.*Take an EAGLE head",
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
        (
            {
                "use_v2_model_runner": False,
                "speculative_config": drafting("eagle3"),
            },
            (9, 0),
            "method 'eagle3' on a GPU with vLLM's model runner V1: .*VLLM_USE_V2_MODEL_RUNNER",
        ),
        (
            {
                "speculative_config": drafting("mtp", use_multi_module_mtp=lambda: True),
            },
            (9, 0),
            "several MTP modules on a GPU: .*num_speculative_tokens 1",
        ),
        ({"head_size": 512}, (8, 0), r"head size 512 on a GPU of compute capability 8\.0: .*9\.x"),
        ({"head_size": 72}, (9, 0), "head size 72 on a GPU.*64, 80, 96, 128, 256, 512"),
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
    monkeypatch.setattr(resolved, "position_limit", lambda model_config: 1 << 16)
    served.model_config.max_model_len = 1 << 16
    served.device_config.device_type = "cuda"
    served.cache_config.block_size = 16
    for path, value in spoilt.items():
        spoil(served, path, value)
    with pytest.raises((UnsupportedError, ConfigError), match=words):
        validate(served)


@pytest.mark.parametrize("soft_cap", [None, 50.0])
def test_what_the_fixture_describes_is_served(served, soft_cap):
    served.model_config.hf_text_config.attn_logit_softcapping = soft_cap
    validate(served)


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu"])
@pytest.mark.parametrize("policy", ["distinct", "window"])
def test_drafts_from_the_text_are_served(served, method, policy):
    served.speculative_config = SimpleNamespace(method=method)
    served.additional_config = {"cascade": {"policy": policy}}
    validate(served)


@pytest.mark.parametrize("backend", [None, SimpleNamespace(name="CASCADE")])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_drafters_with_a_cache_are_bounded(served, method, backend):
    served.speculative_config = drafting(method, attention_backend=backend)
    validate(served)
    bound_drafter(served)
    assert served.speculative_config.attention_backend.name == "CASCADE"
    draft_model = served.speculative_config.draft_model_config
    assert draft_model.max_model_len == served.model_config.max_model_len


@pytest.mark.parametrize(
    ("method", "is_a_model"), [("draft_model", True), ("mtp", True), ("ngram", False)]
)
def test_which_configuration_is_a_drafters(served, method, is_a_model):
    assert not is_drafters(served)
    served.speculative_config = SimpleNamespace(
        method=method, draft_model_config=served.model_config
    )
    assert is_drafters(served) == is_a_model


def test_a_drafter_of_another_backend_is_left_alone(served):
    served.attention_config.backend = SimpleNamespace(name="CPU_ATTN")
    served.additional_config = {}
    served.speculative_config = SimpleNamespace(method="eagle3", attention_backend=None)
    validate(served)
    bound_drafter(served)
    assert served.speculative_config.attention_backend is None


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("policy", ["distinct", "window", "blend", "paper"])
def test_fp8_is_served(served, dtype, policy):
    served.cache_config.cache_dtype = dtype
    served.additional_config = {"cascade": {"policy": policy}}
    validate(served)


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


@pytest.mark.parametrize("chunk", [256, None])
@pytest.mark.parametrize("rotates", [[1, 0, 1], [0, 0, 0]])
def test_chunks_beside_full_attention_are_left_to_vllm(served, chunk, rotates):
    cascade, text = served.attention_config.backend, served.model_config.hf_text_config
    served.model_config.attention_chunk_size, text.no_rope_layers = chunk, rotates
    # Its factor on queries is not without bound.
    text.attn_temperature_tuning, text.floor_scale = True, 8192
    text.num_hidden_layers = 2
    validate(served)
    delegate_windows(served)
    if chunk and any(rotates):
        assert served.attention_config.backend is None
        assert served.attention_config.backend_per_kind == {"full_attention": cascade}
        assert kinds_of(served.model_config) == ["chunked_attention", "full_attention"]
    else:
        assert served.attention_config.backend is cascade


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


def test_the_reasons_of_vllms_own_check_are_passed_on():
    from vllm_cascade.attention.backend import CascadeBackend

    layer = AttentionSelectorConfig(64, torch.float32, "auto", 16)
    check_selection(CascadeBackend, layer)
    with pytest.raises(UnsupportedError, match="sliding window not supported, PCP not supported"):
        check_selection(CascadeBackend, layer._replace(has_sliding_window=True, use_pcp=True))
