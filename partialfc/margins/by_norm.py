"""Margins that follow the length of an embedding, which grows with the quality of its image.

Shape suffix: B = rows of the gathered batch.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.angles import angle, cosine_with_margin
from partialfc.margins.base import (
    Margin,
    Rows,
    State,
    straight_through,
)

_SMALLEST_NORM, _LARGEST_NORM = 1e-3, 100.0
_SMALLEST_ANGLE = 1e-3


class AdaFace(definitions.AdaFace, Margin):
    """``s * (cos(theta - m z) - (m + m z))``, z the image's quality in [-1, 1],
    https://arxiv.org/abs/2204.00964.

    z = h (norm - mean) / std of the norms, clipped; mean and std are moving averages over batches.
    A poor image (z = -1) gets an angular margin as in ArcFace, a good one (z = 1) a negative
    angular and twice the additive margin. The norm gets no gradient.
    """

    needs_norms: ClassVar[bool] = True

    def new_state(self, num_identities: int) -> dict[str, float]:
        """Mean and standard deviation of the norms; the paper's code starts at 20 and 100."""
        return {"norm_mean": 20.0, "norm_std": 100.0}

    def advance(self, state: State, rows: Rows) -> dict[str, Tensor]:
        """See :meth:`Margin.advance`."""
        assert rows.norm_B is not None
        norm_B = rows.norm_B.clamp(_SMALLEST_NORM, _LARGEST_NORM)
        spread = norm_B.std() if len(norm_B) > 1 else torch.zeros_like(state["norm_std"])
        return {
            "norm_mean": state["norm_mean"].lerp(norm_B.mean(), self.averaging),
            "norm_std": state["norm_std"].lerp(spread, self.averaging),
        }

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        assert rows.norm_B is not None
        norm_B = rows.norm_B.detach().clamp(_SMALLEST_NORM, _LARGEST_NORM)
        deviation_B = (norm_B - state["norm_mean"]) / (state["norm_std"] + _SMALLEST_NORM)
        quality_B = (deviation_B * self.concentration).clamp(-1, 1)
        cosine_B = rows.dot_B.clamp(-1, 1)
        theta_B = angle(cosine_B) - self.margin * quality_B
        theta_B = theta_B.clamp(_SMALLEST_ANGLE, math.pi - _SMALLEST_ANGLE)
        logit_B = self.scale * (theta_B.cos() - self.margin * (1 + quality_B))
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)


class MagFace(definitions.MagFace, Margin):
    """``s * cos(theta + m(a))``, a = ||x||, https://arxiv.org/abs/2103.06627.

    m(a) rises in a straight line from ``smallest_angular`` at ``smallest_norm`` to
    ``largest_angular`` at ``largest_norm``, and the loss gains λ g(a), g(a) = a / u² + 1 / a with
    u = ``largest_norm``, which pulls norms up; both give the norm a gradient. A norm outside the
    range counts as its end. Past pi the curve goes on as in ArcFace here.
    """

    needs_norms: ClassVar[bool] = True

    def penalty(self, norm_B: Tensor) -> Tensor:
        """Return λ g(a)."""
        norm_B = norm_B.clamp(self.smallest_norm, self.largest_norm)
        return self.norm_weight * (norm_B / self.largest_norm**2 + 1 / norm_B)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        assert rows.norm_B is not None
        norm_B = rows.norm_B.clamp(self.smallest_norm, self.largest_norm)
        rise = (self.largest_angular - self.smallest_angular) / (
            self.largest_norm - self.smallest_norm
        )
        angular_B = self.smallest_angular + rise * (norm_B - self.smallest_norm)
        return self.scale * cosine_with_margin(rows.dot_B, 1.0, angular_B, "linear")
