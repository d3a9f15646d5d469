"""What a loss on embeddings is: means over pairs of one rank's rows and the rows of all ranks.

Every rank sums over its own anchors; the sums of all ranks make the means, so no rank computes
[B, B] distances.

Shape suffixes: b = anchors, the rows of this rank's batch, B = rows of the gathered batch,
D = embedding, T = terms of a loss.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import Definition
from partialfc.numerics import precision


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every anchor beside every row of the gathered batch.

    Attributes:
        square_bB: Squared Euclidean distance of the unit embeddings, in [0, 4].
        same_bB: Whether the two are different images of one identity.
        other_bB: Whether they are of two identities.
    """

    square_bB: Tensor
    same_bB: Tensor
    other_bB: Tensor

    @classmethod
    def of(cls, unit_BD: Tensor, identities_B: Tensor, anchors: slice) -> "Pairs":
        """Return the pairs of the rows ``anchors`` with all rows.

        Args:
            unit_BD: Unit embeddings.
            identities_B: int64.
            anchors: Rows of this rank.
        """
        with precision("fp32", unit_BD.device):  # TF32 would put 1e-3 on a square near 0
            cosine_bB = unit_BD[anchors] @ unit_BD.T
        square_bB = (2 - 2 * cosine_bB).clamp(min=0)
        alike_bB = identities_B[anchors].unsqueeze(1) == identities_B
        place_B = torch.arange(len(unit_BD), device=unit_BD.device)
        itself_bB = place_B[anchors].unsqueeze(1) == place_B
        return cls(square_bB, alike_bB & ~itself_bB, ~alike_bB)


class EmbeddingLoss(Definition, ABC):
    """A function of T means over pairs or triplets of the global batch."""

    terms: ClassVar[int] = 1
    """T."""

    @abstractmethod
    def sums(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sums [T], with their gradient, and the counts [T] of this rank's anchors."""

    def value(self, mean_T: Tensor) -> Tensor:
        """Return the loss from the means over all ranks; a mean of nothing is 0."""
        return mean_T.sum()


def total(value_bB: Tensor, counted_bB: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over what is counted, and how much that is, both [1] and fp32."""
    chosen_bB = torch.where(counted_bB, value_bB, 0.0)
    return chosen_bB.sum().view(1), counted_bB.sum(dtype=chosen_bB.dtype).view(1)
