"""From the sums of all ranks to the loss of each row and its derivatives.

Shape suffixes: B = rows of the gathered batch, D = query.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import max_over_ranks, sum_over_ranks
from partialfc.head.batch import Batch
from partialfc.head.tiles.parts import FirstPass
from partialfc.margins import Margin, Positive


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the sampled centers of all ranks, the same on every rank.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the negatives; with an offset, of their losses.
        sigmoid_B: Sum of sigmoid(logit - offset); ``None`` without an offset.
        maximum_B: Largest negative logit, or ``None`` for 0.
        logit_B: The positive's logit.
        norm_slope_B: Its slope by the norm, or ``None``.
        even_B: Sum of the negatives' logits; ``None`` without label smoothing.
        count: Scalar, identities sampled; ``None`` without label smoothing.
    """

    sum_B: Tensor
    sigmoid_B: Tensor | None
    maximum_B: Tensor | None
    logit_B: Tensor
    norm_slope_B: Tensor | None
    even_B: Tensor | None
    count: Tensor | None


def sums_of(
    batch: Batch, negatives: FirstPass, positive: Positive, dot_B: Tensor, local_B: Tensor
) -> Sums:
    """Sum over ranks: one all-reduce, and one before it for the row maximum if there is one.

    Args:
        batch: Of all ranks.
        negatives: This rank's, of pass 1; their pull becomes relative to the maximum of all ranks.
        positive: Logit and slopes.
        dot_B: fp32 product of each query and its own key.
        local_B: Whether this rank has that key.
    """
    sum_B, maximum_B, margin = negatives.sum_B, None, batch.margin
    if negatives.maximum_B is not None:
        maximum_B = max_over_ranks(negatives.maximum_B.clone(), batch.ranks)
        shrink_B = (negatives.maximum_B - maximum_B).exp()
        sum_B = sum_B * shrink_B
        if negatives.pull_BD is not None:
            negatives.pull_BD.mul_(shrink_B.unsqueeze(1))
    parts = {"sum": sum_B, "logit": torch.where(local_B, positive.logit_B, 0.0)}
    if negatives.sigmoid_B is not None:
        parts["sigmoid"] = negatives.sigmoid_B
    if positive.norm_slope_B is not None:
        parts["norm"] = torch.where(local_B, positive.norm_slope_B, 0.0)
    if negatives.key_sum_D is not None:
        own_B = torch.where(local_B, dot_B, 0.0)
        parts["even"] = margin.scale * (batch.query_BD.float() @ negatives.key_sum_D - own_B)
        parts["count"] = torch.full_like(sum_B, negatives.rows / margin.centers_per_identity)
    summed = sum_over_ranks(torch.stack(list(parts.values())), batch.ranks).unbind()
    total = dict(zip(parts, summed, strict=True))
    count = total.get("count")
    return Sums(
        total["sum"],
        total.get("sigmoid"),
        maximum_B,
        total["logit"],
        total.get("norm"),
        total.get("even"),
        None if count is None else count[0],
    )


@dataclass(frozen=True, slots=True)
class Push:
    """The loss of each row, and its derivatives divided by the size of the batch.

    Attributes:
        loss_B: Cross-entropy, and what the margin adds.
        negative_B: Factor of exp(logit - maximum) that makes it the derivative by the product.
        positive_B: By the positive's logit.
        even_B: Taken off the derivative by every product: label smoothing's share.
        norm_B: By the norm of the embedding at a fixed product, or ``None``.
    """

    loss_B: Tensor
    negative_B: Tensor
    positive_B: Tensor
    even_B: Tensor
    norm_B: Tensor | None


def push_of(batch: Batch, sums: Sums, offset: Tensor | None) -> Push:
    """Return the push of one softmax; with an offset, that of a loss for every center."""
    if offset is not None:
        return _binary(batch.margin, sums, offset)
    return _softmax(batch.margin, sums, batch.norm_B, batch.want_gradient)


def _softmax(margin: Margin, sums: Sums, norm_B: Tensor | None, want_gradient: bool) -> Push:
    """loss = log(sum + e^logit) - logit, written so that a tiny loss keeps its digits."""
    sum_B, logit_B, batch = sums.sum_B, sums.logit_B, len(sums.sum_B)
    odds_B = sum_B.log() - logit_B
    if sums.maximum_B is not None:
        odds_B = odds_B + sums.maximum_B
    loss_B = F.softplus(odds_B)
    wrong_B = odds_B.sigmoid() / batch
    # p of a negative is exp(logit - maximum) / sum * sigmoid(odds).
    negative_B = torch.where(sum_B > 0, margin.scale * wrong_B / sum_B, 0.0)
    positive_B, even_B = -wrong_B, torch.zeros_like(wrong_B)
    smoothing = margin.label_smoothing
    if sums.even_B is not None and sums.count is not None:
        share = smoothing / sums.count
        loss_B = loss_B + smoothing * logit_B - share * (sums.even_B + logit_B)
        positive_B = positive_B + (smoothing - share) / batch
        even_B = even_B + margin.scale * share / batch
    norm_slope_B = None
    if sums.norm_slope_B is not None:
        norm_slope_B = positive_B * sums.norm_slope_B
    if norm_B is not None and not want_gradient:
        penalty_B = margin.penalty(norm_B)
        loss_B = loss_B if penalty_B is None else loss_B + penalty_B
    elif norm_B is not None:
        with torch.enable_grad():
            norm_B = norm_B.detach().requires_grad_()
            penalty_B = margin.penalty(norm_B)
            if penalty_B is not None:
                loss_B = loss_B + penalty_B.detach()
                (slope_B,) = torch.autograd.grad(penalty_B.sum() / batch, norm_B)
                norm_slope_B = slope_B if norm_slope_B is None else norm_slope_B + slope_B
    return Push(loss_B, negative_B, positive_B, even_B, norm_slope_B)


def _binary(margin: Margin, sums: Sums, offset: Tensor) -> Push:
    """loss = log(1 + e^(offset - logit)) + the losses of the negatives."""
    short_B, batch = offset - sums.logit_B, len(sums.logit_B)
    return Push(
        F.softplus(short_B) + sums.sum_B,
        torch.full_like(short_B, margin.scale / batch),
        -short_B.sigmoid() / batch,
        torch.zeros_like(short_B),
        None,
    )
