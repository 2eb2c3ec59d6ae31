"""What a request has cost by its token count alone: boundaries run, tokens evicted, span.

Pure Python: imports neither torch nor vLLM. The numbers are those of `layout.Layout`, in closed
form, so that counting a finished request takes no walk over its epochs.
"""

from __future__ import annotations

from vllm_cascade.structure.config import CascadeConfig

SMALLEST_BUCKET = 64


def computed_tokens(num_prompt_tokens: int, num_generation_tokens: int) -> int:
    """Tokens of a finished request that entered the cache.

    Args:
        num_prompt_tokens: Tokens of the prompt.
        num_generation_tokens: Tokens sampled; the last one is never computed.
    """
    return num_prompt_tokens + max(0, num_generation_tokens - 1)


def kept_whole(config: CascadeConfig) -> int:
    """Tokens that sinks and sub-caches hold; no request of up to so many loses one."""
    return config.total_tokens


def past_budget(config: CascadeConfig, num_tokens: int) -> bool:
    """Whether `num_tokens` computed tokens are more than sinks and sub-caches hold."""
    return num_tokens > kept_whole(config)


def boundaries_run(config: CascadeConfig, num_tokens: int) -> int:
    """Boundaries run once `num_tokens` tokens are computed.

    A boundary is a multiple of the stride past the sinks, the first one being where the cache is
    first overfull; none runs at the end of the longest request.
    """
    last = min(num_tokens, config.max_model_len - 1)
    return max(0, (last - _first_boundary(config)) // config.stride + 1)


def tokens_evicted(config: CascadeConfig, num_tokens: int) -> int:
    """Tokens computed but no longer held, per layer and KV head.

    Half of each group that leaves a sub-cache is evicted, and all of what leaves the last one.

    Args:
        config: A valid configuration.
        num_tokens: Tokens computed, a boundary there included.
    """
    boundaries = boundaries_run(config, num_tokens)
    if not boundaries:
        return 0
    end = _first_boundary(config) + (boundaries - 1) * config.stride
    overfull = end - kept_whole(config)
    if config.num_sub_caches == 1:
        return overfull
    # A sub-cache is left by half as many groups as left the one before it.
    first = overfull // config.group_tokens
    left = [first >> index for index in range(config.num_sub_caches - 1)]
    return (sum(left) + left[-1]) * config.group_tokens // 2


def final_span(config: CascadeConfig, num_tokens: int) -> int:
    """Tokens between the oldest that can still be held, sinks included, and the newest."""
    return min(num_tokens, config.reach)


def span_buckets(config: CascadeConfig) -> list[int]:
    """Upper bounds for a histogram of `final_span`: powers of two, then the longest span."""
    longest = final_span(config, config.max_model_len)
    powers = [1 << power for power in range(longest.bit_length())]
    return [bound for bound in powers if SMALLEST_BUCKET <= bound < longest] + [longest]


def startup_line(
    config: CascadeConfig, max_blocks: int, page_size_bytes: int, num_layers: int
) -> str:
    """The line that an engine logs as it starts.

    Args:
        config: The resolved configuration.
        max_blocks: R, the most blocks a request holds in a layer.
        page_size_bytes: Bytes of a block, with all that is kept beside keys and values.
        num_layers: CASCADE layers of a rank.
    """
    return (
        f"CASCADE: {config.summary()}, at most {max_blocks} blocks of {page_size_bytes} bytes per "
        f"request and layer, {max_blocks * page_size_bytes * num_layers} bytes per request in all "
        f"{num_layers} CASCADE layers of a rank"
    )


def _first_boundary(config: CascadeConfig) -> int:
    filling = sum(config.sub_cache_tokens) // config.stride
    return config.num_sink_tokens + (filling + 1) * config.stride
