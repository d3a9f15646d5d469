"""Margins that multiply the angle: L-Softmax, SphereFace and SphereFace with a fixed scale.

ψ(θ) = (-1)^k cos(mθ) - 2k for θ in [kπ/m, (k+1)π/m] is cos(mθ) without its rises.

Shape suffix: B = rows of the gathered batch.
"""

from typing import ClassVar

from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.angles import folded_cosine
from partialfc.margins.base import Margin, Rows, State

_SMALLEST_LENGTH = 1e-12


class _Multiplicative(definitions.Multiplicative, Margin):
    """ψ with annealing: (λ cos(θ) + ψ(θ)) / (1 + λ), λ = annealing / (1 + γ t) at step t.

    The papers start near a plain softmax, since ψ alone does not converge from random weights.
    """

    def weight(self, step: int) -> float:
        """Return λ at a step."""
        return max(self.annealing_end, self.annealing / (1 + self.annealing_decay * step))

    def _annealed(self, cosine_B: Tensor, step: int) -> Tensor:
        weight = self.weight(step)
        folded_B = folded_cosine(cosine_B, self.multiplicative)
        return (weight * cosine_B + folded_B) / (1 + weight)


class FNormSphereFace(definitions.FNormSphereFace, _Multiplicative):
    """``s * ψ(theta)``: SphereFace with unit embeddings, section 2.2 of 1801.07698.

    arcface_torch: ``margin_list = (m, 0, 0)``, where it is refused.
    """

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * self._annealed(rows.dot_B, rows.step)


class _KeptNorm(_Multiplicative):
    """The length of an embedding is its scale; there is no other."""

    needs_norms: ClassVar[bool] = True

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        assert rows.norm_B is not None
        length_B = rows.norm_B if rows.length_B is None else rows.norm_B * rows.length_B
        length_B = length_B.clamp(min=_SMALLEST_LENGTH)
        return length_B * self._annealed(rows.dot_B / length_B, rows.step)


class SphereFace(definitions.SphereFace, _KeptNorm):
    """``||x|| ψ(theta)``: A-Softmax, eq. 7 of https://arxiv.org/abs/1704.08063.

    Centers have unit length; the length of an embedding is its scale.
    """


class LSoftmax(definitions.LSoftmax, _KeptNorm):
    """``||w|| ||x|| ψ(theta)``: L-Softmax, eq. 4 of https://arxiv.org/abs/1612.02295.

    Both lengths are kept, for the negatives too, and there is no bias.
    """
