"""The single-process oracle: the whole logit matrix in fp64, gradients by autograd.

It shares no code with the package, on purpose.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth."""
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-30))
