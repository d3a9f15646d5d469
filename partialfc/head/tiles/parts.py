"""What goes into the two passes of the head, and from the first to the second.

Shape suffixes: B = rows of the gathered batch, D = embedding, T = rows of a tile, n = rows of the
sample or of pass 2, P = any rows, or K * B positives, K a row, 1 = one for each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partialfc.head.options import Compute
from partialfc.head.plan import Path
from partialfc.head.tiles.set_mask import SetMask
from partialfc.margins.base import Bend

_LARGEST_PLAIN_LOGIT = 64.0
"""exp(±z) of a larger logit, summed over 1e8 classes, leaves fp32's range: keep a row maximum."""


@dataclass(frozen=True, slots=True)
class Logits:
    """How the product of a query and a center becomes the logit of a negative.

    Attributes:
        scale: Factor of the product.
        unit: Whether a key is the center's unit vector, or the center as it is.
        largest: Bound of every |logit|; inf if there is none.
        compute: Precision of the products.
        per_identity: K; the logit of an identity is the largest of those of its K rows.
        bend: Another logit above a threshold, or ``None``.
        offset: Scalar; every negative then has a loss of its own, log(1 + exp(logit - offset)),
            and the sigmoid of the same takes the place of the exponential. ``None``: a softmax.
        mask: Sets of identities that rows leave out; ``None`` for none.
        log_weight_n: fp32, log of how many negatives each sampled one stands for: added to its
            logits, behind the bend. ``None``: each for itself.
        path: Which code computes them.
    """

    scale: float
    unit: bool
    largest: float
    compute: Compute
    per_identity: int = 1
    bend: Bend | None = None
    offset: Tensor | None = None
    mask: SetMask | None = None
    log_weight_n: Tensor | None = None
    path: Path = "torch"

    def weigh_(self, logit_TB: Tensor, start: int) -> None:
        """Let each negative of the tile at ``start`` stand for as many as it was drawn among."""
        log_weight_T1 = self.log_weights(start, len(logit_TB))
        if log_weight_T1 is not None:
            logit_TB.add_(log_weight_T1)

    def log_weights(self, start: int, rows: int) -> Tensor | None:
        """Return ``log_weight_n`` of a tile [T, 1], or ``None``."""
        weights = self.log_weight_n
        return None if weights is None else weights[start : start + rows].unsqueeze(1)

    @property
    def needs_maximum(self) -> bool:
        """Whether the exponentials need a row maximum to stay inside fp32's range."""
        return self.offset is None and self.largest > _LARGEST_PLAIN_LOGIT


@dataclass(frozen=True, slots=True)
class KeptTile:
    """E of one tile.

    Attributes:
        exp_TB: E, times ``factor_T1``.
        maximum_B: The row maximum that it is relative to, or ``None``.
        factor_T1: Reciprocal norms of the keys, or ``None`` for keys of unit length.
    """

    exp_TB: Tensor
    maximum_B: Tensor | None
    factor_T1: Tensor | None


@dataclass(frozen=True, slots=True)
class FirstPass:
    """What pass 1 knows of this rank's negatives.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the sampled negatives; with an offset, of their
            losses.
        sigmoid_B: Sum of sigmoid(logit - offset); ``None`` without an offset.
        maximum_B: Largest negative logit, or ``None`` where the logits need no maximum (then 0).
        pull_BD: Sum over negatives of exp(logit - maximum) * the bend's slope * key; ``None`` if
            not wanted.
        key_sum_D: Sum of all keys, positives included; ``None`` if not wanted.
        rows: Their number.
        exponentials: Of the first tiles, as many as the budget allows.
    """

    sum_B: Tensor
    sigmoid_B: Tensor | None
    maximum_B: Tensor | None
    pull_BD: Tensor | None
    key_sum_D: Tensor | None
    rows: int
    exponentials: list[KeptTile]


@dataclass(frozen=True, slots=True)
class Pull:
    """What a loss beside the softmax adds to the gradient by some keys: slope * direction.

    Attributes:
        target_P: int64 place of each key in the sample, or ``NOT_LOCAL``; keys may repeat.
        slope_P: fp32.
        direction_PD: fp32.
    """

    target_P: Tensor
    slope_P: Tensor
    direction_PD: Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """What pass 2 needs of one micro-batch.

    Attributes:
        query_BD: Gathered queries in the operand dtype.
        row_n: int64 [n] sampled rows of the shard, or ``None`` for all of them.
        target_P: Place of each row's own class center among the sampled ones, or ``NOT_LOCAL``; of
            several a row, those of the rows in order, then all second ones, and so on.
        logits: What the products become.
        maximum_B: Subtracted from the logits before exp, or ``None``.
        negative_B: Factor that makes exp(logit - maximum) the derivative of the loss by the
            product.
        positive_P: Derivative of the loss by the positive's product, times what follows.
        positive_BD: The derivative of the positive's product by its key: queries, unless the
            margin follows the length of a center; then one for each P.
        even_D: Subtracted from the gradient of every sampled key, or ``None``.
        exponentials: E of the first tiles, 0 at the positives.
        pulls: What losses beside the softmax add.
    """

    query_BD: Tensor
    row_n: Tensor | None
    target_P: Tensor
    logits: Logits
    maximum_B: Tensor | None
    negative_B: Tensor
    positive_P: Tensor
    positive_BD: Tensor
    even_D: Tensor | None
    exponentials: list[KeptTile]
    pulls: Sequence[Pull] = ()

    @property
    def bytes(self) -> int:
        """Memory of the exponentials."""
        return sum(tile.exp_TB.nbytes for tile in self.exponentials)

    def times(self, weight: Tensor) -> "Kept":
        """Return the same of the loss times a scalar."""
        return replace(
            self,
            negative_B=self.negative_B * weight,
            positive_P=self.positive_P * weight,
            even_D=None if self.even_D is None else self.even_D * weight,
            pulls=[replace(pull, slope_P=pull.slope_P * weight) for pull in self.pulls],
        )

    def spend(self) -> list[Tensor]:
        """Give up the exponentials, for their memory to be used again; pass 2 can do without."""
        tensors = [tile.exp_TB for tile in self.exponentials]
        self.exponentials.clear()
        return tensors


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch seen from the rows of pass 2.

    Attributes:
        kept: What pass 1 left.
        logits: Its own, whose mask is one of those rows.
        target_P: Place of each own center among the rows of pass 2, or ``NOT_LOCAL``.
        present_n: Which of those rows it sampled; ``None`` for all.
    """

    kept: Kept
    logits: Logits
    target_P: Tensor
    present_n: Tensor | None

    @classmethod
    def of(cls, kept: Kept, row_n: Tensor | None) -> "MicroBatch":
        """Return it as rows ``row_n`` of the shard see it; ``None`` for all."""
        present_n, logits = None, kept.logits
        if logits.mask is not None and kept.row_n is not row_n:
            logits = replace(logits, mask=logits.mask.among(row_n))
        if logits.log_weight_n is not None and kept.row_n is not row_n:
            logits = replace(logits, log_weight_n=_among(logits.log_weight_n, kept.row_n, row_n))
        if kept.row_n is not row_n and row_n is not None and kept.row_n is not None:
            present_n = torch.isin(row_n, kept.row_n)
        return cls(kept, logits, align(kept.target_P, kept.row_n, row_n), present_n)


def _among(value_n: Tensor, sampled_n: Tensor | None, row_n: Tensor | None) -> Tensor:
    """Values of rows ``sampled_n`` as those of their superset ``row_n``, whose others have 0."""
    if sampled_n is None or row_n is None:
        return value_n
    every = value_n.new_zeros(len(row_n))
    every[torch.searchsorted(row_n, sampled_n)] = value_n
    return every


def union(kept: Sequence[Kept]) -> Tensor | None:
    """Return the rows that any micro-batch sampled, int64 [n]; ``None`` for all.

    They are one object where the step's sample was fixed; a GPU is waited for where not.
    """
    rows = kept[0].row_n
    if rows is None or all(one.row_n is rows for one in kept):
        return rows
    sampled = torch.cat([one.row_n for one in kept if one.row_n is not None])
    every_n: Tensor = torch.unique(sampled)
    return every_n


def by_row(target_P: Tensor, batch: int) -> Tensor:
    """Return places of K * B positives as [K, B], where ``batch`` is B."""
    return target_P.unsqueeze(0) if len(target_P) == batch else target_P.view(-1, batch)


def align(target_P: Tensor, sampled_n: Tensor | None, row_n: Tensor | None) -> Tensor:
    """Places among rows ``sampled_n`` as places among their superset ``row_n``."""
    if sampled_n is row_n or row_n is None or sampled_n is None or not len(sampled_n):
        return target_P
    row_P = sampled_n[target_P.clamp(min=0)]
    return torch.where(target_P >= 0, torch.searchsorted(row_n, row_P), target_P)
