"""A margin drawn at random, a scale that follows the run, and several centers for an identity.

Shape suffix: B = rows of the gathered batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from partialfc.keyed import normal
from partialfc.margins.angles import cosine_with_margin
from partialfc.margins.base import (
    Gradient,
    Margin,
    Rows,
    State,
    check_gradient,
    check_margin_of,
    refuse,
    straight_through,
)
from partialfc.margins.fixed import ArcFace
from partialfc.margins.softmax import NormalizedSoftmax

_LARGEST_SCALE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticFace(Margin):
    """A margin drawn anew for every sample: N(m, σ²) cut at m ± σ,
    https://arxiv.org/abs/2109.09416.

    Attributes:
        base: ``"arcface"`` or ``"cosface"``: where the margin goes.
        margin: m, in radians for ``arcface``, in units of cosine for ``cosface``; in [0, pi/2].
        deviation: σ in [0, m].
        sort: Give the largest margins of a batch to the smallest cosines (ElasticFace+). It needs
            the positives of all ranks: one all-reduce of [B] more.
        gradient: As in :class:`partialfc.margins.ArcFace`.
    """

    base: Literal["arcface", "cosface"] = "arcface"
    margin: float = 0.5
    deviation: float = 0.05
    sort: bool = False
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if self.base not in ("arcface", "cosface"):
            refuse("base", self.base, "arcface or cosface")
        check_margin_of(self.base, self.margin)
        if not 0 <= self.deviation <= self.margin:
            refuse("deviation", self.deviation, f"in [0, margin = {self.margin}]")
        check_gradient(self.gradient)

    @property
    def needs_positives(self) -> bool:
        """See :attr:`Margin.needs_positives`."""
        return self.sort

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        cosine_B = rows.dot_B.clamp(-1, 1)
        drawn_B = torch.from_numpy(normal(np.arange(len(cosine_B)), rows.key)).clamp(-1, 1)
        margin_B = (self.margin + self.deviation * drawn_B).to(cosine_B.dtype)
        if cosine_B.is_cuda:  # pinned, or the host would wait for the copy
            margin_B = margin_B.pin_memory().to(cosine_B.device, non_blocking=True)
        if self.sort:
            order_B = cosine_B.detach().argsort(descending=True, stable=True)
            margin_B = torch.empty_like(margin_B).index_copy_(0, order_B, margin_B.sort().values)
        if self.base == "cosface":
            return self.scale * (cosine_B - margin_B)
        logit_B = self.scale * cosine_with_margin(cosine_B, 1.0, margin_B, "linear")
        return straight_through(logit_B, self.scale * cosine_B, self.gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaCos(NormalizedSoftmax):
    """``s * cos(theta)`` with a scale that follows the run,
    https://arxiv.org/abs/1905.00292.

    It starts at √2 ln(C - 1); after each step s = ln(mean of Σ exp(s cos(θj)) over negatives) /
    cos(min(π/4, median positive angle)), used from the next step on (the paper uses it at once),
    in [1, 64]. With a sample rate below 1 the sum is over the sampled negatives, as the loss is.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        NormalizedSoftmax.__post_init__(self)
        if self.scale != 1:
            refuse("scale", self.scale, "1: it follows the run")
        if self.inter_class_filter is not None:
            refuse("inter_class_filter", self.inter_class_filter, "left out")

    @property
    def largest_logit(self) -> float:
        """See :attr:`Margin.largest_logit`."""
        return _LARGEST_SCALE

    def new_state(self, num_identities: int) -> dict[str, float]:
        """The scale s."""
        scale = math.sqrt(2) * math.log(max(2, num_identities - 1))
        return {"scale": min(scale, _LARGEST_SCALE)}

    def gain(self, norm_b: Tensor, state: State) -> Tensor:
        """Return s: queries have that length, so the product is the logit."""
        return state["scale"]

    def learn(self, state: State, sum_B: Tensor, logit_B: Tensor) -> dict[str, Tensor]:
        """See :meth:`Margin.learn`."""
        theta_B = (logit_B / state["scale"]).clamp(-1, 1).acos()
        median = theta_B.median().clamp(max=math.pi / 4)
        return {"scale": (sum_B.mean().log() / median.cos()).clamp(1.0, _LARGEST_SCALE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SubCenterArcFace(ArcFace):
    """ArcFace on the nearest of K centers of each identity, for labels with noise;
    https://www.ecva.net/papers/eccv_2020/papers_ECCV/papers/123560715.pdf.

    Clean images gather at one dominant center, wrongly labelled ones at the others. It costs K
    times the memory and time of one center; ``sample_rate`` samples identities.

    Attributes:
        sub_centers: K in [1, 10].
    """

    sub_centers: int = 3

    def __post_init__(self) -> None:
        ArcFace.__post_init__(self)
        if not 1 <= self.sub_centers <= 10:
            refuse("sub_centers", self.sub_centers, "in [1, 10]")
        if self.label_smoothing:
            refuse("label_smoothing", self.label_smoothing, "left out")

    @property
    def centers_per_identity(self) -> int:
        """K."""
        return self.sub_centers
