"""The page that shows what was kept: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from vllm_cascade.inspection.kept import Kept


def page(kept: Kept) -> str:
    """Make the page: the template, filled with its style, its script and the data of `kept`.

    Args:
        kept: What to show.

    Returns:
        HTML.
    """
    folder = files(__package__)
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    # In a script element only "</script" ends the script and only "<!--" changes how it is read.
    parts["data"] = json.dumps(data_of(kept), ensure_ascii=False).replace("<", "\\u003c")
    parts["title"] = f"What {kept.config.policy} kept of {len(kept.token_ids):,} tokens"
    template = (folder / "page.html").read_text(encoding="utf-8")
    # In one pass, because a prompt may hold text that looks like a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def data_of(kept: Kept) -> dict[str, Any]:
    """Give the data that the page's script reads, for `kept`.

    Each head has ``bits``, one bit for each token (lowest bit first, in base64), and ``starts``,
    the first token of each part of the cache.
    """
    num_tokens, spans = len(kept.token_ids), kept.spans()
    layers = [
        {
            "name": name,
            "heads": [{"bits": _bits(h, num_tokens), "starts": kept.starts(h)} for h in heads],
        }
        for name, heads in kept.layers.items()
    ]
    return {
        "model": kept.model,
        "summary": kept.config.summary(),
        "reach": kept.config.reach,
        "num_prompt_tokens": kept.num_prompt_tokens,
        "answer": kept.answer,
        "pieces": kept.pieces,
        "parts": [
            {"name": part, "size": size, "span": spans.get(part)}
            for part, size in kept.parts.items()
        ],
        "layers": layers,
    }


def _bits(held: Sequence[int], num_tokens: int) -> str:
    flags = np.zeros(num_tokens, dtype=bool)
    flags[held] = True
    return base64.b64encode(np.packbits(flags, bitorder="little").tobytes()).decode()
