"""What the tokens of a selection window are ranked by, and which places make the mean.

Distinctiveness is minus the cosine to the mean of the unit keys, or unit values, that a request
holds; the idea is KeyDiff's (arXiv 2504.15364). The mean is over the first `MEAN_RUN` of every
`MEAN_PERIOD` places: as good a direction as the mean of all places, for a quarter of the time.
"""

from __future__ import annotations

from typing import NamedTuple

MEAN_RUN = 32
MEAN_PERIOD = 128


class Weights(NamedTuple):
    """Weights of three ranks, none negative. A quantity whose weight is 0 is not computed.

    Args:
        score: Weight of the rank of the attention score that the page holds.
        key: Weight of the rank of the key's distinctiveness; keys are as before RoPE.
        value: Weight of the rank of the value's distinctiveness.
    """

    score: float
    key: float
    value: float
