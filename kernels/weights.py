"""What the tokens of a selection window are ranked by."""

from __future__ import annotations

from typing import NamedTuple


class Weights(NamedTuple):
    """Weights of three ranks, none negative; what weighs nothing is not looked at.

    Args:
        score: Of the attention score that the page holds.
        key: Of the distinctiveness of the key, before RoPE.
        value: Of the distinctiveness of the value.
    """

    score: float
    key: float
    value: float
