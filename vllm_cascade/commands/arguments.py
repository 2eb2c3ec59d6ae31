"""How the commands read what they are given; each function is a `type` of argparse."""

from __future__ import annotations

import argparse
import json
import re
from decimal import Decimal
from typing import Any

TOKENS = re.compile(r"(\d+)(\.\d+)?([kKmMgGtT]?)")


def tokens(text: str) -> int:
    """A number of tokens as vLLM takes one: 4096, 128k (128,000), 128K (131,072), 1.5m, 1M.

    Raises:
        argparse.ArgumentTypeError: It is none, or not above zero.
    """
    found = TOKENS.fullmatch(text.strip())
    if not found or (found[2] and not found[3].islower()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: give one like 4096, 128k (128,000), 128K (131,072) "
            "or 1.5m"
        )
    whole, fraction, unit = found.groups()
    exponent = " kmgt".index(unit.lower() or " ")
    value = int(Decimal(whole + (fraction or "")) * (1000 if unit.islower() else 1024) ** exponent)
    return _above_zero(value, text)


def positive_int(text: str) -> int:
    """A whole number above zero.

    Raises:
        ValueError: It is no whole number.
        argparse.ArgumentTypeError: It is not above zero.
    """
    return _above_zero(int(text), text)


def positive(text: str) -> float:
    """A finite number above zero; raises as `positive_int` does."""
    value = float(text)
    if value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return _above_zero(value, text)


def json_object(text: str) -> dict[str, Any]:
    """Keyword arguments in JSON.

    Raises:
        argparse.ArgumentTypeError: It is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def _above_zero(value: Any, text: str) -> Any:
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value
