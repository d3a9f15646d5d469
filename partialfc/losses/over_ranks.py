"""The losses on embeddings, over the batch of all ranks.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding,
L = a teacher's embedding, T = terms of all losses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partialfc.distributed.batches import Batches
from partialfc.distributed.ranks import Ranks, sum_over_ranks, sum_to_owner
from partialfc.distributed.shares import Shares
from partialfc.losses import Distillation, EmbeddingLoss, Lesson, Pairs
from partialfc.numerics import unit


@dataclass(frozen=True, slots=True)
class Weighted:
    """A loss and its share of the sum.

    Attributes:
        loss: What it computes.
        weight: > 0, finite.

    Raises:
        ValueError: If the weight is not.
    """

    loss: EmbeddingLoss
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"weight must be > 0 and finite, got {self.weight}; leave the loss out for 0."
            )

    def at(self, lesson: Lesson | None) -> float:
        """Return the weight at a step."""
        if lesson is None or not isinstance(self.loss, Distillation):
            return self.weight
        return self.weight * lesson.factor


class EmbeddingLosses(nn.Module):
    """The weighted sum of losses on the embeddings of a global batch.

    Every rank compares its own rows with those of all ranks: it takes memory for some [b, B]
    tensors. With one rank it works without torch.distributed.

    Args:
        losses: By any name; each is in ``terms`` under it.
        group: Process group; ``None`` for the default one.
    """

    terms: dict[str, Tensor]
    """Value of each loss in the last forward pass, without its weight; scalars on the device."""

    def __init__(
        self, losses: Mapping[str, Weighted], *, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.losses = dict(losses)
        self.ranks = Ranks.of(group)
        self.batches = Batches(self.ranks)
        self.terms = {}

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        shares: Shares | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Return the weighted sum, fp32, the same on all ranks.

        Collective: one all-gather, two where the batch is larger than the last one, one all-reduce
        of [2T], and one reduce-scatter where gradients are wanted; none without losses.
        ``embeddings.grad`` is the world size times the exact gradient, as that of the head is.

        Args:
            embeddings: [b, D] of this rank, any float dtype, any length; b equal on all ranks.
            identities: int64 [b], global.
            shares: b of every rank where it is not equal.
            lesson: The teacher's embeddings of the same images; they travel with the others.

        Raises:
            ValueError: If b is not equal, or not its share; on a GPU, a device-side assertion fails
                instead. If a loss needs a lesson and there is none, or one that does not fit.
        """
        if not self.losses:
            return torch.zeros((), device=embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            loss: Tensor = _OverRanks.apply(  # type: ignore[no-untyped-call]
                embeddings, identities, shares, lesson, self
            )
        return loss


def sums_of(
    losses: Mapping[str, Weighted],
    unit_BD: Tensor,
    identities_B: Tensor,
    anchors: slice,
    teacher_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums [T] over this rank's anchors, with their gradient, and the counts [T]."""
    pairs = Pairs.of(unit_BD, identities_B, anchors, teacher_BL)
    parts = [one.loss.sums(pairs) for one in losses.values()]
    # A loss that leaves out pairs with NaN must be NaN too.
    sum_T = torch.cat([part[0] for part in parts]) + 0 * unit_BD.sum()
    return sum_T, torch.cat([part[1] for part in parts])


class _OverRanks(torch.autograd.Function):
    """Everything that needs other ranks happens in forward; backward only weighs the result."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        identities: Tensor,
        shares: Shares | None,
        lesson: Lesson | None,
        module: EmbeddingLosses,
    ) -> Tensor:
        """Return the loss; arguments and collectives are those of ``EmbeddingLosses.forward``."""
        ranks, weighted = module.ranks, module.losses
        unit_bD, reciprocal_b1 = unit(embeddings.float())
        row_b, dim = unit_bD, unit_bD.shape[1]
        if lesson is not None:
            row_b = torch.cat([unit_bD, unit(lesson.embeddings_bL)[0]], dim=1)
        row_B, identities_B, _ = module.batches.gather(row_b, identities, shares=shares)
        unit_BD = row_B if lesson is None else row_B[:, :dim].contiguous()
        teacher_BL = None if lesson is None else row_B[:, dim:].contiguous()
        anchors = (shares or Shares((len(unit_bD),) * ranks.size)).rows(ranks.rank)
        want_gradient = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(want_gradient):
            unit_BD = unit_BD.detach().requires_grad_(want_gradient)
            sum_T, count_T = sums_of(weighted, unit_BD, identities_B, anchors, teacher_BL)
        totals = sum_over_ranks(torch.stack([sum_T.detach(), count_T]), ranks)
        count_T = totals[1].clamp(min=1)
        with torch.set_grad_enabled(want_gradient):
            mean_T = (totals[0] / count_T).requires_grad_(want_gradient)
            means = torch.split(mean_T, [one.loss.terms for one in weighted.values()])
            values = [
                one.loss.value(mean) for one, mean in zip(weighted.values(), means, strict=True)
            ]
            loss = torch.stack(
                [
                    one.at(lesson) * value
                    for one, value in zip(weighted.values(), values, strict=True)
                ]
            ).sum()
        module.terms = {name: value.detach() for name, value in zip(weighted, values, strict=True)}
        if want_gradient:
            (by_mean_T,) = torch.autograd.grad(loss, mean_T)
            (pull_BD,) = torch.autograd.grad(sum_T, unit_BD, by_mean_T / count_T)
            pull_bD = sum_to_owner(pull_BD, ranks, shares)
            along_b1 = (pull_bD * unit_bD).sum(1, keepdim=True)
            ctx.save_for_backward((pull_bD - unit_bD * along_b1) * reciprocal_b1 * ranks.size)
            ctx.dtype = embeddings.dtype
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the embeddings."""
        (gradient_bD,) = ctx.saved_tensors
        return (gradient_bD * weight).to(ctx.dtype), None, None, None, None
