"""How right an answer is, and how sure that makes one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import sqrt

# Between the digits of one number: 12,345.
SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
Z = 1.959963984540054  # 95% of a normal distribution lie within so many deviations
FIRST_BUCKET = 1024


def parts_right(answer: str, expected: Sequence[str], names: bool) -> tuple[int, int]:
    """How many parts of what was expected an answer has, and of how many.

    Args:
        answer: The generated text.
        expected: What it has to contain.
        names: Each of `expected` is one part; otherwise each of its digits is, compared in place
            with the run of digits that agrees best. Thousands may be set off by a comma.
    """
    if names:
        found = [re.search(rf"\b{re.escape(name)}\b", answer) is not None for name in expected]
        return sum(found), len(found)
    answer = SEPARATOR.sub("", answer)
    runs = re.findall(r"\d+", answer)
    right = 0
    for number in expected:
        agreeing = [sum(a == b for a, b in zip(number, run, strict=False)) for run in runs]
        right += len(number) if number in answer else max(agreeing, default=0)
    return right, sum(map(len, expected))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, of `right` in `count`."""
    share, weight = right / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def position_buckets(logprobs: Sequence[float]) -> list[tuple[int, int, int, float]]:
    """Sums of negative log-likelihoods by position; each bucket is as long as all before it.

    Args:
        logprobs: Of a text's tokens but its first, in nats.

    Returns:
        First position, position after the last, tokens and nats of each bucket.
    """
    buckets, first, end, length = [], 1, FIRST_BUCKET, len(logprobs) + 1
    while first < length:
        end = min(end, length)
        nats = -sum(logprobs[first - 1 : end - 1])
        buckets.append((first, end, end - first, nats))
        first, end = end, 2 * end
    return buckets
