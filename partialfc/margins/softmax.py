"""Softmax cross-entropy without a margin: what the margins are measured against.

Shape suffix: B = rows of the gathered batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.margins.base import Margin, Positive, Rows, State, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain(Margin):
    """The positive's logit is like any other: the product times the scale."""

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the logit and its slope, which is the scale."""
        logit_B = self.logit(state, rows)
        return Positive(logit_B, torch.full_like(logit_B, self.scale))

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * rows.dot_B


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedSoftmax(_Plain):
    """``s * cos(theta)`` for all classes: NSL, eq. 3 of https://arxiv.org/abs/1801.09414.

    Also NormFace (https://arxiv.org/abs/1704.06369). arcface_torch: ``margin_list = (1, 0, 0)``.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptNorm(_Plain):
    """Logits in proportion to the length of the embedding; there is no other scale."""

    unit_embeddings: ClassVar[bool] = False

    scale: float = 1.0

    def __post_init__(self) -> None:
        Margin.__post_init__(self)
        refuse_scale_and_filter(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModifiedSoftmax(_KeptNorm):
    """``||x|| cos(theta)``: unit centers, no bias, https://arxiv.org/abs/1704.08063."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax(_KeptNorm):
    """``w·x + b``: the softmax of a linear layer, eq. 1 of https://arxiv.org/abs/1801.07698.

    The bias of a class is the last element of its center, so it decays as the others do.
    """

    unit_centers: ClassVar[bool] = False
    bias: ClassVar[bool] = True


def refuse_scale_and_filter(margin: Margin) -> None:
    """Refuse what has no meaning where the length of an embedding is kept.

    Raises:
        ValueError: If the scale is not 1 or there is a filter.
    """
    if margin.scale != 1:
        refuse("scale", margin.scale, "1: the length of the embedding is the scale")
    if margin.inter_class_filter is not None:
        refuse("inter_class_filter", margin.inter_class_filter, "left out: logits are no cosines")
