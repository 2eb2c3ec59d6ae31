"""Prompts of an exact number of tokens, in which something is hidden."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation.texts import Texts

FILLERS = ("words", "sentences", "book", "code")
SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
WORDS_A_LINE = 12
# The place where a definition of Python starts, with its comment or decorator.
DEFINITION = re.compile(r"(?<=\n\n)(?=[@#]|def |async def |class )")
# The filler leaves longer definitions out: a function cannot be hidden inside one, and would have
# to be put before or after it.
MAX_DEFINITION = 2000  # characters
BODY = "[[body]]"  # stands for the filler while a chat template is applied


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and the answer to it.

    Attributes:
        task: Name of the task.
        filler: Name of the text in which things are hidden; "" if the task has a text of its own.
        length: Tokens of the prompt.
        index: The prompt's number among those of this task, filler and length.
        seed: Seed of the random numbers that the prompt was drawn with.
        depth: Share of the filler, 0 to 1, before the thing asked for; None if that is in several
            places.
        expected: What the answer has to contain; empty for perplexity.
        max_tokens: Tokens to generate.
        token_ids: The prompt, special tokens included.
    """

    task: str
    filler: str
    length: int
    index: int
    seed: str
    depth: float | None
    expected: tuple[str, ...]
    max_tokens: int
    token_ids: list[int] = field(repr=False)


class PromptBuilder:
    """Puts prompts together from lines of tokens.

    Lines are tokenized one by one. So a prompt's length is the sum of its lines', and is exact.

    Args:
        tokenizer: The model's, of the transformers library.
        texts: What fills the prompts.
        chat: Whether to apply the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, texts: Texts, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.chat = chat
        self._lines: dict[str, list[int]] = {}
        self._books: dict[int, list[str]] = {}
        self._code: list[str] = []

    def encode(self, text: str) -> list[int]:
        """Tokenize `text` without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def filler(self, name: str, rng: random.Random) -> Iterator[list[int]]:
        """Give lines of filler without end.

        Args:
            name: One of `FILLERS`.
            rng: Draws the words, or the line at which the book or the code starts.

        Returns:
            The tokens of one line after the other.

        Raises:
            CommandError: `name` is unknown, or there is no source code to be had.
        """
        if name == "words":
            while True:
                yield self.encode(" ".join(rng.choices(self.texts.words, k=WORDS_A_LINE)) + ".\n")
        elif name == "sentences":
            while True:
                yield self._line(SENTENCES)
        elif name == "book":
            yield from self._around(self._sentences(rng.randrange(len(self.texts.books))), rng)
        elif name == "code":
            parts = self._definitions()
            short = [part for part in parts if len(part) <= MAX_DEFINITION]
            # Code that does not look like Python's: a function can stand after every line.
            lines = short or "".join(parts).splitlines(keepends=True)
            yield from self._around(lines, rng)
        else:
            raise CommandError(f"no filler {name!r}: choose from {', '.join(FILLERS)}")

    def build(
        self,
        length: int,
        introduction: str,
        filler: Iterator[list[int]],
        needles: Sequence[tuple[float, str]],
        question: str,
        answer_start: str,
    ) -> list[int]:
        """Build a prompt of exactly `length` tokens.

        Args:
            length: Tokens of the prompt, those of the chat template included.
            introduction: First text of the prompt.
            filler: Tokens of lines, without end; the last line taken is cut to fit.
            needles: Lines to hide, each as a pair of the share of the filler, 0 to 1, that stands
                before the line, and the line.
            question: Last text of the prompt, before the rest of the chat template.
            answer_start: Beginning of the model's own answer, which the model goes on with.

        Returns:
            The prompt's tokens.

        Raises:
            CommandError: `length` leaves no room for filler.
        """
        head, tail = self._frame(introduction, question, answer_start)
        hidden = [(depth, self.encode(text)) for depth, text in needles]
        room = length - len(head) - len(tail) - sum(len(line) for _, line in hidden)
        if room < 1:
            raise CommandError(
                f"a prompt of {length} tokens has no room for filler: give --lengths of more than "
                f"{length - room}"
            )
        lines: list[list[int]] = []
        left = room
        while left > 0:
            lines.append(next(filler)[:left])
            left -= len(lines[-1])
        starts = [0, *accumulate(len(line) for line in lines)]
        # The deepest needle first: to insert a needle does not move the place of needles before it.
        for depth, line in sorted(hidden, key=lambda pair: pair[0], reverse=True):
            lines.insert(bisect_left(starts, min(depth * room, starts[-2])), line)
        return [*head, *(token for line in lines for token in line), *tail]

    def number(self, filler: str, rng: random.Random) -> str:
        """Draw a number of five digits that the filler's text does not hold.

        Args:
            filler: One of `FILLERS`.
            rng: Draws the number.

        Returns:
            The digits.
        """
        texts = {"book": self.texts.books, "code": (self.texts.code,)}.get(filler, ())
        while True:
            number = str(rng.randrange(10_000, 100_000))
            if not any(number in text for text in texts):
                return number

    def part(self, filler: str, length: int, index: int, rng: random.Random) -> list[int]:
        """Cut a passage of `length` tokens out of a book or out of the code.

        Args:
            filler: "book" or "code".
            length: Tokens; those of `encode_start`, which come first, count.
            index: Picks the book.
            rng: Draws the passage's place.

        Returns:
            The passage's tokens.

        Raises:
            CommandError: The text is shorter than `length`.
        """
        number = index % len(self.texts.books)
        named = "the code" if filler == "code" else f"book {number + 1}"
        lines = self._definitions() if filler == "code" else self._sentences(number)
        start = self.encode_start()
        tokens = [token for line in lines for token in self._line(line)]
        spare = len(tokens) + len(start) - length
        if spare < 0:
            raise CommandError(
                f"{named} has {len(tokens):,} tokens, fewer than {length:,}: give a "
                "longer one with --texts, or smaller --lengths"
            )
        at = rng.randrange(spare + 1)
        return [*start, *tokens[at : at + length - len(start)]]

    def encode_start(self) -> list[int]:
        """Give the special tokens that the model wants before any text."""
        return list(self.tokenizer.encode("", add_special_tokens=True))

    def _frame(
        self, introduction: str, question: str, answer_start: str
    ) -> tuple[list[int], list[int]]:
        """The tokens before and after the filler."""
        if not self.chat:
            head = [*self.encode_start(), *self.encode(introduction)]
            return head, self.encode(f"\n{question} {answer_start}")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{introduction}{BODY}\n{question}"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # there is no room for thoughts before the answer
        )
        before, found, after = text.partition(BODY)
        if not found:
            raise CommandError(
                "the model's chat template leaves the user's text out: give --no-chat"
            )
        return self.encode(before), self.encode(after + answer_start)

    def _sentences(self, number: int) -> list[str]:
        """A book's sentences, a line each."""
        if number not in self._books:
            parts = re.split(r"(?<=[.?!]) |\n", self.texts.books[number])
            self._books[number] = [f"{part}\n" for part in parts if part]
        return self._books[number]

    def _definitions(self) -> list[str]:
        """The code in parts of whole lines; each part ends where the next definition starts."""
        if not self._code:
            if not self.texts.code:
                raise CommandError(
                    "no source code to make prompts of: this Python has no standard library in "
                    "source, so give --texts FOLDER with code in FOLDER/code.txt"
                )
            self._code = DEFINITION.split(f"{self.texts.code}\n\n\n")
        return self._code

    def _around(self, lines: list[str], rng: random.Random) -> Iterator[list[int]]:
        """The tokens of lines from a drawn line on, and then from the first line on, for ever."""
        start = rng.randrange(len(lines))
        while True:
            for line in lines[start:]:
                yield self._line(line)
            start = 0

    def _line(self, text: str) -> list[int]:
        if text not in self._lines:
            self._lines[text] = self.encode(text)
        return self._lines[text]
