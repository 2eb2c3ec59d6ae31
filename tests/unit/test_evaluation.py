"""Prompts, scores, caches and files of `vllm-cascade eval`, without an engine."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import re
from itertools import pairwise

import pytest

from small_prompts import BOOK, CODE, LONG_CLASS, TEXTS, WORDS, Tokenizer, prompts_of, text_of
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import facts, texts
from vllm_cascade.evaluation.command import make_prompts as prompts_of_command
from vllm_cascade.evaluation.prompts import FILLERS, MAX_DEFINITION, PromptBuilder
from vllm_cascade.evaluation.tasks import TASKS, fillers_of
from vllm_cascade.evaluation.texts import MODULES, Texts, load_texts, python_code, save_texts


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
