"""Uniformity: the embeddings of different identities spread over the whole sphere."""

import math
from dataclasses import dataclass

from torch import Tensor

from partialfc.losses.base import EmbeddingLoss, Pairs, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniformity(EmbeddingLoss):
    """log of the mean of exp(-sharpness d²) over pairs of two identities, in [-4 sharpness, 0].

    Wang and Isola, eq. 2 (https://arxiv.org/abs/2005.10242), whose mean has all pairs, as their
    images have no labels.

    Attributes:
        sharpness: t, per squared distance, in (0, 20]; large values see near pairs only.

    Raises:
        ValueError: If a value is outside its range.
    """

    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.sharpness <= 20:
            raise ValueError(f"uniformity.sharpness must be in (0, 20], got {self.sharpness}.")

    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sum [1] of the kernel over pairs of two identities and their number [1]."""
        return total((-self.sharpness * pairs.square_bB).exp(), pairs.other_bB)

    def value(self, mean_T: Tensor) -> Tensor:
        """Return the log of the mean; of no pairs, its smallest value."""
        return mean_T.clamp(min=math.exp(-4 * self.sharpness)).log().sum()
