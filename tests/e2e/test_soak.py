"""Finds alone: what random load leaves behind, and a condition of the soak that cannot fail."""

from __future__ import annotations

import array
import copy
import math
from pathlib import Path
from typing import Any

import pytest

from e2e.forks import run_benchmark
from soak.checks import EXPECTED, MIB, compare, distance, faults_of, growth
from soak.run import GPU
from soak.traffic import Answer, Ask

ROW = {
    "aborted_in_prefill": 3,
    "aborted_in_decode": 3,
    "mixed_steps": 3,
    "preemptions": 3,
    "past_budget": 3,
    "continued": 3,
    "compared": 6,
    "wrong": 0,
    "told_apart": 0.9,
    "engine_grew_mib": 1.5,
    "front_end_grew_mib": -2.0,
}
STATE = {
    "pool_blocks": 42,
    "free_blocks": 42,
    "held": {"requests": 0},
    "memory": {"engine": 0, "front end": 0},
}


def test_every_condition_holds(tmp_path: Path) -> None:
    """The program itself is the test: it ends with 1 unless all it says holds."""
    code, said = run_benchmark(tmp_path / "log", "soak.run", "--tiny")
    assert code == 0, said[-3000:]
    assert "every check holds" in said


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        (STATE, "free_blocks", 41, "1 of 42 blocks never came back"),
        (STATE, "held", {"requests": 2}, "still holds 2 requests"),
        (ROW, "engine_grew_mib", 9.0, "memory of the engine grew by 9.0 MiB"),
        (ROW, "front_end_grew_mib", 9.0, "memory of the front end grew"),
        (ROW, "wrong", 1, "1 of 6 answers are not what"),
        (ROW, "told_apart", 0.5, "tells 50% of"),
        *((ROW, name, 0, f"{name.replace('_', ' ')}: none") for name in EXPECTED),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_condition_that_fails_is_named(where: Any, name: str, value: Any, words: str) -> None:
    row, state = copy.deepcopy((ROW, STATE))
    assert faults_of(row, state, 8 * MIB) == []
    (row if where is ROW else state)[name] = value
    (fault,) = faults_of(row, state, 8 * MIB)
    assert words in fault


def test_memory_of_the_last_third_is_held_against_the_first() -> None:
    needed = [100, 300, 200, 900, 200, 250, 340]
    readings = [(float(at), {"engine": mib * MIB}) for at, mib in enumerate(needed)]
    assert growth(readings) == {"engine": 40 * MIB}


def answer(*steps: tuple[int, float], candidates: tuple[dict[int, float], ...] = ()) -> Answer:
    tokens, logprobs = zip(*steps, strict=True)
    return Answer(array.array("i", tokens), array.array("d", logprobs), list(candidates))


def test_answers_are_compared_up_to_the_first_other_token() -> None:
    alone = answer((5, -1.0), (6, -2.0), candidates=({5: -1.0, 7: -1.25}, {6: -2.0}))
    assert distance(answer((5, -1.0), (6, -2.0)), alone) == 0
    assert distance(answer((5, -1.5), (6, -2.0)), alone) == 0.5
    assert distance(answer((7, -1.25), (9, -9.0)), alone) == 0.25
    assert distance(answer((5, -1.0), (9, -2.0)), alone) == math.inf


def test_a_wrong_answer_is_counted() -> None:
    alone = [answer((token, -1.0), candidates=({token: -1.0},)) for token in (5, 6, 7)]
    found = compare([alone[0], alone[2], alone[2]], alone, alone, 0.1, 0.0)
    assert (found["compared"], found["wrong"], found["off_in_batch"]) == (3, 1, 0)
    assert found["told_apart"] == 1
    assert compare(*[alone[:1] * 3] * 3, 0.1, 0.0)["told_apart"] == 0


def test_noise_counts_only_where_it_is_let() -> None:
    alone = [answer((5, -1.0), candidates=({5: -1.0},))]
    batch, found = [answer((5, -1.2))], [answer((5, -1.3))]
    assert compare(found, alone, batch, 0.1, 0.0)["wrong"] == 1
    assert compare(found, alone, batch, 0.1, 1.0)["wrong"] == 1
    assert compare(found, alone, batch, 0.1, 2.0)["wrong"] == 0


def test_clients_are_as_varied_as_described() -> None:
    load = GPU.load
    asks = [Ask.draw(load, number) for number in range(2000)]
    lengths = [ask.prompt_tokens for ask in asks]
    assert min(lengths) == 1
    assert 45 * load.budget < max(lengths) <= 50 * load.budget
    assert 0.25 < sum(length > load.budget for length in lengths) / len(asks) < 0.5
    assert 150 < sum(ask.is_hasty for ask in asks) < 250
    assert 150 < sum(ask.enough is not None for ask in asks) < 250
    for ask in asks[:50]:
        prompt = ask.prompt(256)
        assert len(prompt) == ask.prompt_tokens
        assert prompt == Ask.draw(load, ask.number).prompt(256)
