"""Margins on the positive's logit of a softmax over class centers.

A margin is a function of the cosine of an embedding to its own class center. Every other logit is
``scale * cosine``, so the head computes those in tiles and asks the margin for the positive alone.

Shape suffix: B = rows of the gathered batch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_SMALLEST_SINE = 1e-3
"""Bound of 1 / sin(theta). The gradient of the embedding itself stays bounded without it, but the
fp32 cosine does not resolve smaller angles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin(ABC):
    """What every margin has.

    Attributes:
        scale: s, the radius of the hypersphere; dimensionless, > 0.
        inter_class_filter: Cosine in (-1, 1) above which a negative is taken for the same person
            under another label: its logit becomes 0 and it gets no gradient. ``None``: no filter.
            arcface_torch: ``interclass_filtering_threshold``.

    Raises:
        ValueError: If a value is outside its range.
    """

    scale: float = 64.0
    inter_class_filter: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"margin.scale must be > 0 and finite, got {self.scale}.")
        if self.inter_class_filter is not None and not -1 < self.inter_class_filter < 1:
            raise ValueError(
                "margin.inter_class_filter is a cosine and must be in (-1, 1), "
                f"got {self.inter_class_filter}; leave it out for no filter."
            )

    @abstractmethod
    def positive(self, cosine_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positive's logit [B] and its slope d logit / d cosine [B], both fp32.

        Args:
            cosine_B: fp32 cosine of each embedding to its own class center, in [-1, 1].
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ArcFace(Margin):
    """Additive angular margin: ``s * cos(theta + m)``, eq. 3 of https://arxiv.org/abs/1801.07698.

    Past ``theta = pi - m``, where that curve would rise again, the logit goes on as
    ``s * (cos(theta) - (1 - cos(m)))``: continuous, monotone, slope s.

    Attributes:
        angular: m, in radians, in [0, pi/2].
        gradient: ``"straight_through"`` takes the margin for a constant in backward, so the slope
            is s everywhere, as arcface_torch computes it. ``"exact"`` is the derivative of the
            paper, ``s * sin(theta + m) / sin(theta)``, with ``sin(theta)`` bounded by 1e-3 below.
    """

    angular: float = 0.5
    gradient: Literal["straight_through", "exact"] = "straight_through"

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if not 0 <= self.angular <= math.pi / 2:
            degrees = f" (if that is degrees, write {math.radians(self.angular):.4f})"
            raise ValueError(
                f"margin.angular must be in [0, pi/2] radians, got {self.angular}"
                f"{degrees if 0 <= self.angular <= 90 else ''}."
            )
        if self.gradient not in ("straight_through", "exact"):
            raise ValueError(
                f"margin.gradient must be 'straight_through' or 'exact', got {self.gradient!r}."
            )

    def positive(self, cosine_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return logit and slope; see :meth:`Margin.positive`."""
        cosine_B = cosine_B.clamp(-1, 1)
        sine_B = (1 - cosine_B.square()).sqrt()
        cos_m, sin_m = math.cos(self.angular), math.sin(self.angular)
        falls_B = cosine_B > -cos_m  # theta + m < pi
        shifted_B = cosine_B * cos_m - sine_B * sin_m
        logit_B = self.scale * torch.where(falls_B, shifted_B, cosine_B - (1 - cos_m))
        slope_B = torch.full_like(cosine_B, self.scale)
        if self.gradient == "exact":
            ratio_B = cos_m + sin_m * cosine_B / sine_B.clamp(min=_SMALLEST_SINE)
            slope_B = torch.where(falls_B, slope_B * ratio_B, slope_B)
        return logit_B, slope_B


@dataclass(frozen=True, slots=True, kw_only=True)
class CosFace(Margin):
    """Additive cosine margin: ``s * (cos(theta) - m)``, eq. 4 of https://arxiv.org/abs/1801.09414.

    Attributes:
        additive: m, in units of cosine, in [0, 2).
    """

    additive: float = 0.4

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if not 0 <= self.additive < 2:
            raise ValueError(f"margin.additive must be in [0, 2), got {self.additive}.")

    def positive(self, cosine_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return logit and slope; see :meth:`Margin.positive`."""
        logit_B = self.scale * (cosine_B.clamp(-1, 1) - self.additive)
        return logit_B, torch.full_like(logit_B, self.scale)
