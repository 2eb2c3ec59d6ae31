"""Replaying another implementation's decisions, and judging the windows where it chose otherwise.

Two correct implementations differ where two deciding values are closer than their rounding. Such a
window is "explained"; any other difference is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference.cascade import Values
from reference.selection import rank, smaller


@dataclass(frozen=True, slots=True)
class DifferingWindow:
    """One window in which the replayed decision is not the reference's own."""

    boundary: int
    layer: int
    kv_head: int
    sub_cache: int
    tokens: list[int]
    replayed: list[int]
    own: list[int]
    terms: list[tuple[float, list[float]]]
    explained: bool


@dataclass(slots=True)
class Comparison:
    """The windows decided in a replay, and those decided differently."""

    windows: int = 0
    differing: list[DifferingWindow] = field(default_factory=list)

    @property
    def unexplained(self) -> list[DifferingWindow]:
        """The differing windows that no near-tie accounts for."""
        return [window for window in self.differing if not window.explained]


class ReplayError(ValueError):
    """The replayed tokens cannot come from the state they were replayed on."""


class Replay:
    """Makes one layer's choices at one boundary as another implementation made them.

    Args:
        comparison: Where the outcome is added.
        values: What the reference would decide by, in the replayed state.
        kept: int64 [num_kv_heads, places], the tokens kept after the boundary, by place.
        boundary: Number of the boundary.
        layer: Number of the layer.
        rtol: Relative distance under which two deciding values may be ordered either way.
    """

    def __init__(
        self,
        comparison: Comparison,
        values: Values,
        kept: Tensor,
        boundary: int,
        layer: int,
        rtol: float,
    ) -> None:
        self.comparison = comparison
        self.values = values
        self.kept = kept
        self.boundary = boundary
        self.layer = layer
        self.rtol = rtol

    def choose(self, sub_cache: int, windows: Tensor) -> Tensor:
        """Keep what was kept; a `Choice`.

        Raises:
            ReplayError: If the kept tokens are not half of every window.
        """
        kept, total = self.kept, self.values.num_tokens
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < total:
            raise ReplayError(f"{self._where()}: a kept token is outside 0 .. {total - 1}")
        survives = torch.zeros(kept.shape[0], total, dtype=torch.bool).scatter(1, kept, True)
        replayed = survives.gather(1, windows.flatten(1)).view(windows.shape)
        wrong = (replayed.sum(-1) != windows.shape[-1] // 2).nonzero()
        if len(wrong):
            head, window = wrong[0].tolist()
            raise ReplayError(
                f"{self._where()}, KV head {head}, sub-cache {sub_cache}: "
                f"{int(replayed[head, window].sum())} of the tokens "
                f"{windows[head, window].tolist()} were kept, not half"
            )
        own = self.values.choose(sub_cache, windows)
        self.comparison.windows += windows.shape[0] * windows.shape[1]
        for head, window in (own != replayed).any(-1).nonzero().tolist():
            self._judge(sub_cache, windows, own, replayed, head, window)
        return replayed

    def check(self, kept: Tensor) -> None:
        """Compare places: the structure around the windows, and the order of the survivors.

        Args:
            kept: int64 [num_kv_heads, places], the reference's state after the replayed choices.

        Raises:
            ReplayError: If the replayed tokens stand elsewhere.
        """
        if kept.shape != self.kept.shape:
            raise ReplayError(
                f"{self._where()}: [KV heads, places] is {tuple(self.kept.shape)}, "
                f"by the structure it is {tuple(kept.shape)}"
            )
        wrong = (kept != self.kept).nonzero()
        if len(wrong):
            head, place = wrong[0].tolist()
            raise ReplayError(
                f"{self._where()}, KV head {head}: place {place} holds token "
                f"{int(self.kept[head, place])}, by the structure it is {int(kept[head, place])}"
            )

    def _judge(
        self,
        sub_cache: int,
        windows: Tensor,
        own: Tensor,
        replayed: Tensor,
        head: int,
        window: int,
    ) -> None:
        at = (head, window)
        terms = [(weight, values[at]) for weight, values in self.values.of(windows)]
        self.comparison.differing.append(
            DifferingWindow(
                boundary=self.boundary,
                layer=self.layer,
                kv_head=head,
                sub_cache=sub_cache,
                tokens=windows[at].tolist(),
                replayed=windows[at][replayed[at]].tolist(),
                own=windows[at][own[at]].tolist(),
                terms=[(weight, values.tolist()) for weight, values in terms],
                explained=explained(replayed[at], own[at], terms, self.rtol),
            )
        )

    def _where(self) -> str:
        return f"boundary {self.boundary}, layer {self.layer}"


def explained(
    replayed: Tensor, own: Tensor, terms: Sequence[tuple[float, Tensor]], rtol: float
) -> bool:
    """Judge whether near-ties alone can turn one choice into the other.

    Every token kept only by the replayed choice must have been able to beat every token kept only
    by the reference's own. With one term their values must be close. Otherwise each of the ranks
    may be anything that the order of close values allows, and the most that the one token's sum
    can be must beat the least that the other's can, an equal sum only if it is newer.

    Args:
        replayed: bool [g], the other implementation's choice.
        own: bool [g], the reference's.
        terms: A positive weight and values [g], for all that tokens are ranked by.
        rtol: Values a and b are close if |a - b| <= rtol * max(|a|, |b|).
    """
    gained, lost = replayed & ~own, own & ~replayed
    if len(terms) == 1:
        return bool(close(terms[0][1], rtol)[gained][:, lost].all())
    bounds = [(weight, *rank_bounds(values, rtol)) for weight, values in terms]
    most = sum(weight * high for weight, _, high in bounds)[gained][:, None]
    least = sum(weight * low for weight, low, _ in bounds)[lost]
    newer = gained.nonzero() > lost.nonzero().squeeze(-1)
    return bool(((most > least) | ((most == least) & newer)).all())


def close(x: Tensor, rtol: float) -> Tensor:
    """Tell for every pair of a window whether rounding may order it either way.

    Returns:
        bool [..., g, g]. Infinities are close to themselves only, and so is NaN.
    """
    a, b = x.unsqueeze(-1), x.unsqueeze(-2)
    near = (a - b).abs() <= rtol * torch.maximum(a.abs(), b.abs())
    return (near & a.isfinite() & b.isfinite()) | (a == b) | (a.isnan() & b.isnan())


def rank_bounds(x: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Bound each token's rank where close values may be ordered either way.

    An exact tie of finite numbers counts as close; NaN and infinities keep their ranks.

    Returns:
        Least and greatest rank, int64 [..., g] each.
    """
    undecided = close(x, rtol) & x.isfinite().unsqueeze(-1) & x.isfinite().unsqueeze(-2)
    below = smaller(x) & ~undecided
    above = smaller(x).transpose(-1, -2) & ~undecided
    least, most = below.sum(-1), x.shape[-1] - 1 - above.sum(-1)
    fixed = ~x.isfinite()
    exact = rank(x)
    return torch.where(fixed, exact, least), torch.where(fixed, exact, most)
