"""Prompts, scores, caches and files of `vllm-cascade eval`, without an engine."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import json
import random
import re
from itertools import pairwise
from math import exp, isclose, log

import pytest

from vllm_cascade import cli
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import facts, report, runner, texts
from vllm_cascade.evaluation.caches import parse_caches, parse_options, parse_sweep
from vllm_cascade.evaluation.command import make_prompts as prompts_of_command
from vllm_cascade.evaluation.engine import Completion
from vllm_cascade.evaluation.prompts import FILLERS, MAX_DEFINITION, PromptBuilder
from vllm_cascade.evaluation.results import Results
from vllm_cascade.evaluation.scoring import parts_right, position_buckets, wilson
from vllm_cascade.evaluation.tasks import TASKS, TaskOptions, fillers_of, make_prompts
from vllm_cascade.evaluation.texts import MODULES, Texts, load_texts, python_code, save_texts
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

BOS, EOS = 0, 1
FIVE_LETTERS = "abcdefghijklmno"
WORDS = tuple(a + b + "x" for a in FIVE_LETTERS for b in FIVE_LETTERS)
BOOK = "\n".join(f"In the year {year} nothing came to pass. All was well." for year in range(400))
LONG_CLASS = "class Long:\n" + "    # all of this belongs together\n\n" * 80
CODE = "\n\n\n".join(
    LONG_CLASS if n == 30 else f"# Number {n}.\n@cache\ndef step_{n}(x):\n    return x + {n}"
    for n in range(60)
)
TEXTS = Texts((BOOK,), WORDS, CODE)


class Tokenizer:
    """One token a character, after two special ones."""

    all_special_ids = (BOS, EOS)
    chat_template = "stub"

    def encode(self, text, add_special_tokens):
        return [BOS] * add_special_tokens + [ord(char) + 2 for char in text]

    def decode(self, token_ids):
        return "".join(chr(token - 2) for token in token_ids if token > 1)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **_):
        assert not tokenize and add_generation_prompt
        return f"<user>{messages[0]['content']}</user><assistant>"


def prompts_of(task, *, filler="words", length=3000, count=5, seed=0, chat=False, texts=TEXTS):
    builder = PromptBuilder(Tokenizer(), texts, chat)
    return make_prompts(builder, task, filler, length, count, seed, TaskOptions())


def text_of(prompt):
    return Tokenizer().decode(prompt.token_ids)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_length_asked_for(task, filler, chat):
    for length in (3000, 3001, 3007):
        for prompt in prompts_of(task, filler=filler, length=length, chat=chat):
            assert len(prompt.token_ids) == prompt.length == length


@pytest.mark.parametrize("filler", FILLERS)
def test_a_passkey_stands_in_its_depth_band(filler):
    prompts = prompts_of("passkey", filler=filler, length=20_000, count=10)
    for prompt in prompts:
        text, (key,) = text_of(prompt), prompt.expected
        assert text.count(key) == 12
        assert prompt.index % 5 == int(prompt.depth * 5)
        assert abs(text.index(key) / len(text) - prompt.depth) < 0.06
        assert text.endswith("What is the pass key? The pass key is")
    assert len({prompt.expected for prompt in prompts}) == 10


def test_no_depth_is_beyond_the_filler():
    builder = PromptBuilder(Tokenizer(), TEXTS, chat=False)

    def built(depth):
        filler = builder.filler("sentences", random.Random(0))
        return Tokenizer().decode(builder.build(900, "A\n", filler, [(depth, "KEY\n")], "Q", "B"))

    assert built(0.0).startswith("A\nKEY\nThe grass")
    assert "\nKEY\n" in built(1.0)
    assert built(1.0).index("KEY") > 700


def test_needles_in_one_place_keep_their_order():
    builder = PromptBuilder(Tokenizer(), TEXTS, chat=False)
    filler = builder.filler("sentences", random.Random(0))
    needles = [(0.3, "ONE\n"), (0.3001, "TWO\n")]
    assert "ONE\nTWO\n" in Tokenizer().decode(builder.build(2000, "A", filler, needles, "Q", "B"))


def test_prompts_do_not_depend_on_how_many_are_made():
    assert prompts_of("multikey", count=2) == prompts_of("multikey", count=5)[:2]
    assert prompts_of("multikey", seed=1) != prompts_of("multikey", seed=2)


def test_with_a_chat_template_the_answer_starts_after_it():
    (prompt,) = prompts_of("passkey", count=1, chat=True)
    text = text_of(prompt)
    assert text.startswith("<user>There is an important info")
    assert text.endswith("What is the pass key?</user><assistant>The pass key is")


def test_each_key_is_hidden_and_the_asked_one_expected():
    for prompt in prompts_of("multikey"):
        text, (key,) = text_of(prompt), prompt.expected
        hidden = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", text))
        asked = re.search(r"What is the pass key of (\w+)\?", text)[1]
        assert len(hidden) == 4 and hidden[asked] == key
    for prompt in prompts_of("multikey-all"):
        text = text_of(prompt)
        hidden = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", text))
        asked = re.search(r"keys of (.*), in this order", text)[1].split(", ")
        assert tuple(hidden[name] for name in asked) == prompt.expected


def test_a_looked_up_key_has_one_line():
    # Of one word, so that keys would often be the same by chance.
    for prompt in prompts_of("lookup", length=20_000, texts=Texts((BOOK,), ("word",))):
        text, (value,) = text_of(prompt), prompt.expected
        asked = re.search(r'value of "([\w-]+)"\?', text)[1]
        assert re.findall(rf'"{asked}": (\d+)\n', text) == [value]
        lines = re.findall(r'"([\w-]+)": \d+\n', text)
        assert len(lines) == len(set(lines)) > 100


def test_a_chain_leads_to_its_value_in_order():
    for prompt in prompts_of("variables"):
        text = text_of(prompt)
        value = re.search(r"assigned the value (\d+) in the text", text)[1]
        chain = prompt.expected
        assert f"VAR {chain[0]} = {value}\n" in text
        places = [text.index(f"VAR {chain[0]} = {value}\n")]
        places += [text.index(f"VAR {b} = VAR {a}\n") for a, b in pairwise(chain)]
        assert places == sorted(places) and len(chain) == 5
        assert len(re.findall(r"VAR \w+ = ", text)) == 10


def test_a_sentence_is_hidden_once_and_asked_for():
    asked = set()
    for prompt in prompts_of("sentence", filler="book", length=20_000, count=20):
        text, (number,) = text_of(prompt), prompt.expected
        (line,) = (line for line in text.splitlines() if number in line)
        assert text.count(number) == 1 and line[0].isupper() and line[-1] == "."
        assert text.startswith("Read the following text. I will ask one question about it.\n")
        assert abs(text.index(line) / len(text) - prompt.depth) < 0.06
        assert prompt.index % 5 == int(prompt.depth * 5)
        asked.add(text.splitlines()[-1])
    assert len(asked) > 15


def test_templates_ask_for_the_number_that_they_tell():
    fields = re.compile(r"{(\w+)}")
    assert len(facts.TEMPLATES) >= 8
    for said, question, answer_start in facts.TEMPLATES:
        assert said.count("{number}") == 1 and "pass key" not in said
        told = set(fields.findall(said)) - {"number"}
        # What tells the sentence from another one is in the question.
        assert told and set(fields.findall(question)) == told
        assert set(fields.findall(answer_start)) <= told
        assert f"{answer_start.split()[-1]} {{number}}" in said


def test_a_function_stands_between_definitions():
    for prompt in prompts_of("constant", filler="code", length=3000, count=10):
        text, (number,) = text_of(prompt), prompt.expected
        name = re.search(r"the function (\w+)\(\) return\? The function \1\(\) returns$", text)[1]
        assert 3 <= len(name.split("_")) <= 4 and text.count(number) == 1
        function = re.escape(f"def {name}():\n    return {number}\n\n\n")
        assert re.search(rf"(?:about it\.\n|\n\n\n){function}# Number", text)
        body = text.partition("about it.\n")[2].rpartition("\n\n\n#")[0]
        assert name in [node.name for node in ast.parse(body).body]


def test_no_long_definition_is_in_the_way():
    assert len(LONG_CLASS) > MAX_DEFINITION
    for prompt in prompts_of("passkey", filler="code", length=6000):
        assert "step_29" in text_of(prompt) and "class" not in text_of(prompt)
    # Of code in which nothing looks like a definition every line is short enough.
    other = Texts((BOOK,), WORDS, "int x = 1;\n" * 400)
    assert "int x = 1;\nint x" in text_of(prompts_of("constant", filler="code", texts=other)[0])
    with pytest.raises(CommandError, match=r"no source code.*code\.txt"):
        prompts_of("constant", filler="code", texts=Texts((BOOK,), WORDS))


def test_a_number_that_the_text_has_is_not_hidden_in_it():
    class Drawn:
        def randrange(self, *_):
            return left.pop(0)

    builder = PromptBuilder(
        Tokenizer(), Texts(("In 11111", "22222 men"), WORDS, "x = 33333"), False
    )
    for filler, number in (("book", "33333"), ("code", "11111"), ("words", "11111")):
        left = [11111, 22222, 33333] if filler == "book" else [33333, 11111]
        left = left if filler != "words" else [11111]
        assert builder.number(filler, Drawn()) == number and not left


def test_a_chain_leads_to_its_number():
    for prompt in prompts_of("chain", filler="book"):
        text, (number,) = text_of(prompt), prompt.expected
        body, _, question = text.partition("What is the value of VAR ")
        assigned = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", body, re.M))
        name = question.partition("?")[0]
        assert question.endswith(f"The value of VAR {name} is") and len(assigned) == 3
        steps = [name]
        while steps[-1] in assigned:
            steps.append(assigned[steps[-1]])
        assert len(steps) == 4 and steps[-1] == number
        places = [text.index(f"VAR {step} = ") for step in steps[2::-1]]
        assert places == sorted(places)


def test_several_facts_are_asked_for_in_their_order():
    for prompt in prompts_of("several", filler="book"):
        text, numbers = text_of(prompt), prompt.expected
        assert len(set(numbers)) == 3 and prompt.depth is None
        told, keyed, assigned = (
            next(line for line in text.splitlines() if number in line) for number in numbers
        )
        assert keyed == f"The pass key is {numbers[1]}. Remember it. {numbers[1]} is the pass key."
        assert text.count(keyed) == 1 and len(re.findall(r"^VAR ", text, re.M)) == 3
        assert re.fullmatch(rf"VAR \w+ = {numbers[2]}", assigned)
        question = text.splitlines()[-1]
        parts = re.search(r"a line each\. 1\. (.*) 2\. (.*) 3\. (.*) 1\. (.*)", question)
        assert parts[2] == "What is the pass key?" and "VAR" in parts[3]
        assert told.startswith(parts[4]) or parts[4].split()[-1] in told


def test_tasks_take_the_fillers_that_suit_them():
    def cells(tasks, fillers):
        given = argparse.Namespace(tasks=tasks, fillers=fillers, lengths=[2500], count=1)
        given.__dict__ |= {"perplexity_count": 1, "keys": 4, "repeats": 1, "hops": 4, "seed": 0}
        prompts = prompts_of_command(given, PromptBuilder(Tokenizer(), TEXTS, False))
        return [(prompt.task, prompt.filler) for prompt in prompts]

    tasks = ["passkey", "lookup", "sentence", "constant", "perplexity"]
    own = [("lookup", ""), ("sentence", "book"), ("constant", "code")]
    texts = [("perplexity", "book"), ("perplexity", "code")]
    assert cells(tasks, None) == [("passkey", "words"), *own, *texts]
    picked = ["code", "book", "code"]
    assert cells(tasks, picked) == [("passkey", "code"), ("passkey", "book"), *own, *texts[::-1]]
    with pytest.raises(CommandError, match=r"'constant' .* words, book: add one of code to"):
        fillers_of("constant", ["words", "book"])
    for name, task in TASKS.items():
        assert set(fillers_of(name, None)) <= {"", *FILLERS} and set(task.fillers) <= set(FILLERS)


def test_perplexity_is_of_books_and_of_code():
    for filler, source in (("book", BOOK), ("code", CODE)):
        first, second = prompts_of("perplexity", filler=filler, length=2000, count=2)
        for prompt in (first, second):
            text = text_of(prompt)
            assert re.sub(r"\s+", " ", text.strip()) in re.sub(r"\s+", " ", source)
            assert len(prompt.token_ids) == 2000 and not prompt.expected
        assert text_of(first) != text_of(second)
    # Whole lines, with those that the filler leaves out.
    (all_of_it,) = prompts_of("perplexity", filler="code", length=len(CODE) + 1, count=1)
    assert LONG_CLASS in text_of(all_of_it)
    # The texts of books are those of results that have no filler.
    (prompt,) = prompts_of("perplexity", filler="book", count=1)
    assert prompt.seed == "0/perplexity//3000/0"
    with pytest.raises(CommandError, match=r"the code has [\d,]+ tokens, fewer"):
        prompts_of("perplexity", filler="code", length=1_000_000)


def test_no_room_and_too_short_a_book_are_refused():
    with pytest.raises(CommandError, match="no room for filler"):
        prompts_of("passkey", length=300)
    with pytest.raises(CommandError, match=r"book 1 has [\d,]+ tokens, fewer than 1,000,000"):
        prompts_of("perplexity", length=1_000_000)


def test_texts_come_from_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text(BOOK)
    with pytest.raises(CommandError, match="distinct words"):
        load_texts(tmp_path)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    assert load_texts(tmp_path) == Texts((BOOK,), tuple(sorted(WORDS)), python_code())
    (tmp_path / "b.txt").unlink()
    with pytest.raises(CommandError, match="holds no book"):
        load_texts(tmp_path)


def test_code_comes_from_a_folder(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text(BOOK)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    monkeypatch.setattr(texts, "python_code", lambda: "pass")
    assert load_texts(tmp_path).code == "pass"
    (tmp_path / "code.txt").write_text(f"{CODE}\n")
    assert load_texts(tmp_path) == Texts((BOOK,), tuple(sorted(WORDS)), CODE)
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "b.py").write_text("b = 2\n")
    (tmp_path / "code" / "a.py").write_text("\na = 1\n")
    (tmp_path / "code" / "deep" / "c.py").write_text("c = 3")
    assert load_texts(tmp_path).code == "a = 1\n\n\nb = 2\n\n\nc = 3"


def test_pythons_own_code_is_enough_for_long_prompts():
    code = python_code()
    assert MODULES.split() == sorted(MODULES.split()) and not re.search(r"\btests?/", MODULES)
    assert "\n\n\nclass ArgumentParser(" in code and "\nclass BaseEventLoop(" in code
    parts = PromptBuilder(Tokenizer(), Texts((), (), code), False)._definitions()
    assert "".join(parts) == f"{code}\n\n\n"
    assert sum(len(part) for part in parts if len(part) <= MAX_DEFINITION) > 1_000_000
    # No name or place of what is hidden is in it.
    assert not any(f"_for_{owner}" in code for owner in facts.OWNERS.split())


@pytest.mark.skipif(importlib.util.find_spec(texts.PACKAGE) is None, reason="no book")
def test_saved_texts_make_the_same_prompts(tmp_path):
    assert [file.name for file in save_texts(tmp_path)] == ["book.txt", "code.txt"]
    saved = load_texts(tmp_path)
    assert saved == load_texts(None) and saved.code
    assert not any(name in saved.books[0] for name in facts.PLACES.split())


@pytest.mark.parametrize(
    ("answer", "expected", "names", "right"),
    [
        (" 12345. Remember", ["12345"], False, (5, 5)),
        ("x12345y", ["12345"], False, (5, 5)),
        ("12945, not 1", ["12345"], False, (4, 5)),
        ("1234", ["12345"], False, (4, 5)),
        ("none", ["12345"], False, (0, 5)),
        ("12,345 oak sleepers", ["12345"], False, (5, 5)),
        ("12,3456", ["12345"], False, (2, 5)),
        ("1, 12,345, 99", ["12345", "99"], False, (7, 7)),
        ("11111 and 22222", ["11111", "22229"], False, (9, 10)),
        ("ABCDE, FGHIJ", ["ABCDE", "KLMNO"], True, (1, 2)),
        ("XABCDE", ["ABCDE"], True, (0, 1)),
    ],
)
def test_parts_right(answer, expected, names, right):
    assert parts_right(answer, expected, names) == right


def test_wilson_interval_holds_the_shares_that_it_should():
    """The interval's ends are the shares from which what was seen is 1.96 deviations away."""
    for right, count in ((0, 5), (3, 5), (5, 5), (17, 20)):
        for end in wilson(right, count):
            if 0 < end < 1:
                distance = abs(right / count - end) / (end * (1 - end) / count) ** 0.5
                assert isclose(distance, 1.959964, rel_tol=1e-5)


@pytest.mark.parametrize("length", [2, 700, 1024, 1025, 5000])
def test_buckets_cover_every_token_but_the_first(length):
    buckets = position_buckets([-float(i) for i in range(1, length)])
    assert [b[1] for b in buckets[:-1]] == [b[0] for b in buckets[1:]]
    assert buckets[0][0] == 1 and buckets[-1][1] == length
    assert all(tokens == end - first for first, end, tokens, _ in buckets)
    assert all(nats == sum(range(first, end)) for first, end, _, nats in buckets)


def test_caches_are_crossed_with_the_sweep():
    sweep = parse_sweep(["selection_window=2,64", "stride=128,256"])
    shared = parse_options("cache_tokens=1024,num_sub_caches=4")
    caches = parse_caches(["full", "window", "blend:score_reduction=mean"], shared, sweep)
    assert [cache.label for cache in caches] == [
        "full",
        "window:stride=128",
        "window:stride=256",
        *(
            f"blend:score_reduction=mean,selection_window={window},stride={stride}"
            for window in (2, 64)
            for stride in (128, 256)
        ),
    ]
    assert caches[0].cascade is None
    assert caches[1].cascade == {"policy": "window", "cache_tokens": 1024, "stride": 128}
    assert caches[-1].cascade == {
        "policy": "blend",
        "cache_tokens": 1024,
        "num_sub_caches": 4,
        "score_reduction": "mean",
        "selection_window": 64,
        "stride": 256,
    }


def test_an_option_leaves_policies_alone_that_it_does_not_change():
    sweep = parse_sweep(["score_power=1,3", "value_weight=0,1"])
    shared = parse_options("score_decay=0.9,key_weight=2,stride=128")
    window, *distinct = parse_caches(["window", "distinct"], shared, sweep)
    assert window.cascade == {"policy": "window", "stride": 128}
    assert [cache.label for cache in distinct] == [f"distinct:value_weight={n}" for n in (0, 1)]
    assert distinct[0].cascade == {
        "policy": "distinct",
        "key_weight": 2,
        "stride": 128,
        "value_weight": 0,
    }
    labels = [cache.label for cache in parse_caches(["blend"], shared, sweep)]
    assert len(labels) == 4 and "blend:score_power=1,value_weight=0" in labels
    with pytest.raises(CommandError, match=r"'distinct:score_power=2': .*score_power"):
        parse_caches(["distinct:score_power=2"], {}, {})


def test_a_caches_own_options_win():
    (cache,) = parse_caches(["blend:stride=256"], parse_options("stride=128"), {})
    assert cache.cascade == {"policy": "blend", "stride": 256}


@pytest.mark.parametrize(
    ("caches", "shared", "sweep", "said"),
    [
        (["ring"], "", [], "no cache 'ring'.*full, distinct, blend, paper, window"),
        (["full:stride=2"], "", [], "full attention has no options"),
        (["blend", "blend"], "", [], "'blend' is given twice"),
        (["blend:stride"], "", [], "'stride' is no name=value"),
        (["blend:stride=1,stride=2"], "", [], "'stride=2' is given twice"),
        (["blend:strides=256"], "", [], "'blend:strides=256': .*strides"),
        (["blend:stride=long"], "", [], "stride.*whole number"),
        (["window:key_weight=1"], "", [], "window.*key_weight"),
        (["blend:stride=2"], "", ["stride=2,4"], "sets stride, which --sweep varies"),
        (["blend"], "policy=paper", [], "policy is a cache's name"),
        (["blend"], "", ["strides=2"], "--sweep 'strides=2'"),
        (["blend"], "", ["stride"], "--sweep 'stride'"),
    ],
)
def test_caches_that_make_no_sense_are_refused(caches, shared, sweep, said):
    with pytest.raises(CommandError, match=said):
        parse_caches(caches, parse_options(shared), parse_sweep(sweep))


def completion(prompt, text="", logprobs=()):
    tokens = Tokenizer().encode(text, add_special_tokens=False)
    return Completion(tuple(tokens), prompt.length, logprobs, 7, 7 * 2**20, 0.1, 0.2)


def run_of(label):
    (cache,) = parse_caches([label], {}, {})
    config = None
    if cache.cascade is not None:
        config = resolve(
            CascadeOptions.parse(cache.cascade),
            block_size=16,
            max_model_len=4000,
            position_limit=4096,
        )
    return runner.Run(cache, {"max_model_len": 4000}, config)


class FakeEngine:
    """Answers every prompt right, or fails after some batches."""

    asked: list[int]
    answers: dict[tuple[int, ...], str]
    batches_left: int

    def __init__(self, model, **options):
        assert model == "MODEL" and options["max_model_len"] == 4000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, requests, progress):
        cls = type(self)
        if cls.batches_left == 0:
            raise RuntimeError("cut off")
        cls.batches_left -= 1
        cls.asked.append(len(requests))
        done = []
        for request in requests:
            prompt = self.answers[tuple(request.token_ids)]
            logprobs = (-log(7),) * (prompt.length - 1) if request.logprobs else ()
            done.append(completion(prompt, f" {' '.join(prompt.expected)}.", logprobs))
        progress(sum(len(request.token_ids) for request in requests), len(requests))
        return done


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    prompts = [
        *(p for length in (2000, 3000) for p in prompts_of("passkey", length=length)),
        *prompts_of("perplexity", length=3000, count=2),
    ]
    FakeEngine.asked, FakeEngine.batches_left = [], 3
    FakeEngine.answers = {tuple(prompt.token_ids): prompt for prompt in prompts}
    monkeypatch.setattr(runner, "Engine", FakeEngine)
    runs = [run_of("full"), run_of("blend:cache_tokens=1024,num_sub_caches=4,stride=256")]

    def go():
        results = Results(tmp_path, {"seed": 0})
        runner.evaluate("MODEL", runs, prompts, results, Tokenizer())
        return results

    with pytest.raises(RuntimeError, match="cut off"):
        go()
    assert FakeEngine.asked == [5, 7, 5]
    FakeEngine.batches_left = 1
    results = go()
    assert FakeEngine.asked == [5, 7, 5, 7]
    FakeEngine.batches_left = 0
    assert go().rows == results.rows

    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == results.rows
    assert len(rows) == 2 * (10 + 2 * 3)  # a text of 3,000 tokens has three parts
    evicted = {row["tokens_evicted"] for row in rows if row["cache"] == "full"}
    assert evicted == {"0"}
    assert json.loads(rows[-1]["options"])["cache_tokens"] == 1024

    summary = report.summarise(rows)
    assert [entry["exact"] for entry in summary["answers"]] == [5, 5, 5, 5]
    assert all(len(entry["share_by_depth"]) == 5 for entry in summary["answers"])
    assert all(isclose(entry["perplexity"], 7) for entry in summary["perplexity"])
    assert [e["end_position"] for e in summary["perplexity"]] == [1024, 2048, 3000] * 2
    shown = report.tables(summary)
    assert "5 of 5, 1.00 [0.57, 1.00], 1.00" in shown
    assert shown.count("7.000") == len(summary["perplexity"])


def test_wrong_answers_count_as_wrong():
    prompt, other = prompts_of("passkey", count=2)
    digits = prompt.expected[0]
    wrong = digits[:4] + ("1" if digits[4] != "1" else "2")
    rows = []
    for asked, text in ((prompt, wrong), (other, other.expected[0] + " no")):
        rows += runner._rows(run_of("full"), asked, completion(asked, text), Tokenizer())
    (entry,) = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])["answers"]
    assert entry["exact"] == 1 and entry["parts_share"] == 0.9


def test_an_answer_ends_at_a_special_token():
    tokens = [*Tokenizer().encode("12", add_special_tokens=False), EOS, ord("3") + 2]
    assert runner.answer_text(Tokenizer(), tokens) == "12"


def test_perplexity_is_of_all_tokens_together():
    prompts = prompts_of("perplexity", length=800, count=2)
    rows = []
    for prompt, nats in zip(prompts, (1.0, 3.0), strict=True):
        done = completion(prompt, logprobs=(-nats,) * (prompt.length - 1))
        rows += runner._rows(run_of("full"), prompt, done, Tokenizer())
    (entry,) = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])["perplexity"]
    assert isclose(entry["perplexity"], exp(2.0)) and entry["tokens"] == 2 * 799


def test_perplexities_of_two_texts_are_apart():
    rows = []
    for filler, nats in (("book", 1.0), ("code", 3.0)):
        (prompt,) = prompts_of("perplexity", filler=filler, length=800, count=1)
        done = completion(prompt, logprobs=(-nats,) * (prompt.length - 1))
        rows += runner._rows(run_of("full"), prompt, done, Tokenizer())
    summary = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])
    found = [(entry["filler"], entry["perplexity"]) for entry in summary["perplexity"]]
    assert found == [("book", pytest.approx(exp(1))), ("code", pytest.approx(exp(3)))]
    assert "perplexity of 800 tokens of code, by position" in report.tables(summary)


def test_a_folder_of_another_command_is_refused(tmp_path):
    Results(tmp_path, {"seed": 0, "lengths": [1, 2]})
    Results(tmp_path, {"seed": 0, "lengths": [1, 2]})
    with pytest.raises(CommandError, match="seed was 0, is 1"):
        Results(tmp_path, {"seed": 1, "lengths": [1, 2]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.csv").write_text("")
    with pytest.raises(CommandError, match=r"no command\.json"):
        Results(tmp_path / "other", {})


@pytest.fixture
def resolved(monkeypatch):
    """A model of 4,096 positions in place of vLLM's configuration."""

    def settle(model, options):
        config = None
        # Beyond the model's own limit vLLM has words of its own.
        assert "max_model_len" not in options or "attention_backend" in options
        if "attention_backend" in options:
            config = resolve(
                CascadeOptions.parse(options["additional_config"]["cascade"]),
                block_size=16,
                max_model_len=options["max_model_len"],
                position_limit=4096,
            )
        return 4096, config

    monkeypatch.setattr(runner, "resolve", settle)


def plan(labels, prompts, engine_args=None, allow=False):
    return runner.plan_runs("M", parse_caches(labels, {}, {}), prompts, engine_args or {}, allow)


def test_engines_fit_the_longest_prompt_and_its_answer(resolved):
    prompts = prompts_of("passkey", length=2000) + prompts_of("variables", length=3000)
    blend = "blend:cache_tokens=1024,stride=256"
    full, cascade = plan(["full", blend], prompts, {"dtype": "float32"})
    assert full.options["max_model_len"] == 3000 + prompts[-1].max_tokens
    assert full.options["dtype"] == cascade.options["dtype"] == "float32"
    assert "attention_backend" not in full.options and full.config is None
    assert cascade.options["attention_backend"] == "CASCADE"
    assert cascade.config.cache_tokens == 1024


def test_what_cannot_be_measured_is_refused(resolved):
    long, short = prompts_of("passkey", length=5000), prompts_of("passkey", length=2000)
    with pytest.raises(CommandError, match=r"'full'.*5,008 tokens.*made for 4,096"):
        plan(["full"], long)
    roomy = "blend:cache_tokens=2048,stride=256"
    with pytest.raises(CommandError, match=r"2,000 tokens lose no token.*allow-under-budget"):
        plan([roomy], short + long)
    assert plan([roomy], short + long, allow=True)[0].config.cache_tokens == 2048
    assert plan([roomy], long)
    with pytest.raises(CommandError, match="sets max_model_len"):
        plan([roomy], long, {"max_model_len": 5})


def test_the_command_refuses_with_a_message(tmp_path, capsys):
    def refused(*flags):
        assert cli.main(["eval", str(tmp_path), "--output", str(tmp_path / "o"), *flags]) == 2
        return capsys.readouterr().err

    assert "no task 'poetry': choose from passkey" in refused("--tasks", "poetry")
    assert "no cache 'ring'" in refused("--caches", "ring")
    pytest.importorskip("transformers")
    assert f"cannot read a tokenizer of {tmp_path}" in refused()
    assert not (tmp_path / "o").exists()
