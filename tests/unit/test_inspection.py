"""What `vllm-cascade inspect` tells of kept tokens, and what it refuses, without an engine."""

from __future__ import annotations

import io

import pytest

from cascade_text import CONFIG, NUM_TOKENS, heads_of, kept_text, simulate
from vllm_cascade import cli
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import engine
from vllm_cascade.inspection import command
from vllm_cascade.inspection.kept import layers_of, pieces_of
from vllm_cascade.structure import accounting
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.resolve import resolve

BEFORE_ANY_ENGINE = ["inspect", "no-such-model"]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 30, 51, 52, 68, 69, 180, 187, 188])
def test_parts_are_those_of_the_list_simulation(num_tokens):
    (caches,) = simulate(num_tokens, seeds=[0])
    expected = {f"sub-cache {i}": len(caches[i]) for i in reversed(range(len(caches)))}
    sinks = min(num_tokens, CONFIG.num_sink_tokens)
    assert list(build_layout(CONFIG).parts(num_tokens).items()) == [
        ("sinks", sinks),
        *expected.items(),
    ]


def test_parts_hold_what_is_not_evicted():
    for num_tokens in range(1, CONFIG.max_model_len + 1):
        held = sum(build_layout(CONFIG).parts(num_tokens).values())
        assert held == num_tokens - accounting.tokens_evicted(CONFIG, num_tokens)


def test_spans_and_starts_are_those_of_the_content():
    kept, seeds = kept_text(), range(4)
    simulated = simulate(NUM_TOKENS, seeds)
    for index in range(CONFIG.num_sub_caches):
        found = [caches[index] for caches in simulated]
        first, last = min(tokens[0] for tokens in found), max(tokens[-1] for tokens in found)
        assert kept.spans()[f"sub-cache {index}"] == (first, last)
    assert kept.spans()["sinks"] == (0, CONFIG.num_sink_tokens - 1)
    for caches, head in zip(simulated, heads_of(NUM_TOKENS, seeds), strict=True):
        assert kept.starts(head) == [0, *(tokens[0] for tokens in reversed(caches))]


def test_counts_are_of_all_layers_and_heads():
    kept = kept_text()
    heads = heads_of(NUM_TOKENS, range(4))
    assert kept.num_heads == 4
    assert kept.counts.tolist() == [sum(t in head for head in heads) for t in range(NUM_TOKENS)]
    said = kept.as_text()
    none = sum(all(t not in head for head in heads) for t in range(NUM_TOKENS))
    assert none and f"none of them {none} ({none / NUM_TOKENS:.1%})" in said
    assert "187 tokens computed, 180 of them the prompt's; answer: 'an <answer>'" in said


def test_a_passage_is_found_with_all_tokens_that_hold_a_part_of_it():
    kept, heads = kept_text(), heads_of(NUM_TOKENS, range(4))
    (passage,) = kept.find("30 w31 w3")
    assert (passage.first, passage.last) == (30, 32)
    held = [sum(t in head for t in (30, 31, 32)) for head in heads]
    assert passage.share == pytest.approx(sum(held) / 12) and passage.whole == held.count(3)
    assert [(p.first, p.last) for p in kept.find(" w18")] == [
        (18, 18),
        *[(t, t) for t in range(180, 187)],
    ]
    (whole,) = kept.find(" w0 w1")
    assert (whole.share, whole.whole) == (1, 4)
    pieces = ["", "", "🙂", *(f" w{t}" for t in range(3, NUM_TOKENS))]
    assert [(p.first, p.last) for p in kept_text(pieces=pieces).find("🙂")] == [(2, 2)]
    assert kept.find("w1.") == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda kept: kept[:-1],
        lambda kept: [*kept[:-1], NUM_TOKENS],
        lambda kept: [kept[1], kept[0], *kept[2:]],
        lambda kept: [kept[0], kept[0], *kept[2:]],
        lambda kept: [-1, *kept[1:]],
    ],
)
def test_pages_that_hold_something_else_are_refused(wrong):
    (head,) = heads_of(NUM_TOKENS, [0])
    with pytest.raises(ValueError, match="a-layer, KV head 1"):
        kept_text(layers={"a-layer": [head, wrong(head)]})


def test_ranks_share_a_layers_heads_or_the_layers():
    first, second = {"a": [[1], [2]]}, {"a": [[3], [4]]}
    assert layers_of([first, second]) == {"a": [[1], [2], [3], [4]]}
    assert layers_of([first, {"b": [[5]]}]) == {"a": [[1], [2]], "b": [[5]]}
    assert first == {"a": [[1], [2]]}


class Bytes:
    """A byte a token."""

    def decode(self, token_ids, **_):
        return bytes(token_ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token_id):
        return f"<{token_id}>"


class Words(Bytes):
    """Words with SentencePiece's mark, which is lost where a text begins."""

    names = ("▁The", "▁pass", "key", "▁")

    def decode(self, token_ids, **_):
        return "".join(self.names[t] for t in token_ids).replace("▁", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, token_id):
        return self.names[token_id]


def test_pieces_join_to_the_text_whole_characters_in_one_of_their_tokens():
    text = "naïve 🙂 – \ufffd!"
    pieces = pieces_of(Bytes(), list(text.encode()))
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert pieces[2:4] == ["", "ï"] and pieces[7:11] == ["", "", "", "🙂"]
    assert pieces_of(Bytes(), list("🙂".encode()[:3])) == ["", "", "\ufffd"]
    broken = [0xF0, *b"abcd"]
    assert "".join(pieces_of(Bytes(), broken)) == "\ufffdabcd"
    assert pieces_of(Words(), [0, 1, 2, 3]) == [" The", " pass", "key", " "]


def refused(capsys, *arguments, code=2):
    assert cli.main([*BEFORE_ANY_ENGINE, *arguments]) == code
    return capsys.readouterr().err


def test_command_lines_that_cannot_work_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "full attention forgets nothing" in refused(capsys, "text", "--cache=full")
    assert "no cache 'best'" in refused(capsys, "text", "--cache=best")
    assert "'strid' = 8: no such option. Known:" in refused(capsys, "text", "--options=strid=8")
    said = refused(capsys, "text", "--options=cache_tokens=8", "--cache-tokens=8")
    assert "--options sets cache_tokens" in said
    assert "cannot read the prompt @missing.txt" in refused(capsys, "@missing.txt")
    assert "give a file in a folder" in refused(capsys, "text", "--output=missing/kept.html")
    assert "give a file in a folder" in refused(capsys, "text", f"--output={tmp_path}")
    assert "'xt.', to --find, is not in the prompt" in refused(capsys, "text", "--find=xt.")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot read a tokenizer of no-such-model" in refused(capsys, "text")
    assert not list(tmp_path.iterdir())


class Tokenizer(Bytes):
    """A byte a token, after a special one."""

    chat_template = None

    def encode(self, text, add_special_tokens):
        return [*[0] * add_special_tokens, *text.encode()]

    def apply_chat_template(self, messages, **_):
        return f"<{messages[0]['content']}>"


@pytest.fixture
def settled(monkeypatch):
    """Command lines get as far as the engine, which is given a prompt and options."""
    seen = {}

    def keep(given, options, config, tokenizer, prompt):
        seen.update(options=options, config=config, prompt=prompt)
        raise CommandError("the engine starts")

    def settle(model, options):
        cascade = command.CascadeOptions.parse(options["additional_config"]["cascade"])
        length = options["max_model_len"]
        return 256, resolve(cascade, block_size=4, max_model_len=length, position_limit=256)

    monkeypatch.setattr(command, "_keep", keep)
    monkeypatch.setattr(command, "load_tokenizer", lambda model: Tokenizer())
    monkeypatch.setattr(engine, "resolve", settle)
    return seen


SMALL = "--options=num_sink_tokens=4,selection_window=2,num_sub_caches=2"


def test_the_prompt_comes_from_the_command_line_a_file_or_the_input(
    capsys, tmp_path, monkeypatch, settled
):
    text = "In the beginning. " * 12
    (tmp_path / "prompt.txt").write_text(text)
    for prompt in (text, f"@{tmp_path / 'prompt.txt'}"):
        refused(capsys, prompt, SMALL, "--cache-tokens=64")
        assert settled.pop("prompt") == [0, *text.encode()]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    refused(capsys, "-", SMALL, "--cache-tokens=64")
    assert settled["prompt"] == [0, *text.encode()]
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert "cannot read the prompt" in refused(capsys, f"@{tmp_path / 'prompt.txt'}")
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: [])
    assert "the prompt is empty" in refused(capsys, "")


def test_a_chat_template_wraps_the_prompt_and_brings_its_own_special_tokens(
    capsys, monkeypatch, settled
):
    text = "x" * 200
    assert "has no chat template" in refused(capsys, text, SMALL, "--chat")
    monkeypatch.setattr(Tokenizer, "chat_template", "stub")
    refused(capsys, text, SMALL, "--cache-tokens=64", "--chat")
    assert settled["prompt"] == list(f"<{text}>".encode())


def test_the_engine_gets_the_cascade_with_its_trace(capsys, settled):
    said = refused(capsys, "x" * 200, SMALL, "--cache-tokens=64", "--max-tokens=7")
    assert said == "vllm-cascade inspect: the engine starts\n"
    options = settled["options"]
    assert options["max_model_len"] == 201 + 7
    assert options["attention_backend"] == "CASCADE"
    assert options["worker_extension_cls"] == "vllm_cascade.trace.WorkerExtension"
    cascade = options["additional_config"]["cascade"]
    assert cascade["trace_tokens"] is True and cascade["cache_tokens"] == 64
    refused(capsys, "x" * 200, SMALL, "--cache-tokens=64", "--max-model-len=4096")
    assert settled["options"]["max_model_len"] == 4096
    said = refused(capsys, "x" * 200, SMALL, "--max-model-len=200")
    assert "take 217 tokens, more than --max-model-len 200" in said
    said = refused(capsys, "x" * 200, SMALL, '--engine-args={"max_model_len": 9}')
    assert "--engine-args sets max_model_len" in said


def test_a_prompt_that_loses_nothing_is_refused_with_a_budget_that_loses(capsys, settled):
    said = refused(capsys, "x" * 150, SMALL, "--cache-tokens=160")
    assert "nothing is forgotten of 166 tokens in a budget of 160 tokens" in said
    assert "give --cache-tokens 80, or a longer prompt" in said
    assert "the engine starts" in refused(capsys, "x" * 150, SMALL, "--cache-tokens=80")
    said = refused(capsys, "short", f"{SMALL},stride=64")
    assert said.endswith("a stride of 64: give a longer prompt\n")
