"""A text in a small cascade: what the list simulation keeps of it, with survivors drawn at random.

Imports vllm_cascade, so the references do not use it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from reference.blocks import block_moves
from vllm_cascade.inspection.kept import Kept
from vllm_cascade.structure.config import CascadeConfig

NUM_TOKENS = 187
CONFIG = CascadeConfig(
    policy="blend",
    block_size=4,
    cache_tokens=48,
    num_sub_caches=3,
    newest_share=0.0,
    num_sink_tokens=4,
    stride=16,
    selection_window=16,  # so that groups wait until they are complete
    score_weight=1.0,
    key_weight=1.0,
    value_weight=1.0,
    score_power=2.0,
    score_reduction="max",
    score_decay=0.9999999,
    trace_tokens=True,
    max_model_len=200,
)


def simulate(num_tokens: int, seeds: Iterable[int]) -> list[list[list[int]]]:
    """Tokens in each sub-cache of each head, sub-cache 0 first.

    Args:
        num_tokens: Tokens computed.
        seeds: One of each head.
    """
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        moves = block_moves(
            total=num_tokens,
            sinks=CONFIG.num_sink_tokens,
            block=CONFIG.block_size,
            sizes=CONFIG.sub_cache_tokens,
            stride=CONFIG.stride,
            window=CONFIG.selection_window,
            choose=lambda _, tokens, rng=rng: sorted(rng.sample(tokens, len(tokens) // 2)),
        )
        caches: list[list[int]] = [[] for _ in range(CONFIG.num_sub_caches)]
        end = CONFIG.num_sink_tokens
        for boundary in moves:
            caches, end = boundary.caches, boundary.end
        caches[0] += range(end, num_tokens)
        found.append(caches)
    return found


def heads_of(num_tokens: int, seeds: Iterable[int]) -> list[list[int]]:
    """All tokens that each head holds, in order."""
    sinks = range(min(num_tokens, CONFIG.num_sink_tokens))
    return [
        [*sinks, *(token for cache in reversed(caches) for token in cache)]
        for caches in simulate(num_tokens, seeds)
    ]


def kept_text(**changes: Any) -> Kept:
    """A text in two layers of two heads.

    Args:
        changes: Fields of `Kept` that differ.
    """
    heads = heads_of(NUM_TOKENS, range(4))
    fields: dict[str, Any] = {
        "model": "a model",
        "config": CONFIG,
        "token_ids": list(range(NUM_TOKENS)),
        "pieces": [f" w{index}" for index in range(NUM_TOKENS)],
        "num_prompt_tokens": 180,
        "answer": "an <answer>",
        "layers": {"model.layers.0.attn": heads[:2], "model.layers.1.attn": heads[2:]},
    }
    return Kept(**{**fields, **changes})
