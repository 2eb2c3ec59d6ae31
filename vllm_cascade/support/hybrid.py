"""Models that interleave full attention with windows or chunks: who serves which layer."""

from __future__ import annotations

from typing import Any

from vllm_cascade.support import unsupported
from vllm_cascade.support.names import is_cascade, log_of
from vllm_cascade.support.unsupported import UnsupportedError

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
# What layers beside those of full attention are called in messages.
NAMES = {SLIDING: "sliding-window", CHUNKED: "chunked-attention"}
# By which configurations without `layer_types` say that a part of their layers has a window.
PATTERNS = ("hybrid_layer_pattern", "sliding_window_pattern", "window_attention_pattern")
# vLLM's own attention on a CPU takes blocks of this many tokens, or of a multiple.
CPU_BLOCK_SIZE = 32


def kinds_of(model_config: Any) -> list[str]:
    """List the kind of each layer; nothing where config.json does not tell.

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    text = model_config.hf_text_config
    rotates = getattr(text, "no_rope_layers", None)
    if model_config.attention_chunk_size and rotates:
        # Llama 4, which looks at nothing else: layers that rotate attend in chunks.
        return [CHUNKED if each else FULL for each in rotates[: text.num_hidden_layers]]
    return list(getattr(text, "layer_types", None) or ())


def other_kind(model_config: Any) -> str | None:
    """The kind of a model's layers beside full attention that bounds its cache by itself, if any.

    Args:
        model_config: vLLM's `ModelConfig`.

    Returns:
        `SLIDING`, `CHUNKED`, or None where a model has one kind of layers only.
    """
    kinds = set(kinds_of(model_config))
    if model_config.attention_chunk_size:
        return CHUNKED if {FULL, CHUNKED} <= kinds else None
    windows = model_config.get_sliding_window() is not None
    return SLIDING if windows and {FULL, SLIDING} <= kinds else None


def full_attention_ropes(text_config: Any) -> list[dict[str, Any]]:
    """List the RoPE parameters of the layers that CASCADE serves.

    Args:
        text_config: Hugging Face's configuration of the text model.

    Returns:
        Parameters as config.json has them; none of layers that keep their own backend.
    """
    from vllm.transformers_utils.config import is_rope_parameters_nested, iter_rope_parameters

    ropes = getattr(text_config, "rope_parameters", None)
    if isinstance(ropes, dict) and is_rope_parameters_nested(ropes) and ropes.get(FULL):
        return [ropes[FULL]]
    return list(iter_rope_parameters(text_config))


def check_windows(vllm_config: Any, position_limit: int) -> None:
    """Refuse a model without full-attention layers, or with others that vLLM cannot serve beside.

    Args:
        vllm_config: vLLM's complete configuration.
        position_limit: Positions in the rotary tables of the layers that CASCADE does not serve.

    Raises:
        UnsupportedError: The message names the layers or the engine argument.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    window = model.get_sliding_window()
    kinds = getattr(model.hf_text_config, "layer_types", None)
    if window is not None and (not kinds or (SLIDING in kinds and FULL not in kinds)):
        pattern = next((n for n in PATTERNS if getattr(model.hf_text_config, n, None)), None)
        if kinds or pattern is None:
            raise unsupported.sliding_window(window)
        raise UnsupportedError(
            f"sliding-window layers by {pattern}",
            "it leaves such layers to vLLM where config.json lists each layer's kind in "
            "layer_types, and there is no such list",
        )
    _check_chunks(model, cache.block_size)
    other = other_kind(model)
    if other is None:
        return
    if model.max_model_len > position_limit:
        raise UnsupportedError(
            f"max_model_len {model.max_model_len} of a model with {NAMES[other]} layers",
            "those rotate keys by their place in the text, and their tables end at the model's "
            f"own {position_limit} positions",
            f"Use --max-model-len {position_limit} or less",
        )
    if vllm_config.device_config.device_type == "cpu" and cache.block_size % CPU_BLOCK_SIZE:
        raise UnsupportedError(
            f"block size {cache.block_size} for a model with {NAMES[other]} layers on a CPU",
            f"vLLM's own attention, which serves those, takes multiples of {CPU_BLOCK_SIZE}",
            "Give one of them with --block-size, or leave it out",
        )


def _check_chunks(model: Any, block_size: int) -> None:
    """Refuse chunked attention of other models than Llama 4, and what vLLM cannot cut in blocks."""
    chunk = model.attention_chunk_size
    if not chunk:
        return
    asked = f"chunked local attention (attention_chunk_size {chunk})"
    if not getattr(model.hf_text_config, "no_rope_layers", None):
        raise UnsupportedError(
            asked,
            "it leaves such layers to vLLM where config.json tells by no_rope_layers which they "
            "are, as Llama 4's does",
        )
    kinds = kinds_of(model)
    if FULL not in kinds:
        raise UnsupportedError(
            f"{asked} in all layers",
            "their memory is bounded already; it serves the full-attention layers of a model and "
            "leaves the others to vLLM",
        )
    if CHUNKED in kinds and chunk % block_size:
        raise UnsupportedError(
            f"{asked} in blocks of {block_size} tokens",
            "vLLM's own attention, which serves those layers, cuts chunks into whole blocks",
            f"Give a --block-size that divides {chunk}",
        )


def delegate_windows(vllm_config: Any) -> None:
    """Leave sliding windows and chunks to vLLM's own backend where the user chose CASCADE for all.

    The choice is written into the configuration, so every worker makes the same one. Layers of
    chunked attention ask for the backend of full attention; the patch `chunked_layers` gives them
    vLLM's own.

    Args:
        vllm_config: vLLM's complete configuration, which `validate` has passed; changed in place.
    """

    attention = vllm_config.attention_config
    if not is_cascade(attention.backend):
        return
    other = other_kind(vllm_config.model_config)
    if other is None:
        return
    attention.backend_per_kind = {FULL: attention.backend}
    attention.backend = None
    kinds = kinds_of(vllm_config.model_config)
    log_of(__name__).info_once(
        "CASCADE serves the %d full-attention layers; the %d %s layers keep vLLM's own attention "
        "and cache.",
        kinds.count(FULL),
        kinds.count(other),
        NAMES[other],
    )
