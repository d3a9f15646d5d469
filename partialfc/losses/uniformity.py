"""Uniformity: the embeddings of different identities spread over the whole sphere.

Shape suffixes: b = anchors, B = rows of the gathered batch, T = terms of a loss.
"""

import math

from torch import Tensor

from partialfc.definitions import losses as definitions
from partialfc.losses.base import EmbeddingLoss, Pairs, total


class Uniformity(definitions.Uniformity, EmbeddingLoss):
    """log of the mean of exp(-sharpness d²) over pairs of two identities, in [-4 sharpness, 0].

    Wang and Isola, eq. 2 (https://arxiv.org/abs/2005.10242), whose mean has all pairs, as their
    images have no labels.
    """

    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sum [1] of the kernel over pairs of two identities and their number [1]."""
        return total((-self.sharpness * pairs.square_bB).exp(), pairs.other_bB)

    def value(self, mean_T: Tensor) -> Tensor:
        """Return the log of the mean; of no pairs, its smallest value."""
        return mean_T.clamp(min=math.exp(-4 * self.sharpness)).log().sum()
