"""Margins that weigh up the negatives nearer than the positive with its margin.

They must know the positive's cosine before the negatives: one all-reduce of [B] more.

Shape suffix: B = rows of the gathered batch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from partialfc.margins.angles import cosine_with_margin
from partialfc.margins.base import (
    Bend,
    Gradient,
    Margin,
    Rows,
    State,
    check_angular,
    check_gradient,
    check_margin_of,
    refuse,
    straight_through,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mined(Margin):
    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        for name in ("inter_class_filter", "label_smoothing"):
            if getattr(self, name):
                refuse(name, getattr(self, name), "left out: this margin weighs near negatives up")

    @property
    def needs_positives(self) -> bool:
        """See :attr:`Margin.needs_positives`."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class CurricularFace(_Mined):
    """ArcFace whose harder negatives gain weight: s cos(θj) (t + cos(θj)),
    https://arxiv.org/abs/2004.00288.

    A negative is hard if cos(θj) > cos(θ + m); t is a moving average of the positive cosine, so
    hard negatives count for little at first and for more and more later.

    Attributes:
        angular: m, in radians, in [0, pi/2].
        averaging: Share of the new batch in t, in (0, 1].
        gradient: Of the positive; as in :class:`partialfc.margins.ArcFace`.
    """

    largest_bend: ClassVar[float] = 2.0

    angular: float = 0.5
    averaging: float = 0.01
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        _Mined.__post_init__(self)
        check_angular(self.angular)
        if not 0 < self.averaging <= 1:
            refuse("averaging", self.averaging, "in (0, 1]")
        check_gradient(self.gradient)

    def new_state(self, num_identities: int) -> dict[str, float]:
        """The moving average t."""
        return {"t": 0.0}

    def advance(self, state: State, rows: Rows) -> dict[str, Tensor]:
        """See :meth:`Margin.advance`."""
        return {"t": state["t"].lerp(rows.dot_B.mean(), self.averaging)}

    def bend(self, state: State, rows: Rows) -> Bend:
        """See :meth:`Margin.bend`."""
        threshold_B = self.scale * cosine_with_margin(rows.dot_B, 1.0, self.angular, "none")
        quadratic = torch.full_like(state["t"], 1 / self.scale)
        coefficients = torch.stack([torch.zeros_like(state["t"]), state["t"], quadratic])
        return Bend(threshold_B, coefficients)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        logit_B = self.scale * cosine_with_margin(cosine_B, 1.0, self.angular, "linear")
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class MVSoftmax(_Mined):
    """Mis-classified negatives weighed up, https://arxiv.org/abs/1912.00833.

    A negative is mis-classified if its cosine exceeds the positive's with its margin. Its logit
    becomes s (cos + t - 1) with ``weighting="fixed"`` and s (t cos + t - 1) with ``"adaptive"``.

    Attributes:
        base: ``"arcface"`` or ``"cosface"``: the margin on the positive.
        margin: In radians for ``arcface``, in [0, pi/2]; in units of cosine for ``cosface``.
        weighting: ``"fixed"`` or ``"adaptive"``.
        weight: t in [1, 2]; 1 changes nothing.
        gradient: Of the positive; as in :class:`partialfc.margins.ArcFace`.
    """

    base: Literal["arcface", "cosface"] = "arcface"
    margin: float = 0.5
    weighting: Literal["fixed", "adaptive"] = "adaptive"
    weight: float = 1.2
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        _Mined.__post_init__(self)
        if self.base not in ("arcface", "cosface"):
            refuse("base", self.base, "arcface or cosface")
        check_margin_of(self.base, self.margin)
        if self.weighting not in ("fixed", "adaptive"):
            refuse("weighting", self.weighting, "fixed or adaptive")
        if not 1 <= self.weight <= 2:
            refuse("weight", self.weight, "in [1, 2]")
        check_gradient(self.gradient)

    @property
    def largest_logit(self) -> float:
        """See :attr:`Margin.largest_logit`."""
        return self.scale * (2 * self.weight - 1 if self.weighting == "adaptive" else self.weight)

    def bend(self, state: State, rows: Rows) -> Bend:
        """See :meth:`Margin.bend`."""
        linear = self.weight if self.weighting == "adaptive" else 1.0
        values = (self.scale * (self.weight - 1), linear, 0.0)
        zero = rows.dot_B.new_zeros(())
        coefficients = torch.stack([torch.full_like(zero, value) for value in values])
        return Bend(self.logit(state, rows), coefficients)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        if self.base == "cosface":
            return self.scale * (cosine_B - self.margin)
        logit_B = self.scale * cosine_with_margin(cosine_B, 1.0, self.margin, "linear")
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)
