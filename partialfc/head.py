"""PartialFC: the softmax over class centers that are sharded over ranks and sampled every step.

https://arxiv.org/abs/2203.15565. The data flow, and where each part lives:

    gather (collectives) -> sample (sampling) -> logits in tiles (tiles) -> margin (margins)
    -> distributed softmax (here) -> gradients (here and tiles) -> rows (row_optimizer)

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding,
n = sampled rows of this rank.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.collectives import (
    Ranks,
    gather_batch,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
    sum_to_owner,
)
from partialfc.margins import Margin
from partialfc.permutation import key
from partialfc.row_format import DTYPES
from partialfc.row_optimizer import RowOptimizer
from partialfc.row_rules import RowRule, RowSGD
from partialfc.sampling import NOT_LOCAL, KeyedSampler, Sample
from partialfc.sharding import Sharding, default_canonical_shards
from partialfc.tiles import Compute, Kept, first_pass, operand_dtype, take_rows, unit

_CENTER_STD = 0.01
_KEEP_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_INITIAL_BLOCK = 1024
"""Identities drawn from one generator; a constant, so that it never depends on the sharding."""


class PartialFC(nn.Module):
    """The margin softmax loss of a global batch over the class centers of all ranks.

    Every rank constructs it with the same arguments. It works without torch.distributed too, as
    one rank. The loss and both gradients are exact for the sampled centers.

    Args:
        num_identities: C, over all ranks; >= 1.
        embedding_dim: D, >= 1.
        margin: What happens to the positive's logit, e.g. ``ArcFace()``.
        sample_rate: Fraction of the centers used per step, positives included, in (0, 1].
        optimizer: Update of the sampled centers.
        compute: Precision of the matrix products. ``"bf16"`` gathers embeddings in bf16 too. The
            positive's cosine, the softmax and all sums are fp32 in every case.
        center_format: How centers are stored: ``"fp32"``, ``"bf16"``, or ``"fp16"`` with a scale a
            row in the optimizer's state; see :mod:`partialfc.row_format`.
        keep_bytes: Most memory of the exponentials that spare pass 2 a matrix product; the result
            does not depend on it. ``None``: 256 MiB on a CPU, 2 GiB on a GPU.
        overlap: On a GPU, update the centers beside the backbone's backward; a loss scale or a
            verdict (``found_inf``) on that backward cannot be had then.
        seed: Initial centers, negatives and rounding are functions of it and of global ids.
        canonical_shards: V, at least the largest world size that the run will ever have;
            ``None`` for a number that depends on ``num_identities`` alone.
        group: Process group; ``None`` for the default one.
        device: Where the centers live; ``None`` for torch's default device.

    Raises:
        ValueError: If a value is outside its range.
    """

    centers: nn.Parameter
    """[rows of this rank, D] in ``center_format``, not normalised; changed by ``optimizer`` alone.
    fp16 rows are in units of their scale."""

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        margin: Margin,
        *,
        sample_rate: float = 1.0,
        optimizer: RowRule | None = None,
        compute: Compute = "fp32",
        center_format: Literal["fp32", "bf16", "fp16"] = "fp32",
        keep_bytes: int | None = None,
        overlap: bool = False,
        seed: int = 2048,
        canonical_shards: int | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be >= 1, got {embedding_dim}.")
        if center_format not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"center_format must be fp32, bf16 or fp16, got {center_format!r}.")
        if keep_bytes is not None and keep_bytes < 0:
            raise ValueError(f"keep_bytes must be >= 0, got {keep_bytes}.")
        self.ranks = Ranks.of(group)
        self.sharding = Sharding(
            num_identities=num_identities,
            canonical_shards=(
                default_canonical_shards(num_identities)
                if canonical_shards is None
                else canonical_shards
            ),
            world_size=self.ranks.size,
        )
        self.margin = margin
        self.owned = self.sharding.owned(self.ranks.rank)
        self.sampler = KeyedSampler(
            self.sharding, self.ranks.rank, sample_rate=sample_rate, seed=seed
        )
        centers = initial_centers(
            self.owned, embedding_dim, seed=seed, device=device, dtype=DTYPES[center_format]
        )
        self.centers = nn.Parameter(centers, requires_grad=False)
        self.compute = _checked(compute, centers.device)
        if overlap and not centers.is_cuda:
            raise ValueError(
                f"overlap = True needs a GPU, the head is on {centers.device.type}; remove it."
            )
        self.keep_bytes = _KEEP_BYTES[centers.device.type] if keep_bytes is None else keep_bytes
        self.optimizer = RowOptimizer(
            self.centers,
            optimizer or RowSGD(),
            first_identity=self.owned.start,
            seed=seed,
            overlap=overlap,
        )
        self._step_sample: _StepSample | None = None

    def extra_repr(self) -> str:
        """Sizes for ``print(head)``."""
        return (
            f"num_identities={self.sharding.num_identities}, "
            f"embedding_dim={self.centers.shape[1]}, owned={self.owned}, margin={self.margin}"
        )

    def sample_step(self, identities: Tensor) -> None:
        """Fix the sample of this step from the identities of all its micro-batches.

        With gradient accumulation, N micro-batches after this call use the centers that one batch
        of all of them would use; without it each uses its own positives. Collective: one
        all-gather. Holds until the next ``optimizer.step()``.

        Args:
            identities: int64 [any], this rank's, the same number on every rank.
        """
        identities_B = gather_rows(identities, self.ranks)
        self._refuse_foreign(identities_B)
        step = self.optimizer.steps
        self._step_sample = _StepSample(step, identities_B, self.sampler(step, identities_B).rows)

    def forward(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """Return the mean loss over the global batch, fp32, the same on all ranks.

        Collective: one all-gather, one all-reduce of [2B] (and one of [B] for a scale above 64)
        and one reduce-scatter where gradients are wanted; backward has none.

        ``embeddings.grad`` is the world size times the exact gradient, so that the mean over
        ranks that DistributedDataParallel takes is exact.

        Args:
            embeddings: [b, D] of this rank, any float dtype, any length; b equal on all ranks.
            identities: int64 [b], global, in [0, C).

        Raises:
            ValueError: If a shape, a dtype or an identity is wrong.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.centers.shape[1]:
            raise ValueError(
                f"embeddings must be [batch, {self.centers.shape[1]}], "
                f"got {list(embeddings.shape)}; embedding_dim of the head and of the backbone "
                "must be the same."
            )
        if identities.shape != embeddings.shape[:1] or identities.dtype != torch.int64:
            raise ValueError(
                f"identities must be int64 [{len(embeddings)}], one for each embedding, "
                f"got {identities.dtype} {list(identities.shape)}."
            )
        # The anchor makes backward reach the centers where the embeddings want no gradient.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        with torch.autocast(embeddings.device.type, enabled=False):
            loss: Tensor = _Loss.apply(embeddings, anchor, identities, self)  # type: ignore[no-untyped-call]
        return loss

    def get_extra_state(self) -> dict[str, int]:
        """What ``load_state_dict`` checks: centers fit only the rank they were cut for."""
        return {"first": self.owned.start, "identities": self.sharding.num_identities}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse the centers of another rank or another head."""
        if state != self.get_extra_state():
            raise ValueError(
                f"these centers were saved for {state}, this rank holds {self.get_extra_state()}; "
                "load a checkpoint of partialfc.checkpoint to change the number of ranks."
            )

    def _sample(self, identities_B: Tensor) -> Sample:
        fixed = self._step_sample
        if fixed is None or fixed.step != self.optimizer.steps:
            return self.sampler(self.optimizer.steps, identities_B)
        # The set of positives is that of the step, so the rows are; the targets are this batch's.
        known_B = torch.cat([fixed.identities_B, identities_B])
        target_B = self.sampler(fixed.step, known_B).target_B[len(fixed.identities_B) :]
        return Sample(fixed.rows, target_B)

    def _refuse_foreign(self, identities_B: Tensor) -> None:
        """All ranks see the same gathered identities, so all of them refuse together."""
        count = self.sharding.num_identities
        foreign_B = (identities_B < 0) | (identities_B >= count)
        if foreign_B.device.type != "cpu":
            torch._assert_async(~foreign_B.any(), f"an identity is not in [0, {count})")
        elif foreign_B.any():
            where = int(foreign_B.nonzero()[0])
            raise ValueError(
                f"identities must be in [0, {count}), got {int(identities_B[where])} at position "
                f"{where} of the global batch; num_identities of the head must cover the data."
            )


@dataclass(frozen=True, slots=True)
class _StepSample:
    """A sample that several micro-batches share."""

    step: int
    identities_B: Tensor
    rows: Tensor | None


class _Loss(torch.autograd.Function):
    """Everything that needs other ranks happens in forward; backward only weighs the results."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, anchor: Tensor, identities: Tensor, head: PartialFC
    ) -> Tensor:
        unit_bD, reciprocal_b1 = unit(embeddings)
        operand_bD = unit_bD.to(operand_dtype(head.compute))
        unit_BD, identities_B = gather_batch(operand_bD, identities, head.ranks)
        head._refuse_foreign(identities_B)
        sample = head._sample(identities_B)
        margin, target_B, batch = head.margin, sample.target_B, len(unit_BD)
        local_B = target_B != NOT_LOCAL
        want_gradient = anchor.requires_grad
        head.optimizer.catch_up(sample.rows)

        # Pass 1 and the positives, then one sum over ranks makes both global.
        negatives = first_pass(
            unit_BD,
            head.centers.detach(),
            sample.rows,
            target_B,
            margin,
            compute=head.compute,
            want_pull=ctx.needs_input_grad[0],
            keep_bytes=head.keep_bytes - head.optimizer.kept_bytes if want_gradient else 0,
            workspace=head.optimizer.workspace,
        )
        own_BD = _own_centers(head.centers, sample)
        logit_B, slope_B = margin.positive((unit_BD.float() * own_BD).sum(1))
        logit_B = torch.where(local_B, logit_B, 0.0)
        sum_B, pull_BD, maximum_B = negatives.sum_B, negatives.pull_BD, None
        if negatives.maximum_B is not None:
            maximum_B = max_over_ranks(negatives.maximum_B.clone(), head.ranks)
            maximum_B = torch.where(maximum_B.isfinite(), maximum_B, 0.0)  # no negative anywhere
            shrink_B = (negatives.maximum_B - maximum_B).exp()
            sum_B = sum_B * shrink_B
            pull_BD = None if pull_BD is None else pull_BD * shrink_B.unsqueeze(1)
        sum_B, logit_B = sum_over_ranks(torch.stack([sum_B, logit_B]), head.ranks)

        # loss = log(sum + e^logit) - logit, written so that a tiny loss keeps its digits.
        odds_B = sum_B.log() - logit_B
        if maximum_B is not None:
            odds_B = odds_B + maximum_B
        loss = F.softplus(odds_B).mean()
        if not want_gradient:
            return loss

        # d loss / d cosine: p of a negative is exp(logit - maximum) / sum * sigmoid(odds).
        wrong_B = odds_B.sigmoid() / batch
        negative_B = torch.where(sum_B > 0, margin.scale * wrong_B / sum_B, 0.0)
        positive_B = torch.where(local_B, -slope_B * wrong_B, 0.0)
        ctx.head, ctx.finite = head, loss.isfinite()
        ctx.kept = Kept(
            unit_BD=unit_BD,
            rows=sample.rows,
            target_B=target_B,
            margin=margin,
            compute=head.compute,
            maximum_B=maximum_B,
            negative_B=negative_B,
            positive_B=positive_B,
            exponentials=negatives.exponentials,
        )
        if ctx.needs_input_grad[0]:
            assert pull_BD is not None
            pull_BD.mul_(negative_B.unsqueeze(1)).addcmul_(own_BD, positive_B.unsqueeze(1))
            unit_gradient_bD = sum_to_owner(pull_BD, head.ranks)
            along_b1 = (unit_gradient_bD * unit_bD).sum(1, keepdim=True)
            gradient_bD = (unit_gradient_bD - unit_bD * along_b1) * reciprocal_b1
            ctx.save_for_backward(gradient_bD.mul_(head.ranks.size))
            ctx.dtype = embeddings.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, None, None, None]:
        ctx.head.optimizer.add_micro_batch(ctx.kept, weight, ctx.finite)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (gradient_bD,) = ctx.saved_tensors
        return (gradient_bD * weight).to(ctx.dtype), None, None, None


def _own_centers(centers_CD: Tensor, sample: Sample) -> Tensor:
    """Unit center [B, D] of each row's own identity; zero where another rank has it."""
    local_B = sample.target_B != NOT_LOCAL
    row_B = sample.target_B.clamp(min=0)
    if sample.rows is not None and len(sample.rows):
        row_B = sample.rows[row_B]
    if not len(centers_CD):
        return centers_CD.new_zeros(len(row_B), centers_CD.shape[1], dtype=torch.float32)
    own_BD, _ = unit(take_rows(centers_CD, row_B, 0, len(row_B)))
    return torch.where(local_B.unsqueeze(1), own_BD, 0.0)


def _checked(compute: Compute, device: torch.device) -> Compute:
    if compute not in get_args(Compute):
        raise ValueError(f"compute must be one of {', '.join(get_args(Compute))}, got {compute!r}.")
    if compute == "tf32" and device.type != "cuda":
        raise ValueError(
            f"compute = 'tf32' needs a GPU, the head is on {device.type}; use fp32 or bf16."
        )
    return compute


def initial_centers(
    identities: range,
    embedding_dim: int,
    *,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return N(0, 0.01²) centers [len(identities), D], a function of seed and global identity.

    The values differ between CPU and GPU, whose generators are not the same.
    """
    centers = torch.empty(len(identities), embedding_dim, device=device, dtype=dtype)
    generator = torch.Generator(centers.device)
    first_block = identities.start // _INITIAL_BLOCK
    for block in range(first_block, -(-identities.stop // _INITIAL_BLOCK)):
        generator.manual_seed(key(seed, "centers", block))
        rows = torch.randn(
            _INITIAL_BLOCK, embedding_dim, generator=generator, device=centers.device
        )
        start = block * _INITIAL_BLOCK
        low, high = max(start, identities.start), min(start + _INITIAL_BLOCK, identities.stop)
        part = rows[low - start : high - start].mul_(_CENTER_STD)
        centers[low - identities.start : high - identities.start] = part
    return centers
