"""The margin softmax loss of a global batch and its gradients, by two passes over sharded centers.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import gather_batch, max_over_ranks, sum_over_ranks, sum_to_owner
from partialfc.head.center_losses import CenterTerm, center_loss, inter_class_loss
from partialfc.head.centers import own_centers
from partialfc.head.sampling import NOT_LOCAL, Sample
from partialfc.head.tiles import fused
from partialfc.head.tiles.parts import FirstPass, Kept, Logits
from partialfc.head.tiles.passes import first_pass
from partialfc.keyed import key
from partialfc.margins import Margin, Positive, Rows
from partialfc.numerics import operand_dtype, unit

if TYPE_CHECKING:
    from partialfc.head import PartialFC


class MarginLoss(torch.autograd.Function):
    """Everything that needs other ranks happens in forward; backward only weighs the results."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, anchor: Tensor, identities: Tensor, head: "PartialFC"
    ) -> Tensor:
        """Return the loss; arguments and collectives are those of ``PartialFC.forward``."""
        margin, ranks = head.margin, head.ranks
        state = {name: value.clone() for name, value in head.margin_state().items()}
        want_gradient = anchor.requires_grad
        embedding_bD = embeddings.float()
        unit_bD, reciprocal_b1 = unit(embedding_bD)
        norm_b = torch.linalg.vector_norm(embedding_bD, dim=1)
        gain = margin.gain(norm_b, state)
        query_bD = unit_bD if gain is None else unit_bD * gain.view(-1, 1)
        if margin.bias:
            query_bD = F.pad(query_bD, (0, 1), value=1.0)
        query_BD, identities_B, norm_B = gather_batch(
            query_bD.to(operand_dtype(head.compute)),
            identities,
            norm_b if margin.needs_norms else None,
            ranks,
        )
        head.refuse_foreign(identities_B)
        sample = head.sample(identities_B)
        head.optimizer.catch_up(sample.rows)
        centers_CD, index = head.optimizer.open(sample.rows)
        local = Sample(index, sample.target_B)

        # The positives, in fp32.
        own_BD, target_B = own_centers(centers_CD, local, query_BD, head.centers_per_identity)
        length_B = None
        if margin.unit_centers:
            own_BD, _ = unit(own_BD)
        else:
            length_B = torch.linalg.vector_norm(own_BD, dim=1)
        dot_B = (query_BD.float() * own_BD).sum(1)
        if margin.needs_positives:
            dot_B = sum_over_ranks(dot_B, ranks)
        steps, part = head.optimizer.steps, head.optimizer.micro_batches
        rows = Rows(dot_B, norm_B, length_B, steps, key(head.seed, "margin", steps, part))
        moved = margin.advance(state, rows) if want_gradient else state
        if want_gradient:
            positive = margin.positive(moved, rows)
        else:
            positive = Positive(margin.logit(moved, rows), dot_B)

        # Pass 1, then one sum over ranks makes negatives and positives global.
        logits = Logits(
            scale=margin.scale,
            unit=margin.unit_centers,
            largest=margin.largest_logit,
            compute=head.compute,
            per_identity=head.centers_per_identity,
            bend=margin.bend(moved, rows),
            offset=margin.offset(moved),
            path=head.plan.path,
        )
        negatives = (fused.first_pass if logits.path == "fused" else first_pass)(
            query_BD,
            centers_CD,
            index,
            target_B,
            logits,
            want_pull=ctx.needs_input_grad[0],
            want_key_sum=margin.label_smoothing > 0,
            keep_bytes=head.keep_bytes - head.optimizer.kept_bytes if want_gradient else 0,
            workspace=head.optimizer.workspace,
        )
        local_B = target_B != NOT_LOCAL
        total = _sum(head, negatives, positive, rows, local_B, query_BD)
        if logits.offset is None:
            push = _push(margin, total, norm_B, want_gradient)
        else:
            push = _binary_push(margin, total, logits.offset)
        loss = push.loss_B.mean()
        beside = _beside(head, query_BD, own_BD, target_B, centers_CD, local, logits)
        for weight, term in beside.values():
            loss = loss + weight * term.loss
        head.terms = {name: term.loss for name, (_, term) in beside.items()}
        if not want_gradient:
            return loss

        # A batch without a finite loss leaves no trace.
        finite = loss.isfinite()
        learned_B = total.sum_B if total.sigmoid_B is None else total.sigmoid_B
        moved = margin.learn(moved, learned_B, total.logit_B)
        for name, value in head.margin_state().items():
            value.copy_(torch.where(finite, moved[name], value))

        # What a positive adds to the gradients: of its own query and of its own key.
        slope_B = torch.where(local_B, positive.slope_B * push.positive_B + push.even_B, 0.0)
        positive_B, positive_BD = slope_B, query_BD
        if positive.length_slope_B is not None:
            along_B1 = (positive.length_slope_B * push.positive_B).unsqueeze(1)
            positive_BD = query_BD * slope_B.unsqueeze(1) + unit(own_BD)[0] * along_B1
            positive_B = torch.where(local_B, 1.0, 0.0)
        ctx.head, ctx.finite = head, finite
        ctx.kept = Kept(
            query_BD=query_BD,
            rows=sample.rows,
            target_B=target_B,
            logits=logits,
            maximum_B=total.maximum_B,
            negative_B=push.negative_B,
            positive_B=positive_B,
            positive_BD=positive_BD,
            even_D=push.even_B @ query_BD.float() if margin.label_smoothing else None,
            exponentials=negatives.exponentials,
            pulls=[
                replace(pull, slope_P=pull.slope_P * weight)
                for weight, term in beside.values()
                for pull in term.pulls
            ],
        )
        if ctx.needs_input_grad[0]:
            pull_BD = negatives.pull_BD
            assert pull_BD is not None
            pull_BD.mul_(push.negative_B.unsqueeze(1)).addcmul_(own_BD, slope_B.unsqueeze(1))
            if negatives.key_sum_D is not None:
                pull_BD.addcmul_(push.even_B.unsqueeze(1), negatives.key_sum_D, value=-1)
            for weight, term in beside.values():
                if term.by_query_BD is not None:
                    pull_BD.add_(term.by_query_BD, alpha=weight)
            pull_bD = sum_to_owner(pull_BD, ranks)[:, : unit_bD.shape[1]]
            if margin.unit_embeddings:
                along_b1 = (pull_bD * unit_bD).sum(1, keepdim=True)
                pull_bD = (pull_bD - unit_bD * along_b1) * reciprocal_b1
                pull_bD = pull_bD if gain is None else pull_bD * gain
            if push.norm_B is not None:
                mine = slice(ranks.rank * len(unit_bD), (ranks.rank + 1) * len(unit_bD))
                pull_bD = pull_bD + unit_bD * push.norm_B[mine].unsqueeze(1)
            ctx.save_for_backward(pull_bD * ranks.size)
            ctx.dtype = embeddings.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Hand the micro-batch to the head's optimizer; return the embeddings' gradient."""
        ctx.head.optimizer.add_micro_batch(ctx.kept, weight, ctx.finite)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (gradient_bD,) = ctx.saved_tensors
        return (gradient_bD * weight).to(ctx.dtype), None, None, None


def _beside(
    head: "PartialFC",
    query_BD: Tensor,
    own_BD: Tensor,
    target_B: Tensor,
    centers_CD: Tensor,
    sample: Sample,
    logits: Logits,
) -> dict[str, tuple[float, CenterTerm]]:
    """The losses beside the softmax that the head asks for, with their weights."""
    terms = {}
    if head.center_weight:
        term = center_loss(query_BD, own_BD, target_B, head.embedding_dim, head.ranks)
        terms["center"] = head.center_weight, term
    if head.inter_class_weight:
        workspace = head.optimizer.workspace
        term = inter_class_loss(own_BD, target_B, centers_CD, sample, logits, workspace, head.ranks)
        terms["inter_class"] = head.inter_class_weight, term
    return terms


@dataclass(frozen=True, slots=True)
class _Total:
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


def _sum(
    head: "PartialFC",
    negatives: FirstPass,
    positive: Positive,
    rows: Rows,
    local_B: Tensor,
    query_BD: Tensor,
) -> _Total:
    """Sum over ranks: one all-reduce, and one before it for the row maximum if there is one."""
    sum_B, maximum_B = negatives.sum_B, None
    if negatives.maximum_B is not None:
        maximum_B = max_over_ranks(negatives.maximum_B.clone(), head.ranks)
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
        own_B = torch.where(local_B, rows.dot_B, 0.0)
        parts["even"] = head.margin.scale * (query_BD.float() @ negatives.key_sum_D - own_B)
        parts["count"] = torch.full_like(sum_B, negatives.rows / head.centers_per_identity)
    summed = sum_over_ranks(torch.stack(list(parts.values())), head.ranks).unbind()
    total = dict(zip(parts, summed, strict=True))
    count = total.get("count")
    return _Total(
        total["sum"],
        total.get("sigmoid"),
        maximum_B,
        total["logit"],
        total.get("norm"),
        total.get("even"),
        None if count is None else count[0],
    )


@dataclass(frozen=True, slots=True)
class _Push:
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


def _push(margin: Margin, total: _Total, norm_B: Tensor | None, want_gradient: bool) -> _Push:
    """loss = log(sum + e^logit) - logit, written so that a tiny loss keeps its digits."""
    sum_B, logit_B, batch = total.sum_B, total.logit_B, len(total.sum_B)
    odds_B = sum_B.log() - logit_B
    if total.maximum_B is not None:
        odds_B = odds_B + total.maximum_B
    loss_B = F.softplus(odds_B)
    wrong_B = odds_B.sigmoid() / batch
    # p of a negative is exp(logit - maximum) / sum * sigmoid(odds).
    negative_B = torch.where(sum_B > 0, margin.scale * wrong_B / sum_B, 0.0)
    positive_B, even_B = -wrong_B, torch.zeros_like(wrong_B)
    smoothing = margin.label_smoothing
    if total.even_B is not None and total.count is not None:
        share = smoothing / total.count
        loss_B = loss_B + smoothing * logit_B - share * (total.even_B + logit_B)
        positive_B = positive_B + (smoothing - share) / batch
        even_B = even_B + margin.scale * share / batch
    norm_slope_B = None
    if total.norm_slope_B is not None:
        norm_slope_B = positive_B * total.norm_slope_B
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
    return _Push(loss_B, negative_B, positive_B, even_B, norm_slope_B)


def _binary_push(margin: Margin, total: _Total, offset: Tensor) -> _Push:
    """loss = log(1 + e^(offset - logit)) + the losses of the negatives."""
    short_B, batch = offset - total.logit_B, len(total.logit_B)
    return _Push(
        F.softplus(short_B) + total.sum_B,
        torch.full_like(short_B, margin.scale / batch),
        -short_B.sigmoid() / batch,
        torch.zeros_like(short_B),
        None,
    )
