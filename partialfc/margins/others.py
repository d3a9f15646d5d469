"""A margin drawn at random, a scale that follows the run, and several centers for an identity.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, K = positives of a
row.
"""

import math

import numpy as np
import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.keyed import normal
from partialfc.margins.angles import cosine_with_margin
from partialfc.margins.base import (
    Margin,
    Positive,
    RowMeans,
    Rows,
    State,
    straight_through,
)
from partialfc.margins.fixed import arcface
from partialfc.margins.softmax import Plain

_LARGEST_SCALE = 64.0


class ElasticFace(definitions.ElasticFace, Margin):
    """A margin drawn anew for every sample: N(m, σ²) cut at m ± σ,
    https://arxiv.org/abs/2109.09416.

    ``sort`` needs the positives of all ranks: one all-reduce of [B] more.
    """

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


class AdaCos(definitions.AdaCos, Plain):
    """``s * cos(theta)`` with a scale that follows the run,
    https://arxiv.org/abs/1905.00292.

    It starts at √2 ln(C - 1); after each step s = ln(mean of Σ exp(s cos(θj)) over negatives) /
    cos(min(π/4, median positive angle)), used from the next step on (the paper uses it at once),
    in [1, 64]. With a sample rate below 1 the sum is over the sampled negatives, as the loss is.
    """

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

    def learn(
        self, state: State, sum_B: Tensor, logit_KB: Tensor, means: RowMeans
    ) -> dict[str, Tensor]:
        """See :meth:`Margin.learn`."""
        theta_KB = (means.marked(logit_KB) / state["scale"]).clamp(-1, 1).acos()
        median = theta_KB.nanmedian().clamp(max=math.pi / 4)
        scale = (means.of_rows(sum_B).log() / median.cos()).clamp(1.0, _LARGEST_SCALE)
        return {"scale": torch.where(median.isnan(), state["scale"], scale)}


class SubCenterArcFace(definitions.SubCenterArcFace, Margin):
    """ArcFace on the nearest of K centers of each identity, for labels with noise;
    https://www.ecva.net/papers/eccv_2020/papers_ECCV/papers/123560715.pdf.

    Clean images gather at one dominant center, wrongly labelled ones at the others. It costs K
    times the memory and time of one center; ``sample_rate`` samples identities.
    """

    def positive(self, state: State, rows: Rows) -> Positive:
        """See :func:`partialfc.margins.fixed.arcface`."""
        return arcface(self, rows)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.positive(state, rows).logit_B
