"""Margins that weigh up the negatives nearer than the positive with its margin.

They must know the positive's cosine before the negatives: one all-reduce of [B] more.

Shape suffix: B = rows of the gathered batch.
"""

from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.angles import cosine_with_margin
from partialfc.margins.base import (
    Bend,
    Margin,
    Rows,
    State,
    straight_through,
)


class _Mined(Margin):
    @property
    def needs_positives(self) -> bool:
        """See :attr:`Margin.needs_positives`."""
        return True


class CurricularFace(definitions.CurricularFace, _Mined):
    """ArcFace whose harder negatives gain weight: s cos(θj) (t + cos(θj)),
    https://arxiv.org/abs/2004.00288.

    A negative is hard if cos(θj) > cos(θ + m); t is a moving average of the positive cosine, so
    hard negatives count for little at first and for more and more later.
    """

    largest_bend: ClassVar[float] = 2.0

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


class MVSoftmax(definitions.MVSoftmax, _Mined):
    """Mis-classified negatives weighed up, https://arxiv.org/abs/1912.00833.

    A negative is mis-classified if its cosine exceeds the positive's with its margin. Its logit
    becomes s (cos + t - 1) with ``weighting="fixed"`` and s (t cos + t - 1) with ``"adaptive"``.
    """

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
