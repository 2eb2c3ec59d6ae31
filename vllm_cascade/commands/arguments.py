"""How the commands read their arguments; each public function is a `type` for argparse."""

from __future__ import annotations

import argparse
import json
import re
from decimal import Decimal
from typing import Any

TOKENS = re.compile(r"(\d+)(\.\d+)?([kKmMgGtT]?)")


def tokens(text: str) -> int:
    """Read a number of tokens in vLLM's notation: 4096, 128k (128,000), 128K (131,072), 1.5m, 1M.

    Args:
        text: The argument; k, m, g and t stand for powers of 1,000, and K, M, G and T for powers of
            1,024, which take no fraction.

    Raises:
        argparse.ArgumentTypeError: `text` is no such number, or is not above zero.
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
    """Read `text` as a whole number above zero.

    Raises:
        ValueError: `text` is no whole number.
        argparse.ArgumentTypeError: The number is not above zero.
    """
    return _above_zero(int(text), text)


def positive(text: str) -> float:
    """Read `text` as a finite number above zero.

    Raises:
        ValueError: `text` is no number.
        argparse.ArgumentTypeError: The number is infinite, or is not above zero.
    """
    value = float(text)
    if value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return _above_zero(value, text)


def json_object(text: str) -> dict[str, Any]:
    """Read `text`, a JSON object, as keyword arguments.

    Raises:
        argparse.ArgumentTypeError: `text` is not JSON, or is no object.
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
