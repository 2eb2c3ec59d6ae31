"""What must hold after a soak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from soak.traffic import Answer

MIB = 1 << 20
# How many of other requests' answers the comparison must tell from a request's own.
TOLD_APART = 0.8
EXPECTED = (
    "aborted_in_prefill",
    "aborted_in_decode",
    "mixed_steps",
    "preemptions",
    "past_budget",
    "continued",
    "compared",
)


def distance(found: Answer, alone: Answer) -> float:
    """How far an answer is from the one the request gets alone, up to the first other token.

    Args:
        found: The answer.
        alone: The answer alone, with candidates.

    Returns:
        The largest difference in a token's log-probability, or what was lost by the first other
        token; infinite if that was no candidate.
    """
    largest = 0.0
    steps = zip(found.tokens, found.logprobs, alone.tokens, alone.candidates, strict=False)
    for token, logprob, right, candidates in steps:
        if token != right:
            return max(largest, candidates[right] - candidates.get(token, -math.inf))
        largest = max(largest, abs(logprob - candidates[right]))
    return largest


def compare(
    found: Sequence[Answer],
    alone: Sequence[Answer],
    batch: Sequence[Answer],
    tie: float,
    noise: float,
) -> dict[str, Any]:
    """Compare the sample with the same requests alone.

    Args:
        found: Answers under load.
        alone: Answers one after the other.
        batch: Answers to the sample at once, on the idle engine.
        tie: Difference that does not count.
        noise: Times what the batch changes, that does not count either.
    """
    quiet = max(map(distance, batch, alone), default=0.0)
    bound = max(tie, noise * quiet) if noise else tie
    off = list(map(distance, found, alone))
    others = [distance(found[i], other) for i in range(len(found)) for other in alone[:i]]
    return {
        "compared": len(found),
        "wrong": sum(each > bound for each in off),
        "off_under_load": max(off, default=0.0),
        "off_in_batch": quiet,
        "told_apart": sum(other > bound for other in others) / max(1, len(others)),
    }


def growth(readings: Sequence[tuple[float, dict[str, int]]]) -> dict[str, int]:
    """Bytes that the last third of the time needed more than the first, by kind of memory."""
    seconds = readings[-1][0]
    first = [memory for at, memory in readings if at <= seconds / 3]
    last = [memory for at, memory in readings if at >= seconds * 2 / 3]
    return {
        what: max(memory[what] for memory in last) - max(memory[what] for memory in first)
        for what in readings[0][1]
    }


def faults_of(row: dict[str, Any], state: dict[str, Any], most: int) -> list[str]:
    """What is wrong with a soak.

    Args:
        row: The row of results.
        state: The idle engine's.
        most: Bytes by which memory may grow.
    """
    faults = []
    if missing := state["pool_blocks"] - state["free_blocks"]:
        faults.append(f"{missing} of {state['pool_blocks']} blocks never came back")
    for what, number in state["held"].items():
        if number:
            faults.append(f"the scheduler still holds {number} {what}")
    for what in state["memory"]:
        if (grown := row[f"{what.replace(' ', '_')}_grew_mib"]) > most / MIB:
            faults.append(f"memory of the {what} grew by {grown} MiB")
    if row["wrong"]:
        faults.append(
            f"{row['wrong']} of {row['compared']} answers are not what the request gets alone"
        )
    if row["told_apart"] < TOLD_APART:
        faults.append(f"the comparison tells {row['told_apart']:.0%} of others' answers apart")
    faults += [f"{what.replace('_', ' ')}: none" for what in EXPECTED if not row[what]]
    return faults
