"""For mkdocs: a link to a file outside of docs/ becomes the name of that file."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the file where the text of the link does not."""

    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        return f"{text}" if path in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(named, markdown)
