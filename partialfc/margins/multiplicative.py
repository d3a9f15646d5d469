"""Margins that multiply the angle: L-Softmax, SphereFace and SphereFace with a fixed scale.

ψ(θ) = (-1)^k cos(mθ) - 2k for θ in [kπ/m, (k+1)π/m] is cos(mθ) without its rises.

Shape suffix: B = rows of the gathered batch.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from partialfc.margins.angles import folded_cosine
from partialfc.margins.base import Margin, Rows, State, refuse
from partialfc.margins.softmax import refuse_scale_and_filter

_SMALLEST_LENGTH = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Multiplicative(Margin):
    """ψ with annealing: (λ cos(θ) + ψ(θ)) / (1 + λ).

    Attributes:
        multiplicative: m, an integer in [1, 4].
        annealing: λ at the first step, >= 0. The papers start near a plain softmax, since ψ alone
            does not converge from random weights.
        annealing_decay: γ >= 0: at step t, λ = annealing / (1 + γ t).
        annealing_end: Smallest λ, in [0, annealing].
    """

    multiplicative: int = 4
    annealing: float = 1000.0
    annealing_decay: float = 0.12
    annealing_end: float = 5.0

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        if self.multiplicative not in (1, 2, 3, 4):
            refuse("multiplicative", self.multiplicative, "1, 2, 3 or 4")
        if not 0 <= self.annealing < math.inf:
            refuse("annealing", self.annealing, ">= 0 and finite")
        if not 0 <= self.annealing_decay < math.inf:
            refuse("annealing_decay", self.annealing_decay, ">= 0 and finite")
        if not 0 <= self.annealing_end <= self.annealing:
            refuse("annealing_end", self.annealing_end, f"in [0, annealing = {self.annealing}]")

    def weight(self, step: int) -> float:
        """Return λ at a step."""
        return max(self.annealing_end, self.annealing / (1 + self.annealing_decay * step))

    def _annealed(self, cosine_B: Tensor, step: int) -> Tensor:
        weight = self.weight(step)
        folded_B = folded_cosine(cosine_B, self.multiplicative)
        return (weight * cosine_B + folded_B) / (1 + weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class FNormSphereFace(_Multiplicative):
    """``s * ψ(theta)``: SphereFace with unit embeddings, section 2.2 of 1801.07698.

    arcface_torch: ``margin_list = (m, 0, 0)``, where it is refused.
    """

    multiplicative: int = 2
    annealing: float = 0.0
    annealing_end: float = 0.0

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * self._annealed(rows.dot_B, rows.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptNorm(_Multiplicative):
    """The length of an embedding is its scale; there is no other."""

    unit_embeddings: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        _Multiplicative.__post_init__(self)
        refuse_scale_and_filter(self)

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        assert rows.norm_B is not None
        length_B = rows.norm_B if rows.length_B is None else rows.norm_B * rows.length_B
        length_B = length_B.clamp(min=_SMALLEST_LENGTH)
        return length_B * self._annealed(rows.dot_B / length_B, rows.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class SphereFace(_KeptNorm):
    """``||x|| ψ(theta)``: A-Softmax, eq. 7 of https://arxiv.org/abs/1704.08063.

    Centers have unit length; the length of an embedding is its scale.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class LSoftmax(_KeptNorm):
    """``||w|| ||x|| ψ(theta)``: L-Softmax, eq. 4 of https://arxiv.org/abs/1612.02295.

    Both lengths are kept, for the negatives too, and there is no bias.
    """

    unit_centers: ClassVar[bool] = False
