"""Requests that would rather be refused than answered from a cache that has dropped tokens."""

from __future__ import annotations

from typing import Any

from vllm_cascade.structure.layout import build_layout
from vllm_cascade.support.resolved import resolve_options
from vllm_cascade.support.selection import selects_cascade

# Key in the `extra_args` of vLLM's `SamplingParams`, which a server reads from "vllm_xargs".
EXACT = "cascade_exact"


def check_exact(vllm_config: Any, request: Any) -> None:
    """Refuse a request that asks to be exact and may compute more than full attention covers.

    Args:
        vllm_config: vLLM's complete configuration.
        request: vLLM's `EngineCoreRequest`, whose `max_tokens` is set.

    Raises:
        VLLMValidationError: The request may outgrow the budget, or `cascade_exact` is no truth
            value.
    """
    from vllm.exceptions import VLLMValidationError

    extra = getattr(request.sampling_params, "extra_args", None) or {}
    asked = extra.get(EXACT, False)
    if asked not in (False, True) or isinstance(asked, str):
        raise VLLMValidationError(f"{EXACT} = {asked!r}: must be true or false")
    if not asked or not selects_cascade(vllm_config.attention_config):
        return
    config = resolve_options(vllm_config)
    # The boundary after the last of these tokens changes no answer any more.
    limit = build_layout(config).epochs[0].end
    embeds, tokens = request.prompt_embeds, request.prompt_token_ids
    num_prompt = len(tokens) if tokens is not None else len(embeds)
    max_tokens = request.sampling_params.max_tokens
    # The last token of an answer is not computed.
    if request.resumable or num_prompt + max_tokens - 1 > limit:
        most = limit - num_prompt + 1
        what = f"a prompt of {num_prompt} tokens and max_tokens = {max_tokens}"
        instead = f"Give a max_tokens of at most {most}" if most > 0 else "Send a shorter prompt"
        if request.resumable:
            what, instead = "an input session, which may go on for ever", "Send a single request"
        raise VLLMValidationError(
            f"{EXACT}: attention is exact for the first {limit} tokens of a request, and this is "
            f"{what}. {instead}, leave {EXACT} out, or have the server started with more "
            "cache_tokens."
        )
