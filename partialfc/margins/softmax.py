"""Softmax cross-entropy without a margin: what the margins are measured against.

Shape suffix: B = rows of the gathered batch.
"""

import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.base import Margin, Positive, Rows, State


class Plain(Margin):
    """The positive's logit is like any other: the product times the scale."""

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the logit and its slope, which is the scale."""
        logit_B = self.logit(state, rows)
        return Positive(logit_B, torch.full_like(logit_B, self.scale))

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * rows.dot_B


class NormalizedSoftmax(definitions.NormalizedSoftmax, Plain):
    """``s * cos(theta)`` for all classes: NSL, eq. 3 of https://arxiv.org/abs/1801.09414.

    Also NormFace (https://arxiv.org/abs/1704.06369). arcface_torch: ``margin_list = (1, 0, 0)``.
    """


class ModifiedSoftmax(definitions.ModifiedSoftmax, Plain):
    """``||x|| cos(theta)``: unit centers, no bias, https://arxiv.org/abs/1704.08063."""


class Softmax(definitions.Softmax, Plain):
    """``w·x + b``: the softmax of a linear layer, eq. 1 of https://arxiv.org/abs/1801.07698.

    The bias of a class is the last element of its center, so it decays as the others do.
    """
