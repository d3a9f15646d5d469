"""Triplet loss: an anchor must be nearer to its own identity than to any other, by a margin.

Shape suffixes: b = anchors, B = rows of the gathered batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from partialfc.losses.base import EmbeddingLoss, Pairs, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplet(EmbeddingLoss):
    """Mean of max(0, d(a, p)² - d(a, n)² + margin) over mined triplets of unit embeddings.

    FaceNet, eq. 3 (https://arxiv.org/abs/1503.03832); distances are Euclidean.

    Attributes:
        margin: In units of squared distance, in (0, 4).
        mining: ``"semi_hard"`` (FaceNet, sec. 3.2): every pair of one identity with the nearest
            negative that is farther than its positive; pairs without one are left out of the mean.
            ``"batch_hard"`` (https://arxiv.org/abs/1703.07737, eq. 5): every anchor with its
            farthest positive and its nearest negative.

    Raises:
        ValueError: If a value is outside its range.
    """

    margin: float = 0.2
    mining: Literal["semi_hard", "batch_hard"] = "semi_hard"

    def __post_init__(self) -> None:
        if not 0 < self.margin < 4:
            raise ValueError(
                f"triplet.margin must be in (0, 4), in units of squared distance, "
                f"got {self.margin}."
            )
        if self.mining not in ("semi_hard", "batch_hard"):
            raise ValueError(
                f'triplet.mining must be "semi_hard" or "batch_hard", got {self.mining!r}.'
            )

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
