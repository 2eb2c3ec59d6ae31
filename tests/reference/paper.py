"""The paper's cascade for one head, one token at a time.

Source: Willette et al., arXiv 2406.17808, Algorithm 2, without sink tokens (token 0 is the first
one after them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Scores = Mapping[int, float]
# (stride number, tokens held oldest first with the stride's own at the end, scores before the
# stride) -> scores after the stride's queries.
ScoreRule = Callable[[int, list[int], Scores], Scores]


def token_by_token(
    total: int,
    stride: int,
    size: int,
    num_sub_caches: int,
    scores: ScoreRule | Sequence[Sequence[float]],
) -> list[list[int]]:
    """Run the paper's algorithm and return what it keeps after every whole stride.

    A token enters sub-cache 0. A token evicted from one sub-cache is offered to the next, which
    appends it on every 2**i-th step and otherwise lets it challenge the newest entry: the higher
    score stays, the newer on a tie. Nothing is refused until the cache is full.

    Args:
        total: Tokens in the request; those after the last whole stride are ignored.
        stride: Tokens whose queries are scored before they enter the cache.
        size: Tokens in one sub-cache.
        num_sub_caches: Number of sub-caches.
        scores: A rule called once per stride, or a table [stride number][token].

    Returns:
        Per stride the kept tokens, the oldest sub-cache first.
    """
    caches: list[list[int]] = [[] for _ in range(num_sub_caches)]
    current: Scores = {}
    kept: list[list[int]] = []
    for k in range(total // stride):
        new = range(k * stride, (k + 1) * stride)
        tokens = [t for cache in reversed(caches) for t in cache] + list(new)
        current = scores(k, tokens, current) if callable(scores) else dict(enumerate(scores[k]))
        for n in new:
            token, filling = n, n <= size * num_sub_caches
            for i, cache in enumerate(caches):
                if filling or n % 2**i == 0:
                    cache.append(token)
                    if len(cache) <= size:
                        break
                    token = cache.pop(0)
                else:
                    if not cache:
                        cache.append(token)
                    elif current[token] >= current[cache[-1]]:
                        cache[-1] = token
                    break
        kept.append([t for cache in reversed(caches) for t in cache])
    return kept
