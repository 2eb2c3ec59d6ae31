"""Finds alone: models and options that vLLM's own front end refuses or accepts with CASCADE.

No engine is started.
"""

from __future__ import annotations

import contextlib
import json
import os

import pytest

from e2e import forks

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LONG = 100_000  # far beyond LLAMA's own limit


def like_llama(architecture: str, model_type: str, **changes) -> dict:
    return LLAMA | {"architectures": [architecture], "model_type": model_type} | changes


def rope_scaling(rope_type: str, **parameters) -> dict:
    return LLAMA | {"rope_scaling": {"rope_type": rope_type, **parameters}}


# Other models' own names for what they need, in their smallest form.
OTHERS = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "vocab_size": 128,
    },
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
}


@pytest.fixture
def configure(tmp_path):
    """The configuration that vLLM's front end makes of a config.json and engine arguments."""

    def configure(config=LLAMA, **arguments):
        from vllm.engine.arg_utils import EngineArgs

        (tmp_path / "config.json").write_text(json.dumps(config))
        arguments = {"attention_backend": "CASCADE", **arguments}
        return EngineArgs(
            model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **arguments
        ).create_engine_config()

    return configure


@pytest.fixture
def limit_of(configure):
    """The positions that a model of a config.json is taken to have."""
    from vllm_cascade.support.resolved import position_limit

    return lambda config, **arguments: position_limit(configure(config, **arguments).model_config)


def test_the_backend_alone_is_enough(configure):
    vllm_config = configure()
    assert vllm_config.attention_config.backend.name == "CASCADE"
    assert vllm_config.cache_config.block_size == 128
    assert vllm_config.model_config.max_model_len == LLAMA["max_position_embeddings"]


@pytest.mark.parametrize(
    "selected",
    [
        {"attention_backend": "CASCADE"},
        {"attention_backend": None, "attention_config": {"backend": "CASCADE"}},
        {
            "attention_backend": None,
            "attention_config": {"backend_per_kind": {"full_attention": "CASCADE"}},
        },
    ],
    ids=["attention_backend", "attention_config", "backend_per_kind"],
)
def test_a_length_beyond_the_models_own_is_accepted(configure, selected):
    vllm_config = configure(max_model_len=LONG, **selected)
    assert vllm_config.model_config.max_model_len == LONG
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ


@pytest.mark.parametrize("backend", ["CPU_ATTN", None])
def test_other_backends_still_refuse_it(configure, backend):
    configure(max_model_len=LONG)  # whatever CASCADE was allowed before
    with pytest.raises(ValueError, match=rf"max_model_len \({LONG}\) is greater"):
        configure(attention_backend=backend, max_model_len=LONG)


@pytest.mark.parametrize("arguments", [{}, {"max_model_len": -1}], ids=["accepted", "refused"])
def test_a_model_configured_by_itself_still_refuses_it(configure, tmp_path, arguments):
    from vllm.config import ModelConfig

    with contextlib.suppress(ValueError):
        configure(**arguments)
    with pytest.raises(ValueError, match="is greater"):
        ModelConfig(str(tmp_path), skip_tokenizer_init=True, max_model_len=LONG)


def test_a_window_switched_off_is_no_longer_than_before(configure):
    mistral = like_llama("MistralForCausalLM", "mistral", sliding_window=2048)
    with pytest.raises(ValueError, match=r"greater than the derived max_model_len .sliding_window"):
        configure(mistral, disable_sliding_window=True, max_model_len=LONG)
    vllm_config = configure(mistral, disable_sliding_window=True)
    assert vllm_config.model_config.max_model_len == 2048


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LLAMA, 8192),
        (rope_scaling("linear", factor=2.0), 16384),
        # vLLM's table does not grow with this one's factor, though its limit does.
        (rope_scaling("dynamic", factor=2.0), 8192),
        (rope_scaling("yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (
            rope_scaling(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=1024,
            ),
            8192,
        ),
        (
            like_llama("Qwen2ForCausalLM", "qwen2", sliding_window=512, use_sliding_window=False),
            8192,
        ),
        # Beyond it queries are scaled by their place in the text.
        (
            like_llama(
                "MistralForCausalLM",
                "mistral",
                sliding_window=None,
                llama_4_scaling={"original_max_position_embeddings": 4096, "beta": 0.1},
            ),
            4096,
        ),
    ],
    ids=["plain", "linear", "dynamic", "yarn", "llama3", "unused-window", "temperature"],
)
def test_the_models_own_limit_is_known_whatever_length_is_asked_for(limit_of, config, limit):
    assert limit_of(config) == limit
    assert limit_of(config, max_model_len=LONG) == limit
    assert limit_of(config, max_model_len=1024) == limit


LLAMA4 = like_llama(
    "Llama4ForCausalLM",
    "llama4_text",
    num_hidden_layers=4,
    num_local_experts=4,
    attention_chunk_size=256,
    floor_scale=4096,
)


@pytest.mark.parametrize("tuned", [True, False])
def test_a_temperature_without_rotation_ends_the_budget(limit_of, configure, tmp_path, tuned):
    """vLLM has the factor for long texts, or where a user asks, whatever config.json says."""
    from vllm_cascade.evaluation.engine import resolve

    llama4 = {**LLAMA4, "attn_temperature_tuning": tuned}
    assert limit_of(llama4) == 4095
    assert limit_of(llama4, max_model_len=1024) == 4095
    with pytest.raises(ValueError, match=r"'cache_tokens' = 4096: .*the model has 4095"):
        configure(llama4, additional_config={"cascade": {"cache_tokens": 4096}})
    # Full attention is measured beyond.
    assert resolve(str(tmp_path), {}) == (8192, None)
    # Layers that rotate have tables of their own length.
    with pytest.raises(ValueError, match=r"chunked-attention layers.*--max-model-len 8192 or less"):
        configure(llama4, max_model_len=LONG)


def test_the_models_own_limit_is_no_longer_than_a_window_switched_off(limit_of):
    mistral = like_llama("MistralForCausalLM", "mistral", sliding_window=2048)
    assert limit_of(mistral, disable_sliding_window=True) == 2048


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OTHERS["gpt2"], "without RoPE parameters"),
        (OTHERS["whisper"], "'encoder_decoder'"),
        (
            like_llama(
                "DeepseekV2ForCausalLM",
                "deepseek_v2",
                kv_lora_rank=16,
                q_lora_rank=None,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=16,
            ),
            "MLA",
        ),
        (like_llama("MistralForCausalLM", "mistral", sliding_window=512), "window 512 tokens"),
        (
            like_llama(
                "Qwen2ForCausalLM",
                "qwen2",
                sliding_window=512,
                use_sliding_window=True,
                max_window_layers=0,
            ),
            "window 512 tokens",
        ),
        (
            like_llama(
                "Gemma2ForCausalLM",
                "gemma2",
                layer_types=["full_attention"] * 2,
                attn_logit_softcapping=-50.0,
            ),
            r"logit soft-capping \(-50\)",
        ),
        (like_llama("LlamaForCausalLM", "llama", v_head_dim=32), "v_head_dim = 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_models_it_does_not_serve(configure, config, words):
    configure(config, attention_backend=None)  # vLLM itself takes it
    with pytest.raises(ValueError, match=f"^CASCADE cannot serve .*{words}"):
        configure(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"runner": "pooling"}, "runner 'pooling'"),
        (
            {"tensor_parallel_size": 4, "additional_config": {"cascade": {"policy": "blend"}}},
            "tensor_parallel_size 4 with 2 KV heads and policy 'blend'",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype 'fp8_e5m2'"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]},
            "KV cache dtype 'fp8' with layers left out",
        ),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "KV cache dtype 'bfloat16'"),
        ({"kv_offloading_size": 1.0}, "KV offloading"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                },
                "additional_config": {"cascade": {"policy": "blend"}},
            },
            "speculative decoding with policy 'blend'",
        ),
        ({"max_model_len": -1}, "auto-fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_features_it_does_not_serve(configure, arguments, words):
    with pytest.raises(ValueError, match=f"^CASCADE cannot serve .*{words}"):
        configure(**arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 1}, "'budget' = 1: no such option"),
        ({"policy": "best"}, "'policy' = 'best'"),
        ({"cache_tokens": 16_384}, "'cache_tokens' = 16384: .*the model has 8192"),
    ],
    ids=["unknown", "wrong", "larger-than-the-model"],
)
def test_bad_options(configure, options, words):
    with pytest.raises(ValueError, match=words):
        configure(additional_config={"cascade": options})


def test_a_block_size_that_cannot_be_paged(configure):
    with pytest.raises(ValueError, match="'block_size' = 48: must be a power of two"):
        configure(block_size=48)


def test_options_without_the_backend(configure):
    with pytest.raises(ValueError, match="Add --attention-backend CASCADE"):
        configure(attention_backend="CPU_ATTN", additional_config={"cascade": {}})


def test_the_command_ends_with_one_error_and_starts_no_engine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = [
        *("-m", "vllm.entrypoints.cli.main", "serve"),
        str(tmp_path),
        "--skip-tokenizer-init",
        "--load-format=dummy",
        "--attention-backend=CASCADE",
        '--additional-config={"cascade": {"budget": 1}}',
    ]
    assert forks.run(command, tmp_path / "log", 300) != 0
    output = (tmp_path / "log").read_text()
    assert output.strip().splitlines()[-1].endswith("score_decay, trace_tokens"), output[-2000:]
    assert output.count("'budget' = 1: no such option") == 1
    assert "EngineCore" not in output and "Traceback" not in output
