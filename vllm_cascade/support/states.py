"""Models with states: state-space, linear-attention or convolution layers beside full attention.

CASCADE serves the full-attention layers, and vLLM the others, whose state is as large after a long
text as after a short one. A request has a block for its states, from the same pool. So vLLM makes
all blocks as large as a state, some hundred tokens of keys and values. CASCADE's own blocks stay
small: several lie in one of vLLM's, as vLLM has it for kernels that take small blocks.
"""

from __future__ import annotations

from typing import Any

from vllm_cascade.support.names import log_of
from vllm_cascade.support.selection import selects_cascade
from vllm_cascade.support.unsupported import UnsupportedError

# Tokens in a block of CASCADE's, of which vLLM's hold one or more. With windows of 128 tokens,
# the default, a group is as large as with blocks of 16 tokens.
BLOCK_SIZE = 64


def has_states(model_config: Any) -> bool:
    """Whether a model has layers that keep a state, beside full-attention layers.

    Args:
        model_config: vLLM's `ModelConfig`, or None.
    """
    return model_config is not None and model_config.attn_type == "hybrid"


def own_block_size(vllm_config: Any) -> int:
    """Count the tokens in a block of CASCADE's.

    Args:
        vllm_config: vLLM's complete configuration. With states, vLLM settles its own block size
            once the model is built, so nothing here depends on it.
    """
    if has_states(vllm_config.model_config):
        return BLOCK_SIZE
    return int(vllm_config.cache_config.block_size)


def check_block_size(vllm_config: Any) -> None:
    """Refuse a block of vLLM's that blocks of CASCADE's do not fill.

    Args:
        vllm_config: vLLM's complete configuration.

    Raises:
        UnsupportedError: The model has states, and --block-size is no multiple of `BLOCK_SIZE`.
    """
    cache = vllm_config.cache_config
    if not has_states(vllm_config.model_config) or not cache.user_specified_block_size:
        return
    if cache.block_size % BLOCK_SIZE:
        raise UnsupportedError(
            f"block size {cache.block_size} for a model with state-space, linear-attention or "
            "convolution layers",
            f"a block of vLLM's, which holds a state, is divided into blocks of {BLOCK_SIZE} "
            "tokens there",
            f"Give a multiple of {BLOCK_SIZE} with --block-size, or leave it out",
        )


def leave_states(vllm_config: Any) -> None:
    """Turn prefix caching off for a model with states, and log who serves which layer.

    A request that goes on from another needs the other's states as well, which vLLM keeps at the
    ends of its large blocks only, and not where a cascade can go on.

    Args:
        vllm_config: vLLM's complete configuration, which `validate` has passed; changed in place.
    """
    if not selects_cascade(vllm_config.attention_config):
        return
    if not has_states(vllm_config.model_config):
        return
    cache = vllm_config.cache_config
    found = ""
    if cache.enable_prefix_caching:
        found = (
            " Prefix caching is off: a request cannot go on from another's blocks without its "
            "states."
        )
    cache.enable_prefix_caching = False
    # What vLLM settles itself where prefix caching is off.
    cache.mamba_cache_mode = "none"
    cache.mamba_block_size = vllm_config.model_config.max_model_len
    log_of(__name__).info_once(
        "CASCADE serves the full-attention layers; layers with states keep vLLM's own caches.%s",
        found,
    )
