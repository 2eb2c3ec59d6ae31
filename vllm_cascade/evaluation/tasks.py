"""The tasks: what a prompt hides and what it asks for."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as numbers

from vllm_cascade.evaluation.prompts import Prompt, PromptBuilder

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
DEPTH_BANDS = 5
NUMBER_TOKENS = 8  # of five digits, in tokenizers that take them one by one too
NAME_TOKENS = 12  # with what is said around it


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What the tasks can be told.

    Attributes:
        keys: Passkeys in a prompt of several.
        repeats: How often a passkey's line is printed.
        hops: Assignments after a variable chain's first.
    """

    keys: int = 4
    repeats: int = 6
    hops: int = 4


@dataclass(frozen=True, slots=True)
class Task:
    """How to make a task's prompts.

    Attributes:
        about: One line for the help text.
        make: From builder, options, filler, length, depth and a generator: depth (None if in
            several places), expected answers, tokens to generate, prompt.
        filled: Whether its prompts are filled with the text that the user picks.
        names: Whether the answers are names and not numbers.
    """

    about: str
    make: Callable[..., tuple[float | None, tuple[str, ...], int, list[int]]]
    filled: bool = True
    names: bool = False


def make_prompts(
    builder: PromptBuilder,
    task: str,
    filler: str,
    length: int,
    count: int,
    seed: int,
    options: TaskOptions,
) -> list[Prompt]:
    """Prompts of one task, filler and length; prompt i is the same whatever the count.

    Depths go round five equal bands, as in the paper's protocol (arXiv 2406.17808).
    """
    prompts = []
    for index in range(count):
        name = f"{seed}/{task}/{filler}/{length}/{index}"
        rng = random.Random(name)
        depth = (index % DEPTH_BANDS + rng.random()) / DEPTH_BANDS
        made = TASKS[task].make(builder, options, filler, length, depth, index, rng)
        at, expected, max_tokens, tokens = made
        prompts.append(Prompt(task, filler, length, index, name, at, expected, max_tokens, tokens))
    return prompts


def _passkey(builder, options, filler, length, depth, index, rng):
    key = _number(rng)
    line = f"The pass key is {key}. Remember it. {key} is the pass key.\n" * options.repeats
    tokens = builder.build(
        length,
        INTRODUCTION,
        builder.filler(filler, rng),
        [(depth, line)],
        "What is the pass key?",
        "The pass key is",
    )
    return depth, (key,), NUMBER_TOKENS, tokens


def _several(ask_all: bool):
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
    names: list[str] = []
    while len(names) < 2 * links:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
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
    # Two tokens, for a request that ends with its first holds no block after any step.
    return None, (), 2, builder.book_part(length, index, rng)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _distinct(count: int, rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


TASKS: dict[str, Task] = {
    "passkey": Task("a five-digit passkey in a filler text", _passkey),
    "multikey": Task("several passkeys with names, asked for one", _several(ask_all=False)),
    "multikey-all": Task("several passkeys with names, asked for all", _several(ask_all=True)),
    "lookup": Task("key and value lines, asked for one value", _lookup, filled=False),
    "variables": Task("chains of assignments, asked for the variables", _variables, names=True),
    "perplexity": Task("of a book, by position", _perplexity, filled=False),
}
