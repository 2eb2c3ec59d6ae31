"""What the tokens of a selection window are ranked by, and which places make the mean.

Distinctiveness is measured from the mean of the unit keys, or unit values, at the first `MEAN_RUN`
of every `MEAN_PERIOD` places of what a request holds: as good a direction as the mean of all, for a
quarter of its time.
"""

from __future__ import annotations

from typing import NamedTuple

MEAN_RUN = 32
MEAN_PERIOD = 128


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
