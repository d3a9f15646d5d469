"""Contrastive loss: pairs of one identity together, pairs of two apart.

Shape suffixes: b = anchors, B = rows of the gathered batch.
"""

from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import losses as definitions
from partialfc.losses.base import EmbeddingLoss, Pairs, total

_SMALLEST_SQUARE = 1e-12
"""Below it a distance has no gradient: its root would have an infinite one."""


class Contrastive(definitions.Contrastive, EmbeddingLoss):
    """Mean of d²/2 over pairs of one identity + mean of max(0, margin - d)²/2 over near others.

    Hadsell, Chopra and LeCun, "Dimensionality reduction by learning an invariant mapping" (CVPR
    2006), on the Euclidean distance d of unit embeddings. Pairs of two identities that are farther
    apart than the margin are left out of their mean, or they would make it vanish.
    """

    terms: ClassVar[int] = 2

    @property
    def compares_pairs(self) -> bool:
        """Whether batches must have several images of an identity."""
        return True

    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return sums [2] and counts [2] of pairs of one identity and of two."""
        distance_bB = pairs.square_bB.clamp(min=_SMALLEST_SQUARE).sqrt()
        short_bB = self.margin - distance_bB
        together, pairs_of_one = total(pairs.square_bB / 2, pairs.same_bB)
        apart, pairs_of_two = total(short_bB.square() / 2, pairs.other_bB & (short_bB > 0))
        return torch.cat([together, apart]), torch.cat([pairs_of_one, pairs_of_two])
