"""The tasks: what a prompt hides, and what the prompt asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as numbers

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import facts
from vllm_cascade.evaluation.facts import Fact
from vllm_cascade.evaluation.prompts import FILLERS, Prompt, PromptBuilder

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
ONE_QUESTION = "Read the following text. I will ask one question about it.\n"
ASSIGNMENTS = (
    "Read the following text. Assignments of variables are hidden in it. I will ask one question "
    "about them.\n"
)
THREE_QUESTIONS = "Read the following text. I will ask three questions about it.\n"
DEPTH_BANDS = 5
LINKS = 3  # assignments of a chain that leads to a number
# Tokens to generate.
NUMBER_TOKENS = 8  # for a number of five digits, even if each digit is a token
NAME_TOKENS = 12  # for a name and the words around it
STEPS_TOKENS = 64  # for a chain that is followed back in words
SENTENCE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The numbers that a user can choose for the tasks.

    Attributes:
        keys: Passkeys in a prompt that has several.
        repeats: How often a passkey's line stands in a prompt, one after the other.
        hops: Assignments of a chain of variables after the first one.
    """

    keys: int = 4
    repeats: int = 6
    hops: int = 4


@dataclass(frozen=True, slots=True)
class Task:
    """How to make a task's prompts.

    Attributes:
        about: One line for the help text.
        make: Makes one prompt from builder, options, filler, length in tokens, depth, index and a
            random generator. Returns the depth (None if the thing asked for is in several places),
            the expected answers, the number of tokens to generate, and the prompt's tokens.
        fillers: Texts that the prompts may be made of; empty if the task has a text of its own.
        names: Whether the answers are names and not numbers.
    """

    about: str
    make: Callable[..., tuple[float | None, tuple[str, ...], int, list[int]]]
    fillers: tuple[str, ...] = FILLERS
    names: bool = False


def fillers_of(task: str, picked: Sequence[str] | None) -> tuple[str, ...]:
    """List the fillers that a task's prompts are made of.

    Args:
        task: The task's name.
        picked: Fillers that the user wants, of `FILLERS`. None stands for random words if the task
            may be made of any filler, and for all of the task's fillers otherwise.

    Returns:
        Each filler once; "" if the task has a text of its own.

    Raises:
        CommandError: The task makes no sense in any of the fillers picked.
    """
    known = TASKS[task]
    if not known.fillers:
        return ("",)
    if picked is None:
        return known.fillers[:1] if known.fillers == FILLERS else known.fillers
    found = tuple(filler for filler in dict.fromkeys(picked) if filler in known.fillers)
    if not found:
        raise CommandError(
            f"task {task!r} cannot be made of {', '.join(picked)}: add one of "
            f"{', '.join(known.fillers)} to --fillers, or leave --fillers out"
        )
    return found


def make_prompts(
    builder: PromptBuilder,
    task: str,
    filler: str,
    length: int,
    count: int,
    seed: int,
    options: TaskOptions,
) -> list[Prompt]:
    """Make prompts of one task, filler and length; the count does not change prompt i.

    Args:
        builder: Puts the prompts together.
        task: The task's name.
        filler: The filler's name, or "" if the task has a text of its own.
        length: Tokens of each prompt.
        count: Number of prompts.
        seed: Seed of all random numbers.
        options: Numbers that the user has chosen.

    Returns:
        The prompts. Their depths go round five equal bands.

    Source: The protocol of Willette et al., arXiv 2406.17808, for the bands of depth.
    """
    prompts = []
    for index in range(count):
        # Perplexity once had no filler. Its prompts from books are still drawn as they were then.
        said = "" if (task, filler) == ("perplexity", "book") else filler
        name = f"{seed}/{task}/{said}/{length}/{index}"
        rng = random.Random(name)
        depth = (index % DEPTH_BANDS + rng.random()) / DEPTH_BANDS
        made = TASKS[task].make(builder, options, filler, length, depth, index, rng)
        at, expected, max_tokens, tokens = made
        prompts.append(Prompt(task, filler, length, index, name, at, expected, max_tokens, tokens))
    return prompts


def _passkey(builder, options, filler, length, depth, index, rng):
    key = builder.number(filler, rng)
    fact = facts.passkey(key)
    tokens = builder.build(
        length,
        INTRODUCTION,
        builder.filler(filler, rng),
        [(depth, fact.lines[0] * options.repeats)],
        fact.question,
        fact.answer_start,
    )
    return depth, (key,), NUMBER_TOKENS, tokens


def _hidden_once(fact_of: Callable[[str, random.Random], Fact]):
    def make(builder, options, filler, length, depth, index, rng):
        number = builder.number(filler, rng)
        fact = fact_of(number, rng)
        needles = [(depth, line) for line in fact.lines]
        text = builder.filler(filler, rng)
        tokens = builder.build(
            length, ONE_QUESTION, text, needles, fact.question, fact.answer_start
        )
        return depth, (number,), NUMBER_TOKENS, tokens

    return make


def _chain(builder, options, filler, length, depth, index, rng):
    number = builder.number(filler, rng)
    fact = facts.chain(number, facts.variable_names(LINKS, rng))
    tokens = builder.build(
        length,
        ASSIGNMENTS,
        builder.filler(filler, rng),
        _in_order(fact, rng),
        fact.question,
        fact.answer_start,
    )
    return None, (number,), STEPS_TOKENS, tokens


def _three_facts(builder, options, filler, length, depth, index, rng):
    numbers = _absent(3, builder, filler, rng)
    asked = (
        facts.sentence(numbers[0], rng),
        facts.passkey(numbers[1]),
        facts.steps(numbers[2], facts.variable_names(LINKS, rng)),
    )
    needles = [needle for fact in asked for needle in _in_order(fact, rng)]
    listed = " ".join(f"{place}. {fact.question}" for place, fact in enumerate(asked, start=1))
    tokens = builder.build(
        length,
        THREE_QUESTIONS,
        builder.filler(filler, rng),
        needles,
        f"Answer these three questions in order, a line each. {listed}",
        f"1. {asked[0].answer_start}",
    )
    return None, tuple(numbers), 2 * SENTENCE_TOKENS + STEPS_TOKENS, tokens


def _in_order(fact: Fact, rng: random.Random) -> list[tuple[float, str]]:
    """A fact's lines in their order, each with a drawn depth."""
    return list(zip(sorted(rng.random() for _ in fact.lines), fact.lines, strict=True))


def _multikey(ask_all: bool):
    def make(builder, options, filler, length, depth, index, rng):
        names = rng.sample(builder.texts.words, options.keys)
        keys = _distinct(options.keys, rng)
        depths = [depth] + [rng.random() for _ in names[1:]]
        needles = [
            (
                at,
                f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n"
                * options.repeats,
            )
            for at, name, key in zip(depths, names, keys, strict=True)
        ]
        if ask_all:
            listed = ", ".join(names)
            question = f"What are the pass keys of {listed}, in this order?"
            start = f"The pass keys of {listed} are"
        else:
            question = f"What is the pass key of {names[0]}?"
            start = f"The pass key of {names[0]} is"
        tokens = builder.build(
            length, INTRODUCTION, builder.filler(filler, rng), needles, question, start
        )
        if ask_all:
            return None, tuple(keys), 2 * NUMBER_TOKENS * len(keys), tokens
        return depth, (keys[0],), NUMBER_TOKENS, tokens

    return make


def _lookup(builder, options, filler, length, depth, index, rng):
    words, taken = builder.texts.words, set()

    def line() -> tuple[str, str]:
        while (key := f"{rng.choice(words)}-{rng.randrange(10_000):04}") in taken:
            pass
        taken.add(key)
        return key, _number(rng)

    asked, value = line()
    lines = (builder.encode('"{}": {}\n'.format(*line())) for _ in numbers())
    tokens = builder.build(
        length,
        "Below are keys and their values, one pair a line. I will ask for one value.\n",
        lines,
        [(depth, f'"{asked}": {value}\n')],
        f'What is the value of "{asked}"?',
        f'The value of "{asked}" is',
    )
    return depth, (value,), NUMBER_TOKENS, tokens


def _variables(builder, options, filler, length, depth, index, rng):
    links = options.hops + 1
    names = facts.variable_names(2 * links, rng)
    values = _distinct(2, rng)
    needles = []
    # The second chain is not asked for.
    for chain, value in zip((names[:links], names[links:]), values, strict=True):
        depths = sorted(rng.random() for _ in chain)
        sources = [value, *(f"VAR {name}" for name in chain[:-1])]
        for at, name, source in zip(depths, chain, sources, strict=True):
            needles.append((at, f"VAR {name} = {source}\n"))
    tokens = builder.build(
        length,
        "Memorize and track the chains of variable assignment hidden in the following text.\n",
        builder.filler(filler, rng),
        needles,
        f"Find all variables that are assigned the value {values[0]} in the text above.",
        "According to the chains of variable assignment in the text above, "
        f"{links} variables are assigned the value {values[0]}, they are:",
    )
    return None, tuple(names[:links]), NAME_TOKENS * links, tokens


def _perplexity(builder, options, filler, length, depth, index, rng):
    # Two tokens: a request that ends with its first token holds no block after any step.
    return None, (), 2, builder.part(filler, length, index, rng)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _distinct(count: int, rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _absent(count: int, builder: PromptBuilder, filler: str, rng: random.Random) -> list[str]:
    """Distinct numbers that the filler's text does not hold."""
    found: list[str] = []
    while len(found) < count:
        number = builder.number(filler, rng)
        if number not in found:
            found.append(number)
    return found


BOOK, CODE = ("book",), ("code",)
TASKS: dict[str, Task] = {
    "passkey": Task("a five-digit passkey in a filler text", _passkey),
    "multikey": Task("several passkeys with names, asked for one", _multikey(ask_all=False)),
    "multikey-all": Task("several passkeys with names, asked for all", _multikey(ask_all=True)),
    "lookup": Task("key and value lines, asked for one value", _lookup, ()),
    "variables": Task("chains of assignments, asked for the variables", _variables, names=True),
    "sentence": Task(
        "one sentence in a book, asked for its number", _hidden_once(facts.sentence), BOOK
    ),
    "constant": Task(
        "one function in code, asked for what it returns", _hidden_once(facts.function), CODE
    ),
    "chain": Task("three assignments in a book, asked for the number", _chain, BOOK),
    "several": Task(
        "a sentence, a passkey and a chain in a book, asked for all", _three_facts, BOOK
    ),
    "perplexity": Task("of a book and of code, by position", _perplexity, BOOK + CODE),
}
