"""Whom the rows of a batch name: one identity each, several, or none.

A row and one of its positives are a pair. Pairs go through the head as rows do: pair k * B + b is
the k-th positive of row b, so that all rows lie side by side and no embedding is copied.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, K = identities of a
row, P = K * B pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.head.options import Several, SeveralLoss
from partialfc.margins import RowMeans

NONE = -1
"""In the place of an identity: none."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The pairs of the gathered batch, and what each counts for.

    Attributes:
        most: K.
        loss: Of :class:`partialfc.head.options.Several`.
        means: Over positives and rows.
        named_KB: Where there is a positive, or what stands for one in a row of none; ``None``:
            everywhere.
    """

    most: int
    loss: SeveralLoss
    means: RowMeans
    named_KB: Tensor | None

    @classmethod
    def single(cls, rows: int) -> "Labels":
        """Return the labels of rows with one identity each."""
        return cls(1, "mean", RowMeans(None, None, None, rows), None)

    @classmethod
    def of(
        cls,
        identities_BK: Tensor,
        weights_BK: Tensor | None,
        several: Several,
        *,
        binary: bool,
        fraction: Tensor | None = None,
    ) -> "Labels":
        """Return the labels of rows with several identities or none.

        Args:
            identities_BK: int64 as :func:`distinct` leaves them.
            weights_BK: fp32, where the loss is ``"soft"``.
            several: What they are to the loss.
            binary: Whether each center is a question of its own: a row of no identity then needs
                nothing in the place of a positive.
            fraction: Of the rows that name anyone, in the step that these are a part of; ``None``:
                of these.
        """
        present_KB = (identities_BK != NONE).T.contiguous()
        has_B, named_KB = present_KB.any(0), present_KB
        if not binary:
            named_KB = present_KB.clone()
            named_KB[0] |= ~has_B
        share_KB = named_KB.float()
        if several.loss == "mean":
            share_KB = share_KB / share_KB.sum(0).clamp(min=1)
        elif weights_BK is not None:
            share_KB = torch.where(present_KB, weights_BK.T, share_KB)
        if several.without == "push":
            means = RowMeans(share_KB, present_KB, None, len(has_B))
        else:
            counted_B = has_B.float()
            rows = counted_B.sum() if fraction is None else fraction * len(has_B)
            rows = torch.where(rows > 0, rows, 1.0)
            means = RowMeans(share_KB * counted_B, present_KB, counted_B, rows)
        return cls(several.most, several.loss, means, named_KB)


def distinct(identities: Tensor, weights: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """Return identities [b, K] and weights [b, K] in which a row names no one twice.

    An identity that is named again, or has a weight of 0, gives way to ``NONE``; the weights of
    one identity are added, and those of none are 0.

    Args:
        identities: int64 [b] or [b, at most K].
        weights: Of the same shape, any float dtype; or ``None``.
        most: K.
    """
    identities_bK = filled(identities, most)
    same_bKK = identities_bK.unsqueeze(2) == identities_bK.unsqueeze(1)
    again_bK = same_bKK.tril(-1).any(2)
    if weights is None:
        return identities_bK.masked_fill(again_bK, NONE), None
    weights_bK = _widened(weights.float(), most, 0.0)
    weights_bK = torch.where(weights_bK >= 0, weights_bK, torch.nan)  # lest a sum hide it
    weights_bK = torch.where(identities_bK == NONE, 0.0, weights_bK)
    weights_bK = torch.where(same_bKK, weights_bK.unsqueeze(1), 0.0).sum(2)
    weights_bK = weights_bK.masked_fill(again_bK, 0.0)
    return identities_bK.masked_fill(again_bK | (weights_bK == 0), NONE), weights_bK


def filled(identities: Tensor, most: int) -> Tensor:
    """Return identities [b, K], filled up with ``NONE``.

    Raises:
        ValueError: If a row has more than K.
    """
    if identities.ndim not in (1, 2) or identities.shape[1:].numel() > most:
        raise ValueError(
            f"identities must be [any] or [any, 1 to {most}], got {list(identities.shape)}. Rows "
            "of K identities want positives=Several(most=K)."
        )
    return _widened(identities, most, NONE)


def _widened(value: Tensor, most: int, filling: float) -> Tensor:
    """Return numbers [b] or [b, at most K] as [b, K]."""
    value = value.unsqueeze(1) if value.ndim == 1 else value
    missing = most - value.shape[1]
    return F.pad(value, (0, missing), value=filling) if missing else value


def refuse_weights(weights_BK: Tensor) -> None:
    """Refuse weights that are negative or not finite, on all ranks together.

    Args:
        weights_BK: As :func:`distinct` leaves them: NaN where one was negative.

    Raises:
        ValueError: If there is one; on a GPU, a device-side assertion fails instead.
    """
    bad_BK = ~weights_BK.isfinite()
    if bad_BK.device.type != "cpu":
        torch._assert_async(~bad_BK.any(), "a weight is negative or not finite")
    elif bad_BK.any():
        row = int(bad_BK.nonzero()[0][0])
        raise ValueError(
            f"weights must be >= 0 and finite, and one in row {row} of the global batch is not."
        )
