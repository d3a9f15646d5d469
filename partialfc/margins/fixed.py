"""Margins that are the same number for every sample: ArcFace, CosFace and their combination.

Shape suffix: B = rows of the gathered batch.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from partialfc.margins.angles import SMALLEST_SINE, PastPi, cosine_with_margin
from partialfc.margins.base import (
    Gradient,
    Margin,
    Positive,
    Rows,
    State,
    check_angular,
    check_gradient,
    refuse,
    straight_through,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArcFace(Margin):
    """Additive angular margin: ``s * cos(theta + m)``, eq. 3 of https://arxiv.org/abs/1801.07698.

    Past ``theta = pi - m``, where that curve would rise again, the logit goes on as
    ``s * (cos(theta) - (1 - cos(m)))``: continuous, monotone, slope s. arcface_torch:
    ``margin_list = (1, m, 0)``, without that continuation.

    Attributes:
        angular: m, in radians, in [0, pi/2].
        gradient: ``"straight_through"``, slope s, as arcface_torch computes it, or ``"exact"``,
            ``s * sin(theta + m) / sin(theta)``, with ``sin(theta)`` bounded by 1e-3 below.
    """

    angular: float = 0.5
    gradient: Gradient = "straight_through"

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        check_angular(self.angular)
        check_gradient(self.gradient)

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the logit and its slope without the arc cosine, for speed."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        sine_B = (1 - cosine_B.square()).sqrt()
        cos_m, sin_m = math.cos(self.angular), math.sin(self.angular)
        falls_B = cosine_B > -cos_m  # theta + m < pi
        shifted_B = cosine_B * cos_m - sine_B * sin_m
        logit_B = self.scale * torch.where(falls_B, shifted_B, cosine_B - (1 - cos_m))
        slope_B = torch.full_like(cosine_B, self.scale)
        if self.gradient == "exact":
            ratio_B = cos_m + sin_m * cosine_B / sine_B.clamp(min=SMALLEST_SINE)
            slope_B = torch.where(falls_B, slope_B * ratio_B, slope_B)
        return Positive(logit_B, slope_B)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.positive(state, rows).logit_B


@dataclass(frozen=True, slots=True, kw_only=True)
class CosFace(Margin):
    """Additive cosine margin: ``s * (cos(theta) - m)``, eq. 4 of https://arxiv.org/abs/1801.09414.

    Also AM-Softmax (https://arxiv.org/abs/1801.05599) and LMCL. arcface_torch:
    ``margin_list = (1, 0, m)``.

    Attributes:
        additive: m, in units of cosine, in [0, 2).
    """

    additive: float = 0.4

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if not 0 <= self.additive < 2:
            refuse("additive", self.additive, "in [0, 2)")

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the logit and its slope, which is s."""
        logit_B = self.logit(state, rows)
        return Positive(logit_B, torch.full_like(logit_B, self.scale))

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * (rows.dot_B.clamp(-1, 1) - self.additive)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedMargin(Margin):
    """``s * (cos(m0*theta + m1) - m2)``, section 2.2 of https://arxiv.org/abs/1801.07698.

    (1, m, 0) is ArcFace, (1, 0, m) CosFace and (m, 0, 0) SphereFace with a fixed scale.
    arcface_torch: ``margin_list = (m0, m1, m2)``, which there ignores m0 and m1 where m2 > 0.

    Attributes:
        multiplicative: m0, a factor of the angle, in [1, 4].
        angular: m1, in radians, in [0, pi/2].
        additive: m2, in units of cosine, in [0, 2).
        past_pi: How the curve goes on where m0*theta + m1 passes pi; see
            :data:`partialfc.margins.angles.PastPi`.
        allow_rising: Accept a ``past_pi`` that is not monotone: where the logit rises with the
            angle, a hopeless sample is pushed away from its own center.
        gradient: As in :class:`ArcFace`; in backward a constant is only what the margin adds.
    """

    multiplicative: float = 1.0
    angular: float = 0.3
    additive: float = 0.2
    past_pi: PastPi = "linear"
    allow_rising: bool = False
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if not 1 <= self.multiplicative <= 4:
            refuse("multiplicative", self.multiplicative, "in [1, 4]")
        check_angular(self.angular)
        if not 0 <= self.additive < 2:
            refuse("additive", self.additive, "in [0, 2)")
        if self.past_pi not in get_args(PastPi):
            refuse("past_pi", self.past_pi, f"one of {', '.join(get_args(PastPi))}")
        check_gradient(self.gradient)
        rises = self.past_pi == "none" and (self.multiplicative > 1 or self.angular > 0)
        rises |= self.past_pi == "drop" and self.multiplicative > 1
        if (rises or self.past_pi == "easy") and not self.allow_rising:
            raise ValueError(
                f"margin.past_pi = {self.past_pi!r} makes the logit rise with the angle somewhere. "
                'Use "linear" or "fold", or set margin.allow_rising = true.'
            )

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        shifted_B = cosine_with_margin(cosine_B, self.multiplicative, self.angular, self.past_pi)
        logit_B = self.scale * (shifted_B - self.additive)
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)
