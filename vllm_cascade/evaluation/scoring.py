"""How right answers are, and how certain their share is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import sqrt

# A comma between the digits of one number: 12,345.
SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
FIRST_BUCKET = 1024


def parts_right(answer: str, expected: Sequence[str], names: bool) -> tuple[int, int]:
    """Count the parts of the expected answer that an answer has.

    Args:
        answer: The generated text.
        expected: The names or the numbers that the answer has to contain.
        names: True if `expected` are names, each of which is one part. Otherwise they are numbers,
            and each digit is one part: a number is compared, digit by digit, with the run of
            digits in the answer that agrees best. The answer may have commas after thousands.

    Returns:
        Parts that the answer has, and parts in all.
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
    """Compute Wilson's 95% interval of a share.

    Args:
        right: Number of right answers.
        count: Number of answers, at least 1.

    Returns:
        Lower and upper end, 0 to 1.
    """
    share, weight = right / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def position_buckets(logprobs: Sequence[float]) -> list[tuple[int, int, int, float]]:
    """Sum negative log-likelihoods by position; a bucket is as long as all buckets before it.

    Args:
        logprobs: Log-probabilities of a text's tokens but the first, in nats.

    Returns:
        For each bucket its first position, the position after its last, its number of tokens, and
        the sum in nats.
    """
    buckets, first, end, length = [], 1, FIRST_BUCKET, len(logprobs) + 1
    while first < length:
        end = min(end, length)
        nats = -sum(logprobs[first - 1 : end - 1])
        buckets.append((first, end, end - first, nats))
        first, end = end, 2 * end
    return buckets
