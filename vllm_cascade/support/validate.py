"""The checks of a vLLM configuration, part by part, before CASCADE serves it."""

from __future__ import annotations

from typing import Any

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.support import hybrid, states, unsupported
from vllm_cascade.support.drafts import check_drafts
from vllm_cascade.support.names import BACKEND_NAME, log_of
from vllm_cascade.support.resolved import resolve_options, rotary_limit
from vllm_cascade.support.selection import check_kinds, check_selection, layer_of, selects_cascade
from vllm_cascade.support.unsupported import UnsupportedError

# Lists of what works, not of what fails: a new kind is refused until somebody has looked at it.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
POSITION_EMBEDDING_TYPES = (None, "rope", "rotary", "nope")
# By which configurations without RoPE parameters still say that the model rotates.
ROTARY_FIELDS = ("rotary_dim", "rope_ratio", "original_rope", "rotary_pct")
ATTENTION_SCALES = ("attn_temperature_tuning", "use_logn_attn")
MIN_CAPABILITY = (8, 0)
FP8_MIN_CAPABILITY = (8, 9)
GPU_BLOCK_SIZES = (16, 32, 64, 128)
GPU_MAX_WINDOW = 1024
# The GPU keeps a row entry for each block and each stride: some 4 GiB with the default budget.
GPU_MAX_STRIDES = 1 << 21
VALUE_SIZES = ("v_head_dim", "v_channels")
SHARED_KV = ("num_kv_shared_layers", "use_cla")


def validate(vllm_config: Any) -> None:
    """Refuse, before any engine starts, a configuration that CASCADE cannot serve.

    Args:
        vllm_config: vLLM's complete configuration.

    Raises:
        UnsupportedError: CASCADE is selected for something that it cannot do, or its options are
            given and it is not selected.
        ConfigError: A cascade option is unknown or cannot work with this model.
    """
    if not selects_cascade(vllm_config.attention_config):
        given = vllm_config.additional_config
        if isinstance(given, dict) and "cascade" in given:
            raise UnsupportedError(
                "options without being selected",
                'additional_config has the key "cascade", but the attention backend is another',
                'Add --attention-backend CASCADE, or leave the key "cascade" out',
            )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    check_kinds(vllm_config.attention_config)
    checks = (
        _device,
        _model,
        _windows,
        states.check_block_size,
        _rope,
        _attention,
        _parallel,
        _kv_dtype,
        _features,
    )
    for check in checks:
        check(vllm_config)
    config = resolve_options(vllm_config)
    _copies_of_heads(vllm_config, config)
    check_drafts(vllm_config, config)
    check_selection(AttentionBackendEnum[BACKEND_NAME].get_class(), layer_of(vllm_config))
    log_prefix_caching(vllm_config)
    log_blend(vllm_config)


def _device(vllm_config: Any) -> None:
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(f"a model on {device!r}", "it has kernels for CPUs and NVIDIA GPUs")
    if device == "cuda":
        _gpu(vllm_config)


def _gpu(vllm_config: Any) -> None:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if capability is None or tuple(capability) < MIN_CAPABILITY:
        version = "unknown" if capability is None else ".".join(map(str, capability))
        raise UnsupportedError(
            f"a GPU of compute capability {version}",
            "its kernels are written for compute capability 8.0 (Ampere) and up",
        )
    unsupported.check_gpu_head_size(vllm_config.model_config.get_head_size(), capability)
    block_size = states.own_block_size(vllm_config)
    if block_size not in GPU_BLOCK_SIZES:
        raise UnsupportedError(
            f"block size {block_size} on a GPU",
            f"its kernels take block sizes {', '.join(map(str, GPU_BLOCK_SIZES))}",
            "Give one of them with --block-size, or leave it out",
        )
    config = resolve_options(vllm_config)
    if config.selection_window > GPU_MAX_WINDOW:
        raise UnsupportedError(
            f"selection_window {config.selection_window} on a GPU",
            f"its kernels compare up to {GPU_MAX_WINDOW} neighbours",
            f"Give a selection_window of {GPU_MAX_WINDOW} or less",
        )
    num_strides = len(build_layout(config).epochs)
    if num_strides > GPU_MAX_STRIDES:
        raise UnsupportedError(
            f"max_model_len {config.max_model_len} in strides of {config.stride} on a GPU",
            f"the place of every block in each of {num_strides} strides is kept on the GPU, of "
            f"{GPU_MAX_STRIDES} at most",
            f"Give --max-model-len {GPU_MAX_STRIDES * config.stride} or less, or a longer stride",
        )


def _model(vllm_config: Any) -> None:
    model = vllm_config.model_config
    if model.runner_type != "generate" or model.attn_type not in ("decoder", "hybrid"):
        raise UnsupportedError(
            f"runner {model.runner_type!r} of a model of type {model.attn_type!r}",
            "it serves decoders that generate text",
        )
    if model.use_mla:
        raise UnsupportedError(
            "MLA", "its cache holds latent vectors, not keys and values to compare and to rotate"
        )
    if model.is_mm_prefix_lm:
        raise UnsupportedError(
            "a model whose image tokens attend in both directions",
            "it attends in one direction: a token sees none of those that come after it",
            "Use --language-model-only to serve its text alone",
        )
    _sizes_of_values(model)


def _sizes_of_values(model: Any) -> None:
    head_size = model.get_head_size()
    for name in VALUE_SIZES:
        size = getattr(model.hf_text_config, name, None)
        if size not in (None, head_size):
            raise UnsupportedError(
                f"a model with {name} = {size} and a head size of {head_size}",
                "its values are of another size than its keys, for which such models bring an "
                "attention backend of their own",
            )


def _windows(vllm_config: Any) -> None:
    hybrid.check_windows(vllm_config, _table_limit(vllm_config.model_config))


def _table_limit(model_config: Any) -> int:
    """Positions in the rotary tables of layers that CASCADE does not serve."""
    text, limit = model_config.hf_text_config, rotary_limit(model_config)
    ropes = getattr(text, "rope_parameters", None) or {}
    # Sliding-window layers with RoPE parameters of their own have no scaling, even where the
    # full-attention layers have.
    return min(limit, text.max_position_embeddings) if hybrid.SLIDING in ropes else limit


def _rope(vllm_config: Any) -> None:
    model = vllm_config.model_config
    text = model.hf_text_config
    why = "CASCADE rotates keys itself, by their place in the cache, and knows plain RoPE only"
    if model.uses_alibi:
        raise unsupported.alibi()
    embedding = getattr(text, "position_embedding_type", None)
    ropes = hybrid.full_attention_ropes(text)
    if embedding not in POSITION_EMBEDDING_TYPES:
        raise UnsupportedError(f"position embeddings of type {embedding!r}", why)
    rotates = ropes or any(getattr(text, name, None) for name in ROTARY_FIELDS)
    # Hybrids tell places apart by their states; what their attention does, its code shows.
    if not rotates and embedding != "nope" and not states.has_states(model):
        raise UnsupportedError(
            "a model without RoPE parameters in its config.json",
            "it tells places apart by RoPE, or not at all where position_embedding_type is "
            "'nope', and knows no other way",
        )
    if model.uses_mrope and not _takes_text_alone(model):
        raise UnsupportedError(
            "M-RoPE with images",
            "an image moves the positions of later text on by its side, not by its tokens, so "
            "that a place in the cache is no position",
            "Use --language-model-only to serve its text alone",
        )
    if getattr(text, "dual_chunk_attention_config", None) is not None:
        raise UnsupportedError("dual chunk attention", why)
    for rope in ropes:
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise UnsupportedError(f"a model with RoPE of type {rope_type!r}", why)
        if rope.get("use_fope"):
            raise UnsupportedError("Fourier position embeddings (use_fope)", why)


def _takes_text_alone(model: Any) -> bool:
    return model.multimodal_config is None or model.multimodal_config.language_model_only


def _attention(vllm_config: Any) -> None:
    text = vllm_config.model_config.hf_text_config
    unsupported.check_soft_cap(getattr(text, "attn_logit_softcapping", None))
    for name in ATTENTION_SCALES:
        # The factor of Llama 4 is 1 up to the place `floor_scale`, at which the budget ends.
        if getattr(text, name, None) and not getattr(text, "floor_scale", None):
            raise unsupported.attention_scale(name)
    for name in SHARED_KV:
        if getattr(text, name, None):
            raise unsupported.shared_kv(f"a model with {name} = {getattr(text, name)}")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise unsupported.shared_kv("--kv-sharing-fast-prefill", "Leave the flag out")


def _parallel(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for flag in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, flag) > 1:
            raise UnsupportedError(
                f"{flag} {getattr(parallel, flag)}",
                "a request's cache is small and stays on one rank",
                f"Leave out --{flag.replace('_', '-')}",
            )


def _copies_of_heads(vllm_config: Any, config: CascadeConfig) -> None:
    """Refuse ranks with copies of one KV head, where the copies would keep different tokens."""
    if config.needs_scores:
        unsupported.check_copies(
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.model_config.get_total_num_kv_heads(),
            config.policy,
        )


def _kv_dtype(vllm_config: Any) -> None:
    cache = vllm_config.cache_config
    dtype = cache.cache_dtype
    if dtype == "auto" or f"torch.{dtype}" == str(vllm_config.model_config.dtype):
        return
    if not unsupported.is_fp8(dtype):
        raise unsupported.kv_dtype(dtype)
    if vllm_config.device_config.device_type == "cuda":
        from vllm.platforms import current_platform

        capability = current_platform.get_device_capability()
        assert capability is not None, "`_gpu` has refused it"
        if tuple(capability) < FP8_MIN_CAPABILITY:
            raise UnsupportedError(
                f"KV cache dtype {dtype!r} on a GPU of compute capability "
                f"{'.'.join(map(str, capability))}",
                "GPUs convert to and from FP8 (e4m3) from compute capability 8.9 (Ada) on",
                "Use --kv-cache-dtype auto",
            )
    if cache.kv_cache_dtype_skip_layers:
        raise UnsupportedError(
            f"KV cache dtype {dtype!r} with layers left out "
            f"({', '.join(cache.kv_cache_dtype_skip_layers)})",
            "the blocks of all its layers are of one size",
            "Leave out --kv-cache-dtype-skip-layers",
        )


def _features(vllm_config: Any) -> None:
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedError(
            "a KV connector or KV offloading",
            "a block's content depends on the whole request, so it cannot be kept or sent by hash",
            "Leave out --kv-transfer-config and --kv-offloading-size",
        )
    if vllm_config.model_config.original_max_model_len == -1:
        raise UnsupportedError(
            "max_model_len -1 (auto-fit)",
            "a request's memory hardly grows with its length, so there is nothing to fit, and the "
            "cascade is built for the length given",
            "Give --max-model-len as a number, or leave it out",
        )


def log_prefix_caching(vllm_config: Any) -> None:
    """Log once what prefix caching finds with CASCADE, if `vllm_config` turns it on."""
    if states.has_states(vllm_config.model_config):
        return  # `leave_states` turns it off, and says so.
    if vllm_config.cache_config.enable_prefix_caching:
        log = log_of(__name__).info_once
        if vllm_config.attention_config.backend_per_kind:
            log(
                "Prefix caching never hits where other layers have a backend of their own beside "
                "CASCADE. --no-enable-prefix-caching saves the hashing."
            )
            return
        log(
            "Prefix caching with CASCADE: up to the budget requests share whole blocks, where the "
            "policy keeps no attention scores. Beyond it a request goes on from a finished one "
            "that it begins with, as a chat's next turn does, or from a copy made shortly before "
            "the end of a long prompt that begins like it."
        )


def log_blend(vllm_config: Any) -> None:
    """Warn once that policy "blend" has another rule than before, if `vllm_config` chooses it.

    A configuration that sets every changed option, or whose requests always fit, gets no warning.

    Args:
        vllm_config: vLLM's complete configuration, valid for CASCADE.
    """
    given = vllm_config.additional_config.get("cascade", {})
    changes = {
        "value_weight": "ranks values as well",
        "selection_window": "compares 128 neighbours, not 64",
    }
    unset = [name for name in changes if given.get(name) is None]
    if given.get("policy") != "blend" or not unset:
        return
    if not resolve_options(vllm_config).chooses:
        return
    former = {"value_weight": 0, "selection_window": 64}
    log_of(__name__).warning_once(
        'Policy "blend" now %s. Its former rule comes back with %s in the cascade\'s options.',
        " and ".join(changes[name] for name in unset),
        ", ".join(f'"{name}": {former[name]}' for name in unset),
    )
