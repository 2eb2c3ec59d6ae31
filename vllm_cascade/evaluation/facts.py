"""Facts that a text holds once, told like the text around them, and questions for the facts."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, replace

# The sentence, the question, and how the answer begins.
TEMPLATES = (
    (
        "The harbour master of {place} keeps {number} {things} in the old tower.",
        "How many {things} does the harbour master of {place} keep in the old tower?",
        "The harbour master of {place} keeps",
    ),
    (
        "Last winter the bakers of {place} sold {number} loaves of rye bread.",
        "How many loaves of rye bread did the bakers of {place} sell last winter?",
        "Last winter the bakers of {place} sold",
    ),
    (
        "The library in {place} owns {number} maps of the northern coast.",
        "How many maps of the northern coast does the library in {place} own?",
        "The library in {place} owns",
    ),
    (
        "{person}, the gardener, planted {number} tulips behind the mill.",
        "How many tulips did {person} plant behind the mill?",
        "{person} planted",
    ),
    (
        "The railway from {place} to the coast rests on {number} oak sleepers.",
        "How many oak sleepers does the railway from {place} to the coast rest on?",
        "The railway from {place} to the coast rests on",
    ),
    (
        "One autumn {person} counted {number} swallows above the lake near {place}.",
        "How many swallows did {person} count above the lake near {place}?",
        "{person} counted",
    ),
    (
        "The clock of {place} has struck {number} times since it was repaired.",
        "How many times has the clock of {place} struck since it was repaired?",
        "The clock of {place} has struck",
    ),
    (
        "{person} paid {number} crowns for the blue house at the market of {place}.",
        "How many crowns did {person} pay for the blue house at the market of {place}?",
        "{person} paid",
    ),
    (
        "The quarry near {place} delivered {number} blocks of granite for the new bridge.",
        "How many blocks of granite did the quarry near {place} deliver for the new bridge?",
        "The quarry near {place} delivered",
    ),
    (
        "In the cellar of the theatre {person} stored {number} {things}.",
        "How many {things} did {person} store in the cellar of the theatre?",
        "{person} stored",
    ),
)
PLACES = """
Velden Tarnholt Oskerby Lindmoor Brackwater Hestwick Corvale Dunrath Wexholm Pellingford Stavenby
Norrhaven Elmscott Quillon Ravensby Saltmere Thornwick Ulverdal Fennimore Gransbeck
"""
PEOPLE = (
    "Ingrid Halvorsen", "Tobias Wren", "Marta Kowal", "Edmund Pryce", "Lucia Ferrant",
    "Henrik Dahl", "Agnes Thorpe", "Casper Lund", "Odile Marchand", "Rufus Bellamy",
    "Petra Novak", "Silas Greer", "Wilma Osterberg", "Hugo Lafferty", "Clara Vinter",
    "Anton Jessop",
)  # fmt: skip
THINGS = """
lanterns barrels kettles violins umbrellas candles saddles telescopes mirrors blankets ladders
teapots
"""
LIMITS = """
retry_budget queue_limit page_quota lease_seconds batch_ceiling token_allowance shard_count
frame_limit buffer_slots probe_interval
"""
OWNERS = """
quasar falcon walnut glacier harbor lantern meadow orchid pelican saffron tundra violin willow
zephyr badger cobalt
"""


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact, and how to ask for it.

    Attributes:
        lines: The lines that tell the fact; they are hidden in this order.
        question: The question, with a number for an answer.
        answer_start: The beginning of an answer; the number comes next.
    """

    lines: tuple[str, ...]
    question: str
    answer_start: str


def sentence(number: str, rng: random.Random) -> Fact:
    """Make a sentence about a town, a person or both.

    Args:
        number: The number that the sentence tells.
        rng: Draws the sentence and the names in it.

    Returns:
        The fact, in one line.
    """
    words = {
        "place": rng.choice(PLACES.split()),
        "person": rng.choice(PEOPLE),
        "things": rng.choice(THINGS.split()),
        "number": number,
    }
    said, question, answer_start = (text.format(**words) for text in rng.choice(TEMPLATES))
    return Fact((f"{said}\n",), question, answer_start)


def function(number: str, rng: random.Random) -> Fact:
    """Make a function of Python.

    Args:
        number: The number that the function returns.
        rng: Draws the function's name.

    Returns:
        The fact, in one piece of code.
    """
    name = f"{rng.choice(LIMITS.split())}_for_{rng.choice(OWNERS.split())}"
    return Fact(
        (f"def {name}():\n    return {number}\n\n\n",),
        f"What number does the function {name}() return?",
        f"The function {name}() returns",
    )


def passkey(number: str) -> Fact:
    """Make the line that tells a passkey, `number`."""
    line = f"The pass key is {number}. Remember it. {number} is the pass key.\n"
    return Fact((line,), "What is the pass key?", "The pass key is")


def chain(number: str, names: list[str]) -> Fact:
    """Make assignments that hand a number on from variable to variable.

    Args:
        number: The number that the first variable gets.
        names: The variables, in the order of the assignments; the question asks for the last one.

    Returns:
        The fact, a line for each variable.
    """
    sources = [number, *(f"VAR {name}" for name in names[:-1])]
    lines = (f"VAR {name} = {source}\n" for name, source in zip(names, sources, strict=True))
    last = f"VAR {names[-1]}"
    return Fact(
        tuple(lines),
        f"What is the value of {last}? Follow the assignments.",
        f"The value of {last} is",
    )


def steps(number: str, names: list[str]) -> Fact:
    """Make a `chain` whose answer has to name the assignments.

    Args:
        number: As of `chain`.
        names: As of `chain`.

    Returns:
        The fact, a line for each variable.
    """
    last = f"VAR {names[-1]}"
    return replace(
        chain(number, names),
        question=f"What number is the value of {last}? Write the assignments from {last} back to "
        "the number, a line each.",
        # The steps follow. A model that is told their number does not stop at the first.
        answer_start=f"The {len(names)} assignments that lead back to the number are:\n"
        f"{last} = VAR",
    )


def variable_names(count: int, rng: random.Random) -> list[str]:
    """Draw distinct names of five capital letters.

    Args:
        count: Number of names.
        rng: Draws the letters.

    Returns:
        The names.
    """
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    return names
