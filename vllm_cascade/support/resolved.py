"""The cascade's configuration for the model that a vLLM configuration serves."""

from __future__ import annotations

from typing import Any

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve
from vllm_cascade.support import hybrid
from vllm_cascade.support.unsupported import UnsupportedError

# Their tables end at max_position_embeddings, whatever the factor that vLLM's limit counts in.
UNSCALED_ROPE_TYPES = ("dynamic",)


def position_limit(model_config: Any) -> int:
    """The number of positions a model was made for, as vLLM derives it, in tokens.

    Args:
        model_config: vLLM's `ModelConfig`; its `max_model_len` may be larger.
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
        # vLLM has forgotten the window by now; it bounds max_model_len, which was not extended.
        limit = min(limit, model_config.max_model_len)
    return limit


def resolve_options(vllm_config: Any, block_size: int) -> CascadeConfig:
    """The cascade's configuration for the model that `vllm_config` serves.

    Args:
        vllm_config: vLLM's complete configuration.
        block_size: Tokens in a KV block.

    Raises:
        UnsupportedError: The options are not where they belong.
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
        block_size=block_size,
        max_model_len=vllm_config.model_config.max_model_len,
        position_limit=position_limit(vllm_config.model_config),
    )
