"""What a teacher, another network, says of the same images, and how the embeddings follow it.

Shape suffixes: b = anchors, B = rows of the gathered batch.
"""

import torch
from torch import Tensor

from partialfc.definitions import losses as definitions
from partialfc.losses.base import EmbeddingLoss, Pairs, Taught, total

_SMALLEST_SQUARE = 1e-12
"""Below it a distance has no gradient: its root would have an infinite one."""

_WIDEST_GAP = 2.0
"""Squared distance of unrelated directions: the gap of a teacher that is sure of both pairs."""


class Distillation(definitions.Distillation, EmbeddingLoss):
    """One of three means over the images of the global batch; the teacher has no gradient.

    ``cosine``: 1 - cos of an image's embedding and the teacher's, over images; both have D numbers.

    ``relational``: the Huber loss, with its corner at 1, of the difference of two distances, the
    embeddings' and the teacher's, over pairs of different images. It is the distance-wise loss of
    Relational Knowledge Distillation (Park et al., eq. 5, https://arxiv.org/abs/1904.05068) on unit
    embeddings, whose distances have one scale; the paper divides by their mean instead.

    ``margin``: Triplet Distillation (Feng et al., https://arxiv.org/abs/1905.04457): the mean of
    max(0, d(a, p)² - d(a, n)² + m) over anchors, with the farthest positive and the nearest
    negative. Its m = smallest + (largest - smallest) max(0, t) / most, where t is the teacher's own
    d(a, n)² - d(a, p)². The paper's ``most`` is the largest t of the batch; here it is 2, and t is
    at most that, so that a triplet's margin does not depend on which others are in a micro-batch.
    """

    @property
    def compares_pairs(self) -> bool:
        """Whether batches must have several images of an identity."""
        return self.form == "margin"

    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sum [1] over images, pairs or triplets, and their number [1].

        Raises:
            ValueError: If there are no embeddings of a teacher, or, for ``cosine``, of another
                length.
        """
        taught = pairs.taught
        if taught is None:
            raise ValueError(
                "Distillation needs the teacher's embeddings of the batch: give them as lesson."
            )
        match self.form:
            case "cosine":
                return _cosine(taught)
            case "relational":
                return _relational(pairs, taught)
            case "margin":
                return self._margin(pairs, taught)

    def _margin(self, pairs: Pairs, taught: Taught) -> tuple[Tensor, Tensor]:
        far_b1 = pairs.square_bB.masked_fill(~pairs.same_bB, -torch.inf).argmax(1, keepdim=True)
        near_b1 = pairs.square_bB.masked_fill(~pairs.other_bB, torch.inf).argmin(1, keepdim=True)

        def gap_b1(square_bB: Tensor) -> Tensor:
            return square_bB.gather(1, near_b1) - square_bB.gather(1, far_b1)

        sure_b1 = gap_b1(taught.square_bB).clamp(0, _WIDEST_GAP) / _WIDEST_GAP
        margin_b1 = self.smallest_margin + (self.largest_margin - self.smallest_margin) * sure_b1
        counted_b1 = pairs.same_bB.any(1, keepdim=True) & pairs.other_bB.any(1, keepdim=True)
        return total((margin_b1 - gap_b1(pairs.square_bB)).relu(), counted_b1)


def _cosine(taught: Taught) -> tuple[Tensor, Tensor]:
    if taught.own_b is None:
        raise ValueError(
            "form = \"cosine\": the teacher's embeddings must be as long as the student's; take "
            '"relational" or "margin".'
        )
    return total(taught.own_b, torch.ones_like(taught.own_b, dtype=torch.bool))


def _relational(pairs: Pairs, taught: Taught) -> tuple[Tensor, Tensor]:
    ours_bB, theirs_bB = (
        square_bB.clamp(min=_SMALLEST_SQUARE).sqrt()
        for square_bB in (pairs.square_bB, taught.square_bB)
    )
    off_bB = (ours_bB - theirs_bB).abs()
    huber_bB = torch.where(off_bB < 1, off_bB.square() / 2, off_bB - 0.5)
    return total(huber_bB, pairs.same_bB | pairs.other_bB)
