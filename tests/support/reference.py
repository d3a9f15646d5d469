"""The single-process oracle: the whole logit matrix in fp64, gradients by autograd.

It shares no code with the package, on purpose. :class:`TextbookHead` at the end is the usual way to
write the head, for benchmarks.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def arcface(cosine: Tensor, *, scale: float, angular: float, gradient: str) -> Tensor:
    """The positive's logit, with the continuation past theta = pi - m of the documentation."""
    inside = cosine > math.cos(math.pi - angular)
    theta = torch.where(inside, cosine, 0.0).clamp(-1, 1).acos()
    logit = torch.where(inside, (theta + angular).cos(), cosine - (1 - math.cos(angular)))
    if gradient == "straight_through":
        logit = cosine + (logit - cosine).detach()
    return scale * logit


def cosface(cosine: Tensor, *, scale: float, additive: float) -> Tensor:
    return scale * (cosine - additive)


def positive_logit(margin):
    """The oracle's own formula for a margin of the package."""
    if hasattr(margin, "additive"):
        return lambda c: cosface(c, scale=margin.scale, additive=margin.additive)
    return lambda c: arcface(
        c, scale=margin.scale, angular=margin.angular, gradient=margin.gradient
    )


def loss_of(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    positive_logit,
    *,
    scale: float,
    sampled: Tensor | None = None,
    inter_class_filter: float | None = None,
) -> Tensor:
    """Mean loss of a global batch over the sampled centers (global identities), in fp64."""
    if sampled is None:
        sampled = torch.arange(len(centers))
    column = torch.searchsorted(sampled, identities)
    assert (sampled[column] == identities).all(), "every positive must be sampled"
    cosine = F.normalize(embeddings) @ F.normalize(centers[sampled]).T
    own = F.one_hot(column, len(sampled)).bool()
    negative = cosine
    if inter_class_filter is not None:
        negative = torch.where(cosine > inter_class_filter, 0.0, cosine)
    logits = torch.where(own, positive_logit(cosine), scale * negative)
    return F.cross_entropy(logits, column)


def gradients_of(embeddings, centers, identities, positive_logit, **settings):
    """Loss and its gradients with respect to embeddings and all centers, in fp64."""
    embeddings = embeddings.double().requires_grad_()
    centers = centers.double().requires_grad_()
    loss = loss_of(embeddings, centers, identities, positive_logit, **settings)
    loss.backward()
    return loss.detach(), embeddings.grad, centers.grad


def truth_of(margin, embeddings, centers, identities, sampled):
    """Loss and both gradients of a margin of the package over the sampled rows, in fp64."""
    logit = positive_logit(margin)
    return gradients_of(embeddings, centers, identities, logit, scale=margin.scale, sampled=sampled)


def plain_gradients(embeddings, centers, identities, margin, dtype):
    """Loss and gradients as an ordinary program has them: the products in ``dtype``, all stored."""
    embeddings = embeddings.clone().requires_grad_()
    centers = centers.clone().requires_grad_()
    unit, columns = F.normalize(embeddings).to(dtype), F.normalize(centers).to(dtype)
    cosine = F.linear(unit, columns).float()
    own = F.one_hot(identities, len(centers)).bool()
    logits = torch.where(own, positive_logit(margin)(cosine), margin.scale * cosine)
    loss = F.cross_entropy(logits, identities)
    loss.backward()
    return loss.detach(), embeddings.grad, centers.grad


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth."""
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-30))


class TextbookHead(nn.Module):
    """The usual sharded and sampled margin softmax: the algorithm of arcface_torch.

    All logits [B, n] in fp32, autograd, a dense gradient of the shard and a dense SGD step over it.
    What that algorithm does in place is done in place here, so it is no slower than need be. It
    differs in one thing: ranks draw different initial centers and samples.

    ``embeddings.grad`` is the world size times the exact gradient; that of the centers is exact.
    Collectives, where there are ranks: forward two all-gathers and three all-reduces of [B],
    backward one reduce-scatter.

    Args:
        num_identities: C over all ranks, at least the world size.
        embedding_dim: D.
        sample_rate: Fraction of a shard's centers per step, positives included, in (0, 1].
        scale: s of the logits.
        angular: ArcFace's m in radians, the margin a constant in backward; 0 for none.
        additive: CosFace's m in units of cosine; 0 for none.
        lr, momentum, weight_decay: Of torch.optim.SGD.
        seed: Of initial centers and samples, with the rank added.
        tf32: Matrix products in TF32 within :meth:`step`; CUDA only.
        device: Where the centers live.
    """

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        *,
        sample_rate: float = 1.0,
        scale: float = 64.0,
        angular: float = 0.5,
        additive: float = 0.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 2048,
        tf32: bool = False,
        device=None,
    ) -> None:
        super().__init__()
        if angular and additive:
            raise ValueError(f"one margin at a time, got angular={angular}, additive={additive}.")
        rank, size = (dist.get_rank(), dist.get_world_size()) if _has_ranks() else (0, 1)
        quotient, rest = divmod(num_identities, size)
        self.num_local = quotient + (rank < rest)
        self.start = quotient * rank + min(rank, rest)
        self.num_sample = int(sample_rate * self.num_local)
        self.sample_rate, self.scale = sample_rate, scale
        self.angular, self.additive, self.tf32 = angular, additive, tf32
        self.sampled: Tensor | None = None  # rows of the last forward; None for all
        self.generator = torch.Generator().manual_seed(seed + rank)
        drawn = self.generator
        if device is not None and torch.device(device).type != "cpu":  # in no time
            drawn = torch.Generator(device).manual_seed(seed + rank)
        centers = torch.empty(self.num_local, embedding_dim, device=drawn.device)
        self.centers = nn.Parameter(centers.normal_(0, 0.01, generator=drawn))
        self.optimizer = torch.optim.SGD(
            [self.centers], lr=lr, momentum=momentum, weight_decay=weight_decay
        )

    def step(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """Forward, backward to ``embeddings.grad`` and the update of the centers; the loss."""
        with _tf32(self.tf32):
            loss = self(embeddings, identities)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def forward(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """Mean loss of the global batch from [b, D] and int64 [b] of this rank."""
        if _has_ranks():
            embeddings, identities = _GatherRows.apply(embeddings), _all_rows(identities)
        target = identities - self.start
        target = torch.where((target >= 0) & (target < self.num_local), target, -1)
        centers, self.sampled = self.centers, None
        if self.sample_rate < 1:
            self.sampled, target = self.sample(target)
            centers = centers[self.sampled]
        cosine = F.linear(F.normalize(embeddings.float()), F.normalize(centers)).clamp(-1, 1)
        return _DistributedCrossEntropy.apply(self.with_margin(cosine, target) * self.scale, target)

    @torch.no_grad()
    def sample(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in use, sorted, and the targets as columns of them; -1 stays -1."""
        positive = target[target >= 0].unique()
        rows = positive
        if len(positive) <= self.num_sample:
            score = torch.rand(self.num_local, generator=self.generator).to(target.device)
            score[positive] = 2.0
            rows = score.topk(self.num_sample).indices.sort().values
        return rows, torch.where(target >= 0, torch.searchsorted(rows, target), -1)

    def with_margin(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The margin on each row's own column; changes ``cosine`` in place."""
        row = (target >= 0).nonzero().squeeze(1)
        column = target[row]
        if self.additive:
            cosine[row, column] -= self.additive
        elif self.angular:
            with torch.no_grad():  # straight-through
                cosine.acos_()
                cosine[row, column] += self.angular
                cosine.cos_()
        return cosine


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks. Backward: a rank's own rows of the sum over ranks, times their number."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        return _all_rows(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        size = dist.get_world_size()
        own = gradient.new_empty(len(gradient) // size, *gradient.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, gradient.contiguous())
        return own * size


class _DistributedCrossEntropy(torch.autograd.Function):
    """-mean log max(p, 1e-30) over logits [B, n] whose columns lie on all ranks.

    The logits become the softmax in place; what made them (a product with a number) saved nothing.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        logits.sub_(_over_ranks(logits.amax(1, keepdim=True), "MAX")).exp_()
        logits.div_(_over_ranks(logits.sum(1, keepdim=True), "SUM"))
        row = (target >= 0).nonzero().squeeze(1)
        own = logits.new_zeros(len(logits))
        own[row] = logits[row, target[row]]
        ctx.save_for_backward(logits, target, row)
        return -_over_ranks(own, "SUM").clamp(min=1e-30).log().mean()

    @staticmethod
    def backward(ctx, weight: Tensor) -> tuple[Tensor, None]:
        # arcface_torch too holds the targets as a dense matrix, and takes them off copied rows.
        softmax, target, row = ctx.saved_tensors
        target_share = torch.zeros(len(row), softmax.shape[1], device=softmax.device)
        target_share[torch.arange(len(row), device=row.device), target[row]] = 1
        softmax[row] -= target_share
        return softmax.div_(len(softmax)) * weight, None


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_rows(rows: Tensor) -> Tensor:
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, rows.contiguous())
    return gathered


def _over_ranks(value: Tensor, operation: str) -> Tensor:
    if _has_ranks():
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return value


@contextmanager
def _tf32(allow: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
