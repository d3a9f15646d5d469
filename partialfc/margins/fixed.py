"""Margins that are the same number for every sample: ArcFace, CosFace and their combination.

Shape suffix: B = rows of the gathered batch.
"""

import math

import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.angles import SMALLEST_SINE, cosine_with_margin
from partialfc.margins.base import (
    Margin,
    Positive,
    Rows,
    State,
    straight_through,
)


class ArcFace(definitions.ArcFace, Margin):
    """Additive angular margin: ``s * cos(theta + m)``, eq. 3 of https://arxiv.org/abs/1801.07698.

    Past ``theta = pi - m``, where that curve would rise again, the logit goes on as
    ``s * (cos(theta) - (1 - cos(m)))``: continuous, monotone, slope s. arcface_torch:
    ``margin_list = (1, m, 0)``, without that continuation. The straight-through slope is s, the
    exact one ``s * sin(theta + m) / sin(theta)``, with ``sin(theta)`` bounded by 1e-3 below.
    """

    def positive(self, state: State, rows: Rows) -> Positive:
        """See :func:`arcface`."""
        return arcface(self, rows)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.positive(state, rows).logit_B


def arcface(margin: definitions.ArcFace | definitions.SubCenterArcFace, rows: Rows) -> Positive:
    """Return the logit of ArcFace and its slope without the arc cosine, for speed."""
    cosine_B = rows.dot_B.clamp(-1, 1)
    sine_B = (1 - cosine_B.square()).sqrt()
    cos_m, sin_m = math.cos(margin.angular), math.sin(margin.angular)
    falls_B = cosine_B > -cos_m  # theta + m < pi
    shifted_B = cosine_B * cos_m - sine_B * sin_m
    logit_B = margin.scale * torch.where(falls_B, shifted_B, cosine_B - (1 - cos_m))
    slope_B = torch.full_like(cosine_B, margin.scale)
    if margin.gradient == "exact":
        ratio_B = cos_m + sin_m * cosine_B / sine_B.clamp(min=SMALLEST_SINE)
        slope_B = torch.where(falls_B, slope_B * ratio_B, slope_B)
    return Positive(logit_B, slope_B)


class CosFace(definitions.CosFace, Margin):
    """Additive cosine margin: ``s * (cos(theta) - m)``, eq. 4 of https://arxiv.org/abs/1801.09414.

    Also AM-Softmax (https://arxiv.org/abs/1801.05599) and LMCL. arcface_torch:
    ``margin_list = (1, 0, m)``.
    """

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the logit and its slope, which is s."""
        logit_B = self.logit(state, rows)
        return Positive(logit_B, torch.full_like(logit_B, self.scale))

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * (rows.dot_B.clamp(-1, 1) - self.additive)


class CombinedMargin(definitions.CombinedMargin, Margin):
    """``s * (cos(m0*theta + m1) - m2)``, section 2.2 of https://arxiv.org/abs/1801.07698.

    (1, m, 0) is ArcFace, (1, 0, m) CosFace and (m, 0, 0) SphereFace with a fixed scale.
    arcface_torch: ``margin_list = (m0, m1, m2)``, which there ignores m0 and m1 where m2 > 0.
    Straight-through, a constant in backward is only what the margin adds.
    """

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        shifted_B = cosine_with_margin(cosine_B, self.multiplicative, self.angular, self.past_pi)
        logit_B = self.scale * (shifted_B - self.additive)
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)
