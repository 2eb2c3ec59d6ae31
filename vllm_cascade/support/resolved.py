"""The cascade's configuration for the model that a vLLM configuration serves."""

from __future__ import annotations

from typing import Any

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve
from vllm_cascade.support import hybrid
from vllm_cascade.support.states import has_states, own_block_size
from vllm_cascade.support.unsupported import UnsupportedError

# RoPE types whose tables end at max_position_embeddings. vLLM's limit multiplies by their factor.
UNSCALED_ROPE_TYPES = ("dynamic",)


def rotary_limit(model_config: Any) -> int:
    """Count the positions that a model was made for, as vLLM derives them from config.json.

    Args:
        model_config: vLLM's `ModelConfig`; its `max_model_len` may be larger.

    Returns:
        Positions, which is tokens of full attention.
    """
    from vllm.config.model import _get_and_verify_max_len

    text = model_config.hf_text_config
    limit = _get_and_verify_max_len(
        hf_config=text,
        model_arch_config=model_config.model_arch_config,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=model_config.disable_sliding_window,
        sliding_window=model_config.get_sliding_window(),
    )
    ropes = hybrid.full_attention_ropes(text)
    if any(rope.get("rope_type") in UNSCALED_ROPE_TYPES for rope in ropes):
        limit = min(limit, text.max_position_embeddings)
    if model_config.disable_sliding_window:
        # vLLM has dropped the window by now. The window bounded max_model_len, and the patch
        # `long_max_model_len` leaves this bound in place.
        limit = min(limit, model_config.max_model_len)
    return limit


def position_limit(model_config: Any) -> int:
    """Count the positions that CASCADE may give to a model's queries and keys.

    Args:
        model_config: vLLM's `ModelConfig`; its `max_model_len` may be larger.

    Returns:
        As `rotary_limit`, or less.
    """
    text, limit = model_config.hf_text_config, rotary_limit(model_config)
    # Two models put a factor on queries that is 1 up to some place. `take_over` leaves it out.
    scalings = [*hybrid.full_attention_ropes(text), getattr(text, "llama_4_scaling", None) or {}]
    for each in scalings:
        if each.get("llama_4_scaling_beta") or each.get("beta"):
            limit = min(limit, each.get("original_max_position_embeddings", limit))
    if floor_scale := getattr(text, "floor_scale", None):
        # Llama 4. vLLM itself decides whether there is a factor, whatever config.json says.
        limit = min(limit, int(floor_scale) - 1)
    return limit


def resolve_options(vllm_config: Any) -> CascadeConfig:
    """Settle the cascade's options for the model that `vllm_config` serves.

    Args:
        vllm_config: vLLM's complete configuration; the options are in its `additional_config`.

    Returns:
        A valid configuration.

    Raises:
        UnsupportedError: `additional_config` is no JSON object.
        ConfigError: An option is unknown or cannot work with this model.
    """
    given = vllm_config.additional_config
    if not isinstance(given, dict):
        raise UnsupportedError(
            f"additional_config = {given!r}",
            "its options are read from a JSON object",
            "Give --additional-config '{\"cascade\": {...}}', or leave it out",
        )
    return resolve(
        CascadeOptions.parse(given.get("cascade", {})),
        block_size=own_block_size(vllm_config),
        has_one_block_size=has_states(vllm_config.model_config),
        max_model_len=vllm_config.model_config.max_model_len,
        position_limit=position_limit(vllm_config.model_config),
    )
