"""Models that interleave full-attention and sliding-window layers: who serves which layer."""

from __future__ import annotations

from typing import Any

from vllm_cascade.support import unsupported
from vllm_cascade.support.names import is_cascade, log_of
from vllm_cascade.support.unsupported import UnsupportedError

FULL = "full_attention"
SLIDING = "sliding_attention"
# By which configurations without `layer_types` say that a part of their layers has a window.
PATTERNS = ("hybrid_layer_pattern", "sliding_window_pattern", "window_attention_pattern")
# vLLM's own attention on a CPU takes blocks of this many tokens, or of a multiple.
CPU_BLOCK_SIZE = 32


def is_hybrid(model_config: Any) -> bool:
    """Whether a model has sliding-window layers beside full-attention layers.

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or ()
    return model_config.get_sliding_window() is not None and {FULL, SLIDING} <= set(kinds)


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
    if model.attention_chunk_size is not None:
        raise UnsupportedError(
            f"chunked local attention (attention_chunk_size {model.attention_chunk_size})",
            "such a layer needs a cache of its own kind",
        )
    if not is_hybrid(model):
        return
    if model.max_model_len > position_limit:
        raise UnsupportedError(
            f"max_model_len {model.max_model_len} of a model with sliding-window layers",
            "those rotate keys by their place in the text, and their tables end at the model's "
            f"own {position_limit} positions",
            f"Use --max-model-len {position_limit} or less",
        )
    if vllm_config.device_config.device_type == "cpu" and cache.block_size % CPU_BLOCK_SIZE:
        raise UnsupportedError(
            f"block size {cache.block_size} for a model with sliding-window layers on a CPU",
            f"vLLM's own attention, which serves those, takes multiples of {CPU_BLOCK_SIZE}",
            "Give one of them with --block-size, or leave it out",
        )


def delegate_windows(vllm_config: Any) -> None:
    """Leave sliding-window layers to vLLM's own backend where the user chose CASCADE for all.

    The choice is written into the configuration, so every worker makes the same one.

    Args:
        vllm_config: vLLM's complete configuration, which `validate` has passed; changed in place.
    """

    attention = vllm_config.attention_config
    if not is_cascade(attention.backend):
        return
    if not is_hybrid(vllm_config.model_config):
        return
    attention.backend_per_kind = {FULL: attention.backend}
    attention.backend = None
    kinds = vllm_config.model_config.hf_text_config.layer_types
    log_of(__name__).info_once(
        "CASCADE serves the %d full-attention layers; the %d sliding-window layers keep vLLM's "
        "own attention and cache.",
        kinds.count(FULL),
        kinds.count(SLIDING),
    )
