"""What a loss on embeddings is: means over pairs of one rank's rows and the rows of all ranks.

Every rank sums over its own anchors; the sums of all ranks make the means, so no rank computes
[B, B] distances.

Shape suffixes: b = anchors, the rows of this rank's batch, B = rows of the gathered batch,
D = embedding, L = a teacher's embedding, T = terms of a loss.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import Definition
from partialfc.numerics import precision


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher says of the images of this rank's batch.

    Attributes:
        embeddings_bL: Its embeddings, any float dtype, any length; they get no gradient.
        factor: Of the weight of :class:`~partialfc.losses.Distillation` at this step; >= 0.
    """

    embeddings_bL: Tensor
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Taught:
    """The same pairs in the eyes of a teacher.

    Attributes:
        square_bB: Squared Euclidean distance of its unit embeddings, in [0, 4].
        own_b: 1 - cos of an anchor's embedding and the teacher's, in [0, 2]; ``None`` where these
            have not the same length.
    """

    square_bB: Tensor
    own_b: Tensor | None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every anchor beside every row of the gathered batch.

    Attributes:
        square_bB: Squared Euclidean distance of the unit embeddings, in [0, 4].
        same_bB: Whether the two are different images of one identity.
        other_bB: Whether they are of two identities.
        taught: What a teacher says of them, if there is one.
    """

    square_bB: Tensor
    same_bB: Tensor
    other_bB: Tensor
    taught: Taught | None = None

    @classmethod
    def of(
        cls,
        unit_BD: Tensor,
        identities_B: Tensor,
        anchors: slice,
        teacher_BL: Tensor | None = None,
    ) -> "Pairs":
        """Return the pairs of the rows ``anchors`` with all rows.

        Args:
            unit_BD: Unit embeddings.
            identities_B: int64.
            anchors: Rows of this rank.
            teacher_BL: Unit embeddings of a teacher.
        """
        square_bB = _squares(unit_BD, anchors)
        taught = None
        if teacher_BL is not None:
            own_b = None
            if teacher_BL.shape == unit_BD.shape:
                own_b = 1 - (unit_BD[anchors] * teacher_BL[anchors]).sum(1)
            taught = Taught(_squares(teacher_BL, anchors), own_b)
        alike_bB = identities_B[anchors].unsqueeze(1) == identities_B
        place_B = torch.arange(len(unit_BD), device=unit_BD.device)
        itself_bB = place_B[anchors].unsqueeze(1) == place_B
        return cls(square_bB, alike_bB & ~itself_bB, ~alike_bB, taught)


def _squares(unit_BD: Tensor, anchors: slice) -> Tensor:
    with precision("fp32", unit_BD.device):  # TF32 would put 1e-3 on a square near 0
        cosine_bB = unit_BD[anchors] @ unit_BD.T
    return (2 - 2 * cosine_bB).clamp(min=0)


class EmbeddingLoss(Definition, ABC):
    """A function of T means over pairs or triplets of the global batch."""

    terms: ClassVar[int] = 1
    """T."""

    @property
    def compares_pairs(self) -> bool:
        """Whether batches must have several images of an identity."""
        return False

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
