"""What a margin is: the logits of a softmax over class centers, said once for all of them.

The head computes products of queries and keys in tiles: a query is an embedding, a key a class
center, each as it is or with unit length. A negative's logit is that product times ``scale``; the
logit of a positive is the margin's own, and a few margins bend negatives too. A row has one
positive, or several that are asked for one by one, as if each had the row to itself.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, K = positives of a
row, 3 = coefficients of a bend.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.definitions.margins import Gradient

State = Mapping[str, Tensor]
"""What a margin remembers from step to step: fp32 scalars by name, the same on all ranks."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a margin may know of the rows of the gathered batch, all of it fp32.

    Attributes:
        dot_B: Product of each query and the key of its own identity: the cosine where both have
            unit length. Not defined where another rank has the center, unless the margin asks
            with ``needs_positives``.
        norm_B: Length of the embedding; ``None`` unless the margin asks with ``needs_norms``.
        length_B: Length of the own class center; ``None`` where keys have unit length.
        step: Optimizer steps taken so far.
        key: Of random numbers, the same on all ranks, another one for each micro-batch.
    """

    dot_B: Tensor
    norm_B: Tensor | None
    length_B: Tensor | None
    step: int
    key: int


@dataclass(frozen=True, slots=True)
class Positive:
    """The positive's logit of each row and its slopes, fp32 [B].

    Attributes:
        logit_B: z.
        slope_B: ∂z/∂dot.
        norm_slope_B: ∂z/∂norm at the same dot; ``None`` where it is zero.
        length_slope_B: ∂z/∂length at the same dot; ``None`` where it is zero.
    """

    logit_B: Tensor
    slope_B: Tensor
    norm_slope_B: Tensor | None = None
    length_slope_B: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Bend:
    """Another logit for the negatives of a row above a threshold: a + b z + c z² instead of z.

    Attributes:
        threshold_B: fp32 logit above which a negative is bent.
        coefficient_3: fp32 a, b, c.
    """

    threshold_B: Tensor
    coefficient_3: Tensor


@dataclass(frozen=True, slots=True)
class RowMeans:
    """The means that a loss is made of: over the positives of a row, and over rows.

    Attributes:
        share_KB: fp32 weight of each positive in its row, 0 where there is none; ``None``: one
            positive a row, of weight 1.
        present_KB: Whether there is one; ``None``: everywhere.
        counted_B: fp32 1 where a row counts, otherwise 0; ``None``: all do.
        rows: How many count; a fp32 scalar where some do not.
    """

    share_KB: Tensor | None
    present_KB: Tensor | None
    counted_B: Tensor | None
    rows: int | Tensor

    def shared(self, value_KB: Tensor) -> Tensor:
        """Return values of positives times their weights [K, B]."""
        return value_KB if self.share_KB is None else value_KB * self.share_KB

    def of_positives(self, value_KB: Tensor) -> Tensor:
        """Return the mean over the positives of each row [B], 0 where there is none."""
        return value_KB.squeeze(0) if self.share_KB is None else self.shared(value_KB).sum(0)

    def of_rows(self, value_B: Tensor) -> Tensor:
        """Return the mean over the rows that count, a scalar."""
        if self.counted_B is None:
            return value_B.mean()
        return self.counted(value_B).sum() / self.rows

    def counted(self, value_B: Tensor) -> Tensor:
        """Return values of rows [B], 0 where a row does not count."""
        return value_B if self.counted_B is None else value_B * self.counted_B

    def marked(self, value_KB: Tensor) -> Tensor:
        """Return the values with NaN where there is no positive."""
        if self.present_KB is None:
            return value_KB
        return torch.where(self.present_KB, value_KB, torch.nan)


class Margin(definitions.Margin, ABC):
    """A definition with its mathematics: a subclass of both says what it takes and what it does."""

    needs_norms: ClassVar[bool] = False
    """Whether :class:`Rows` must have the norms."""
    largest_bend: ClassVar[float] = 1.0
    """Largest factor by which :meth:`bend` raises a logit above ``scale``."""

    @property
    def largest_logit(self) -> float:
        """Bound of every |logit| of a negative; inf where lengths are kept."""
        unit = self.unit_embeddings and self.unit_centers
        return self.scale * self.largest_bend if unit else math.inf

    @property
    def needs_positives(self) -> bool:
        """Whether dot_B must be known on all ranks before the negatives: one all-reduce of [B]."""
        return False

    def new_state(self, num_identities: int) -> dict[str, float]:
        """Return the state before the first step."""
        return {}

    def gain(self, norm_b: Tensor, state: State) -> Tensor | None:
        """Return the length of this rank's queries, [b] or a scalar; ``None`` for 1."""
        return None if self.unit_embeddings else norm_b

    def advance(self, state: State, rows: Rows) -> dict[str, Tensor]:
        """Return the state of this forward pass, from that of the last one and its rows."""
        return dict(state)

    def learn(
        self, state: State, sum_B: Tensor, logit_KB: Tensor, means: RowMeans
    ) -> dict[str, Tensor]:
        """Return the state for the next forward pass.

        Args:
            state: Of this one.
            sum_B: Sum of exp(logit) over the sampled negatives of all ranks; of
                exp(logit - row maximum) where ``largest_logit`` is above 64; of
                sigmoid(logit - offset) where there is an offset.
            logit_KB: The positives' logits, 0 where there is none.
            means: Over positives and rows.
        """
        return dict(state)

    def offset(self, state: State) -> Tensor | None:
        """Return the threshold that each logit is held against in a loss of its own: the positive
        above, every negative below. ``None``: one softmax over all."""
        return None

    def bend(self, state: State, rows: Rows) -> Bend | None:
        """Return what happens to negatives above a threshold; ``None``: nothing."""
        if self.inter_class_filter is None:
            return None
        threshold_B = torch.full_like(rows.dot_B, self.scale * self.inter_class_filter)
        return Bend(threshold_B, rows.dot_B.new_zeros(3))

    def penalty(self, norm_B: Tensor) -> Tensor | None:
        """Return what the norms add to the loss of each row, differentiable; ``None``: nothing."""
        return None

    def positive(self, state: State, rows: Rows) -> Positive:
        """Return the positive's logit and its slopes, by autograd on :meth:`logit`."""
        names = [n for n in ("dot_B", "norm_B", "length_B") if getattr(rows, n) is not None]
        with torch.enable_grad():
            leaves = {name: getattr(rows, name).detach().requires_grad_() for name in names}
            logit_B = self.logit(state, replace(rows, **leaves))
            slopes = torch.autograd.grad(logit_B.sum(), list(leaves.values()), allow_unused=True)
        slope = dict(zip(names, slopes, strict=True))
        return Positive(
            logit_B.detach(), slope["dot_B"], slope.get("norm_B"), slope.get("length_B")
        )

    @abstractmethod
    def logit(self, state: State, rows: Rows) -> Tensor:
        """Return the positive's logit [B], differentiable by dot, norm and length."""


def straight_through(logit_B: Tensor, plain_B: Tensor, gradient: Gradient) -> Tensor:
    """Return ``logit_B`` with the derivative of ``plain_B`` if the gradient is straight-through."""
    if gradient == "exact":
        return logit_B
    return plain_B + (logit_B - plain_B).detach()
