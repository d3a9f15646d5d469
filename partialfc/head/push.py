"""From the sums of all ranks to the loss of each row and its derivatives.

Shape suffixes: B = rows of the gathered batch, D = query, K = positives of a row, P = K * B pairs
of a row and one of its positives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import max_over_ranks, sum_over_ranks
from partialfc.head.batch import Batch
from partialfc.head.several import Labels
from partialfc.head.tiles.parts import FirstPass
from partialfc.margins import Positive


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the sampled centers of all ranks, the same on every rank.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the negatives; with an offset, of their losses.
        sigmoid_B: Sum of sigmoid(logit - offset); ``None`` without an offset.
        maximum_B: Largest negative logit, or ``None`` for 0.
        logit_KB: The positives' logits; 0 where there is none.
        norm_slope_KB: Their slopes by the norm, or ``None``.
        even_B: Sum of the negatives' logits; ``None`` without label smoothing.
        count: Scalar, identities sampled; ``None`` without label smoothing.
    """

    sum_B: Tensor
    sigmoid_B: Tensor | None
    maximum_B: Tensor | None
    logit_KB: Tensor
    norm_slope_KB: Tensor | None
    even_B: Tensor | None
    count: Tensor | None


def sums_of(
    batch: Batch, negatives: FirstPass, positive: Positive, dot_P: Tensor, local_P: Tensor
) -> Sums:
    """Sum over ranks: one all-reduce, and one before it for the row maximum if there is one.

    Args:
        batch: Of all ranks.
        negatives: This rank's, of pass 1; their pull becomes relative to the maximum of all ranks.
        positive: Logit and slopes of each pair.
        dot_P: fp32 product of its query and key.
        local_P: Whether this rank has that key.
    """
    sum_B, maximum_B, margin = negatives.sum_B, None, batch.margin
    size = batch.labels.most, len(sum_B)
    if negatives.maximum_B is not None:
        maximum_B = max_over_ranks(negatives.maximum_B.clone(), batch.ranks)
        shrink_B = (negatives.maximum_B - maximum_B).exp()
        sum_B = sum_B * shrink_B
        if negatives.pull_BD is not None:
            negatives.pull_BD.mul_(shrink_B.unsqueeze(1))
    parts = {"sum": sum_B, "logit": torch.where(local_P, positive.logit_B, 0.0)}
    if negatives.sigmoid_B is not None:
        parts["sigmoid"] = negatives.sigmoid_B
    if positive.norm_slope_B is not None:
        parts["norm"] = torch.where(local_P, positive.norm_slope_B, 0.0)
    if negatives.key_sum_D is not None:
        own_B = torch.where(local_P, dot_P, 0.0).view(size).sum(0)
        parts["even"] = margin.scale * (batch.query_BD.float() @ negatives.key_sum_D - own_B)
        parts["count"] = torch.full_like(sum_B, negatives.rows / margin.centers_per_identity)
    total = parts
    if batch.ranks.size > 1:
        summed = sum_over_ranks(torch.cat(list(parts.values())), batch.ranks)
        lengths = [len(part) for part in parts.values()]
        total = dict(zip(parts, torch.split(summed, lengths), strict=True))
    norm_P, count = total.get("norm"), total.get("count")
    return Sums(
        total["sum"],
        total.get("sigmoid"),
        maximum_B,
        total["logit"].view(size),
        None if norm_P is None else norm_P.view(size),
        total.get("even"),
        None if count is None else count[0],
    )


@dataclass(frozen=True, slots=True)
class Push:
    """The loss of each row, and its derivatives divided by the number of rows that count.

    Attributes:
        loss_B: Cross-entropy, and what the margin adds.
        negative_B: Factor of exp(logit - maximum) that makes it the derivative by the product.
        positive_KB: By the positives' logits.
        even_B: Taken off the derivative by every product, label smoothing's share; ``None``
            without it.
        norm_B: By the norm of the embedding at a fixed product, or ``None``.
    """

    loss_B: Tensor
    negative_B: Tensor
    positive_KB: Tensor
    even_B: Tensor | None
    norm_B: Tensor | None


def push_of(batch: Batch, sums: Sums, offset: Tensor | None) -> Push:
    """Return the push of one softmax; with an offset, that of a loss for every center."""
    if offset is not None:
        return _binary(batch, sums, offset)
    return _softmax(batch, sums)


def _softmax(batch: Batch, sums: Sums) -> Push:
    margin, means, sum_B = batch.margin, batch.labels.means, sums.sum_B
    of_rows = _each if batch.labels.loss == "mean" else _together
    loss_B, wrong_B, positive_KB = of_rows(batch.labels, sums)
    # p of a negative is exp(logit - maximum) / sum * wrong.
    wrong_B, positive_KB = wrong_B / means.rows, positive_KB / means.rows
    negative_B = torch.where(sum_B > 0, margin.scale * wrong_B / sum_B, 0.0)
    even_B = None
    if sums.even_B is not None and sums.count is not None:
        smoothing, logit_KB = margin.label_smoothing, sums.logit_KB
        share_B = _even_share(batch.labels, smoothing, sums.count)
        smoothed_KB = smoothing * logit_KB
        loss_B = loss_B + means.of_positives(smoothed_KB)
        loss_B = loss_B - means.of_positives(share_B * (sums.even_B + logit_KB))
        pull_KB = means.shared(smoothing - share_B.expand_as(logit_KB))
        positive_KB = positive_KB + pull_KB / means.rows
        every_B = torch.zeros_like(wrong_B) + margin.scale * share_B / means.rows
        even_B = means.counted(every_B)
    norm_slope_B = None
    if sums.norm_slope_KB is not None:
        norm_slope_B = (positive_KB * sums.norm_slope_KB).sum(0)
    if batch.norm_B is not None:
        penalty_B, slope_B = _penalty(batch, batch.norm_B)
        loss_B = loss_B if penalty_B is None else loss_B + penalty_B
        if slope_B is not None:
            norm_slope_B = slope_B if norm_slope_B is None else norm_slope_B + slope_B
    return Push(loss_B, negative_B, positive_KB, even_B, norm_slope_B)


def _each(labels: Labels, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every positive as if it were the only one, the mean of a row: loss [B] and its
    derivatives by the logarithm of the negatives' sum [B] and by the positives' logits [K, B].

    loss = log(sum + e^logit) - logit, written so that a tiny loss keeps its digits.
    """
    odds_KB = sums.sum_B.log() - sums.logit_KB
    if sums.maximum_B is not None:
        odds_KB = odds_KB + sums.maximum_B
    wrong_KB, means = odds_KB.sigmoid(), labels.means
    loss_B = means.of_positives(F.softplus(odds_KB))
    return loss_B, means.of_positives(wrong_KB), -means.shared(wrong_KB)


def _together(labels: Labels, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one softmax with all positives of a row in it; returns what :func:`_each` does.

    With p the probability of all positives together and q of each among them, the loss of a row is
    -log p, or -sum of weight * log(p q).
    """
    assert labels.named_KB is not None and labels.means.share_KB is not None  # noqa: PT018
    every_B = torch.where(labels.named_KB, sums.logit_KB, -torch.inf).logsumexp(0)
    apart_KB = torch.where(labels.named_KB, every_B - sums.logit_KB, 0.0)  # -log q
    share_KB = torch.where(labels.named_KB, (-apart_KB).exp(), 0.0)
    odds_B = sums.sum_B.log() - every_B
    if sums.maximum_B is not None:
        odds_B = odds_B + sums.maximum_B
    weight_KB = labels.means.share_KB
    if labels.loss == "any":
        wrong_B = labels.means.counted(odds_B.sigmoid())
        return labels.means.counted(F.softplus(odds_B)), wrong_B, -share_KB * wrong_B
    total_B = weight_KB.sum(0)
    wrong_B = total_B * odds_B.sigmoid()
    loss_B = total_B * F.softplus(odds_B) + (weight_KB * apart_KB).sum(0)
    return loss_B, wrong_B, total_B * share_KB - weight_KB - share_KB * wrong_B


def _even_share(labels: Labels, smoothing: float, count: Tensor) -> Tensor:
    """Label smoothing's share of each of the centers that a positive is told from, and of its own:
    a scalar, or [B] where rows have several."""
    present_KB = labels.means.present_KB
    if present_KB is None:
        return smoothing / count
    own_B = present_KB.sum(0)
    return torch.where(own_B > 0, smoothing / (count - (own_B - 1)), 0.0)


def _penalty(batch: Batch, norm_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the norms add to the loss of each row, and the slope of its mean by them."""
    margin, means = batch.margin, batch.labels.means
    if not batch.want_gradient:
        return margin.penalty(norm_B), None
    with torch.enable_grad():
        norm_B = norm_B.detach().requires_grad_()
        penalty_B = margin.penalty(norm_B)
        if penalty_B is None:
            return None, None
        (slope_B,) = torch.autograd.grad(means.counted(penalty_B).sum() / means.rows, norm_B)
    return penalty_B.detach(), slope_B


def _binary(batch: Batch, sums: Sums, offset: Tensor) -> Push:
    """loss = log(1 + e^(offset - logit)) + the losses of the negatives."""
    means, short_KB = batch.labels.means, offset - sums.logit_KB
    return Push(
        means.of_positives(F.softplus(short_KB)) + sums.sum_B,
        means.counted(torch.ones_like(sums.sum_B) * (batch.margin.scale / means.rows)),
        -means.shared(short_KB.sigmoid()) / means.rows,
        None,
        None,
    )
