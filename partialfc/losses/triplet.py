"""Triplet loss: an anchor must be nearer to its own identity than to any other, by a margin.

Shape suffixes: b = anchors, B = rows of the gathered batch.
"""

import torch
from torch import Tensor

from partialfc.definitions import losses as definitions
from partialfc.losses.base import EmbeddingLoss, Pairs, total


class Triplet(definitions.Triplet, EmbeddingLoss):
    """Mean of max(0, d(a, p)² - d(a, n)² + margin) over mined triplets of unit embeddings.

    FaceNet, eq. 3 (https://arxiv.org/abs/1503.03832); distances are Euclidean.
    ``semi_hard`` (sec. 3.2) leaves pairs without a farther negative out of the mean; ``batch_hard``
    is eq. 5 of https://arxiv.org/abs/1703.07737.
    """

    @property
    def compares_pairs(self) -> bool:
        """Whether batches must have several images of an identity."""
        return True

    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sum [1] over mined triplets and their number [1]."""
        mined = _semi_hard if self.mining == "semi_hard" else _batch_hard
        excess, counted = mined(pairs)
        return total((excess + self.margin).relu(), counted)


def _batch_hard(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """d(a, p)² - d(a, n)² of each anchor [b], and whether it has both."""
    farthest_b = pairs.square_bB.masked_fill(~pairs.same_bB, -torch.inf).amax(1)
    nearest_b = pairs.square_bB.masked_fill(~pairs.other_bB, torch.inf).amin(1)
    return farthest_b - nearest_b, pairs.same_bB.any(1) & pairs.other_bB.any(1)


def _semi_hard(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The same of each pair [b, B], and whether it is one and has a negative farther away."""
    ascending_bB = pairs.square_bB.masked_fill(~pairs.other_bB, torch.inf).sort(1).values
    place_bB = torch.searchsorted(ascending_bB.detach(), pairs.square_bB.detach(), right=True)
    farther_bB = ascending_bB.gather(1, place_bB.clamp(max=place_bB.shape[1] - 1))
    has_one_bB = place_bB < pairs.other_bB.sum(1, keepdim=True)
    return pairs.square_bB - farther_bB, pairs.same_bB & has_one_bB
