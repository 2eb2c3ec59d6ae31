"""What a request has cost: boundaries run, tokens evicted and span, from its token count alone.

Pure Python: imports neither torch nor vLLM. The numbers equal those of `layout.Layout`, in closed
form: nobody has to walk through a finished request's epochs to count them.
"""

from __future__ import annotations

from vllm_cascade.structure.config import CascadeConfig

SMALLEST_BUCKET = 64


def computed_tokens(num_prompt_tokens: int, num_generation_tokens: int) -> int:
    """Count the tokens of a finished request that entered the cache.

    Args:
        num_prompt_tokens: Tokens of the prompt.
        num_generation_tokens: Tokens sampled; the last one is never computed.

    Returns:
        Tokens computed.
    """
    return num_prompt_tokens + max(0, num_generation_tokens - 1)


def kept_whole(config: CascadeConfig) -> int:
    """Count the tokens that `config` has room for in sinks and sub-caches, all kept until full."""
    return config.total_tokens


def past_budget(config: CascadeConfig, num_tokens: int) -> bool:
    """Whether a request has more tokens than sinks and sub-caches hold.

    Args:
        config: A valid configuration.
        num_tokens: Tokens computed.
    """
    return num_tokens > kept_whole(config)


def boundaries_run(config: CascadeConfig, num_tokens: int) -> int:
    """Count the boundaries that a request has run.

    Boundaries lie a stride apart, whole strides past the sinks. The first one is where the cache
    is first overfull. None runs at the end of the longest request.

    Args:
        config: A valid configuration.
        num_tokens: Tokens computed; a boundary right after the last of them has run.

    Returns:
        Boundaries. Unlike `Layout.boundaries_before`, the count leaves out the grid points at
        which the cache is still filling.
    """
    last = min(num_tokens, config.max_model_len - 1)
    return max(0, (last - config.first_boundary) // config.stride + 1)


def tokens_evicted(config: CascadeConfig, num_tokens: int) -> int:
    """Count the tokens that a request has computed but no longer holds.

    Half of each group that leaves a sub-cache or level is evicted. What leaves the last of fixed
    sub-caches is evicted whole.

    Args:
        config: A valid configuration.
        num_tokens: Tokens computed; a boundary right after the last of them has run.

    Returns:
        Tokens evicted, per layer and KV head.
    """
    boundaries = boundaries_run(config, num_tokens)
    if not boundaries:
        return 0
    end = config.first_boundary + (boundaries - 1) * config.stride
    if config.is_elastic:
        held = config.levels.held(boundaries) * config.unit_tokens
        return end - config.num_sink_tokens - held
    overfull = end - kept_whole(config)
    if config.num_sub_caches == 1:
        return overfull
    # The survivors of two groups make one group of the next sub-cache. So half as many groups leave
    # the next sub-cache.
    first = overfull // config.group_tokens
    left = [first >> index for index in range(config.num_sub_caches - 1)]
    return (sum(left) + left[-1]) * config.group_tokens // 2


def final_span(config: CascadeConfig, num_tokens: int) -> int:
    """Count the tokens of text that a request's cache spans, sinks included.

    Args:
        config: A valid configuration.
        num_tokens: Tokens computed.

    Returns:
        Tokens of text; all of them until the request outgrows the reach.
    """
    return min(num_tokens, config.reach)


def span_buckets(config: CascadeConfig) -> list[int]:
    """Give the upper bounds of a histogram of `final_span` for `config`, in tokens.

    The bounds are powers of two from `SMALLEST_BUCKET` on; the last bound is the longest span.
    """
    longest = final_span(config, config.max_model_len)
    powers = [1 << power for power in range(longest.bit_length())]
    return [bound for bound in powers if SMALLEST_BUCKET <= bound < longest] + [longest]


def startup_line(
    config: CascadeConfig, max_blocks: int, page_size_bytes: int, num_layers: int
) -> str:
    """Write the line that an engine logs as it starts.

    Args:
        config: The resolved configuration.
        max_blocks: R, the most blocks a request holds in a layer.
        page_size_bytes: Bytes of a block in one layer; scores and token indices count.
        num_layers: CASCADE layers of a rank.

    Returns:
        One line without a line break.
    """
    return (
        f"CASCADE: {config.summary()}, at most {max_blocks} blocks of {page_size_bytes} bytes per "
        f"request and layer, {max_blocks * page_size_bytes * num_layers} bytes per request in all "
        f"{num_layers} CASCADE layers of a rank"
    )
