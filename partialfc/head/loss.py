"""The margin softmax loss of a global batch and its gradients, by two passes over sharded centers.

:func:`margin_loss` reads as the data flows: positives, pass 1 over the negatives, sums over ranks,
the loss of each row and its derivatives, and what the two gradients need of all that.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, A = those of all
copies of the centers, C = rows of the centers at hand, D = embedding, and in a query its bias, n =
sampled rows, K = positives of a row, P = K * B pairs of a row and one of its positives, or other
keys that are pulled, 1 = one a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.ranks import sum_over_ranks, sum_to_owner
from partialfc.head.batch import Batch
from partialfc.head.center_losses import CenterTerm, center_loss, inter_class_loss
from partialfc.head.centers import own_centers
from partialfc.head.push import Push, Sums, push_of, sums_of
from partialfc.head.sampling import NOT_LOCAL
from partialfc.head.tiles import fused, passes
from partialfc.head.tiles.parts import FirstPass, Kept, Logits
from partialfc.margins import Positive, Rows, State
from partialfc.numerics import is_finite, unit

Remember = Callable[[Kept, Tensor, Tensor], None]
"""Takes what pass 2 needs, the gradient of the loss that backward was given, and whether the loss
is finite: :meth:`partialfc.head.rows.optimizer.RowOptimizer.add_micro_batch`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a forward pass leaves; everything that needs other ranks is done.

    Attributes:
        loss: fp32 scalar, the same on all ranks.
        terms: Losses beside the softmax by name, without their weights.
        finite: Scalar bool, whether the loss is; the last four are ``None`` without a gradient.
        state: What the margin remembers from now on, if the loss is finite.
        kept: For pass 2.
        gradient_bD: fp32 gradient of this rank's embeddings times the number of ranks; ``None`` if
            not wanted.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    finite: Tensor | None = None
    state: State | None = None
    kept: Kept | None = None
    gradient_bD: Tensor | None = None


class MarginLoss(torch.autograd.Function):
    """The loss of an outcome, whose gradients are known: backward only weighs them."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, anchor: Tensor, outcome: Outcome, remember: Remember
    ) -> Tensor:
        """Return the loss; ``anchor`` makes backward come where embeddings want no gradient."""
        ctx.remember, ctx.kept, ctx.finite = remember, outcome.kept, outcome.finite
        ctx.dtype = embeddings.dtype
        if outcome.gradient_bD is not None:
            ctx.save_for_backward(outcome.gradient_bD)
        return outcome.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Hand the micro-batch to the head's optimizer; return the embeddings' gradient."""
        ctx.remember(ctx.kept, weight, ctx.finite)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (gradient_bD,) = ctx.saved_tensors
        return (gradient_bD * weight).to(ctx.dtype), None, None, None


def margin_loss(batch: Batch) -> Outcome:
    """Return the loss and everything for its gradients; the collectives of ``PartialFC.forward``
    but for the gathering."""
    margin = batch.margin
    own = _own(batch)
    state = margin.advance(batch.state, own.first) if batch.want_gradient else batch.state
    if batch.want_gradient:
        positive = margin.positive(state, own.rows)
    else:
        positive = Positive(margin.logit(state, own.rows), own.rows.dot_B)
    positive = batch.across_copies.own(positive)
    logits = _logits(batch, own, state)
    negatives = _first_pass(batch, own, logits)
    sums = sums_of(batch, negatives, positive, own.dot_P, own.local_P)
    push = push_of(batch, sums, logits.offset)
    means = batch.labels.means
    loss = means.of_rows(push.loss_B)
    terms = _center_terms(batch, own, logits)
    for weight, term in terms.values():
        loss = loss + weight * term.loss
    loss, *each = batch.across_copies.mean([loss, *(term.loss for _, term in terms.values())])
    found = dict(zip(terms, each, strict=True))
    if not batch.want_gradient:
        return Outcome(loss, found)

    learned_B = sums.sum_B if sums.sigmoid_B is None else sums.sigmoid_B
    slope_P = positive.slope_B * push.positive_KB.flatten()
    if push.even_B is not None:
        slope_P = slope_P + push.even_B.repeat(batch.labels.most)
    slope_P = torch.where(own.local_P, slope_P, 0.0)
    return Outcome(
        loss,
        found,
        is_finite(loss),
        batch.across_copies.learn(margin, state, learned_B, sums.logit_KB, means),
        _kept(batch, own, positive, slope_P, logits, negatives, sums, push, terms),
        _gradient(batch, own, slope_P, negatives, push, terms) if batch.want_pull else None,
    )


@dataclass(frozen=True, slots=True)
class _Own:
    """The class center of each pair.

    Attributes:
        key_PD: fp32, of unit length where the margin has it so; 0 where another rank has it.
        target_P: Its place among the sampled, or ``NOT_LOCAL``.
        local_P: Whether this rank has it.
        dot_P: fp32 product of each query and that key; 0 where another rank has it, unless the
            margin needs it.
        rows: What the margin may know of the pairs, those of all copies of the centers.
        first: The same of the rows, each with its first positive.
    """

    key_PD: Tensor
    target_P: Tensor
    local_P: Tensor
    dot_P: Tensor
    rows: Rows
    first: Rows


def _own(batch: Batch) -> _Own:
    """Multiply each query and its own keys, in fp32."""
    margin, query_BD, norm_B, most = batch.margin, batch.query_BD, batch.norm_B, batch.labels.most
    key_PD, target_P = own_centers(
        batch.centers_CD, batch.rows, batch.target_P, query_BD, margin.centers_per_identity
    )
    length_P = None
    if margin.unit_centers:
        key_PD, _ = unit(key_PD)
    else:
        length_P = torch.linalg.vector_norm(key_PD, dim=1)
    dot_P = (query_BD.float() * key_PD.view(most, *query_BD.shape)).sum(2).flatten()
    if margin.needs_positives:
        dot_P = sum_over_ranks(dot_P, batch.ranks)
    norm_P = None if norm_B is None else norm_B.repeat(most)
    rows = batch.across_copies.of(Rows(dot_P, norm_P, length_P, batch.step, batch.draw_key))
    count = len(rows.dot_B) // most
    norm_A = None if rows.norm_B is None else rows.norm_B[:count]
    first = replace(rows, dot_B=rows.dot_B[:count], norm_B=norm_A)
    return _Own(key_PD, target_P, target_P != NOT_LOCAL, dot_P, rows, first)


def _logits(batch: Batch, own: _Own, state: State) -> Logits:
    margin = batch.margin
    bend = margin.bend(state, own.first)
    return Logits(
        scale=margin.scale,
        unit=margin.unit_centers,
        largest=margin.largest_logit,
        compute=batch.compute,
        per_identity=margin.centers_per_identity,
        bend=None if bend is None else batch.across_copies.own(bend),
        offset=margin.offset(state),
        mask=batch.mask,
        log_weight_n=batch.log_weight_n,
        path=batch.path,
    )


def _first_pass(batch: Batch, own: _Own, logits: Logits) -> FirstPass:
    first_pass = fused.first_pass if batch.path == "fused" else passes.first_pass
    return first_pass(
        batch.query_BD,
        batch.centers_CD,
        batch.rows,
        own.target_P,
        logits,
        want_pull=batch.want_pull,
        want_key_sum=batch.margin.label_smoothing > 0,
        keep_bytes=batch.keep_bytes,
        workspace=batch.workspace,
    )


Terms = dict[str, tuple[float, CenterTerm]]
"""Losses on class centers by name, with their weights."""


def _center_terms(batch: Batch, own: _Own, logits: Logits) -> Terms:
    terms: Terms = {}
    if batch.center_weight:
        dim = batch.queries.unit_bD.shape[1]
        term = center_loss(batch.query_BD, own.key_PD, own.target_P, dim, batch.ranks)
        terms["center"] = batch.center_weight, term
    if batch.inter_class_weight:
        term = inter_class_loss(
            own.key_PD,
            own.target_P,
            batch.centers_CD,
            batch.rows,
            batch.target_P,
            logits,
            batch.workspace,
            batch.ranks,
        )
        terms["inter_class"] = batch.inter_class_weight, term
    return terms


def _kept(
    batch: Batch,
    own: _Own,
    positive: Positive,
    slope_P: Tensor,
    logits: Logits,
    negatives: FirstPass,
    sums: Sums,
    push: Push,
    terms: Terms,
) -> Kept:
    """What pass 2 needs; ``slope_P`` is the derivative of the loss by the pairs' products."""
    query_BD = batch.query_BD
    positive_P, positive_BD = slope_P, query_BD
    if positive.length_slope_B is not None:
        along_P1 = (positive.length_slope_B * push.positive_KB.flatten()).unsqueeze(1)
        positive_BD = query_BD.repeat(batch.labels.most, 1) * slope_P.unsqueeze(1)
        positive_BD = positive_BD + unit(own.key_PD)[0] * along_P1
        positive_P = torch.where(own.local_P, 1.0, 0.0)
    return Kept(
        query_BD=query_BD,
        row_n=batch.rows.row_n,
        target_P=own.target_P,
        logits=logits,
        maximum_B=sums.maximum_B,
        negative_B=push.negative_B,
        positive_P=positive_P,
        positive_BD=positive_BD,
        even_D=None if push.even_B is None else push.even_B @ query_BD.float(),
        exponentials=negatives.exponentials,
        pulls=[
            replace(pull, slope_P=pull.slope_P * weight)
            for weight, term in terms.values()
            for pull in term.pulls
        ],
    )


def _gradient(
    batch: Batch, own: _Own, slope_P: Tensor, negatives: FirstPass, push: Push, terms: Terms
) -> Tensor:
    """The gradient of this rank's embeddings [b, D], times the number of ranks: one reduce-scatter
    of [B, D] in ``reduce_dtype``. The pull of pass 1 is used up."""
    pull_BD, ranks, queries = negatives.pull_BD, batch.ranks, batch.queries
    assert pull_BD is not None
    pull_BD.mul_(push.negative_B.unsqueeze(1))
    parts = (torch.split(part, len(pull_BD)) for part in (own.key_PD, slope_P))
    for key_BD, slope_B in zip(*parts, strict=True):
        pull_BD.addcmul_(key_BD, slope_B.unsqueeze(1))
    if negatives.key_sum_D is not None and push.even_B is not None:
        pull_BD.addcmul_(push.even_B.unsqueeze(1), negatives.key_sum_D, value=-1)
    for weight, term in terms.values():
        if term.by_query_BD is not None:
            pull_BD.add_(term.by_query_BD, alpha=weight)
    unit_bD = queries.unit_bD
    if ranks.size > 1:  # a rank alone has nothing to send, and rounds nothing
        pull_BD = pull_BD.to(batch.reduce_dtype)
    pull_bD = sum_to_owner(pull_BD, ranks, batch.shares)[:, : unit_bD.shape[1]].float()
    if batch.margin.unit_embeddings:
        along_b1 = (pull_bD * unit_bD).sum(1, keepdim=True)
        pull_bD = (pull_bD - unit_bD * along_b1) * queries.reciprocal_b1
        pull_bD = pull_bD if queries.gain is None else pull_bD * queries.gain
    if push.norm_B is not None:
        pull_bD = pull_bD + unit_bD * push.norm_B[batch.shares.rows(ranks.rank)].unsqueeze(1)
    return pull_bD if ranks.size == 1 else pull_bD * ranks.size
