"""Rows of several identities or none, each pair written out: the whole logit matrix in fp64.

It shares no code with the package. Every pair of a row and one of its identities has logits of its
own, with the margin on that identity; embeddings are copied for it, as the package must not.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from partialfc.keyed import key, normal
from tests.support import loss_truth
from tests.support.margin_heads import BATCH, DIM, IDENTITIES

MOST = 4
"""K of the batch below."""


def named():
    """Identities [24, 4]: duplicates, gaps, rows of one, of none, and of ends of all shards."""
    generator = torch.Generator().manual_seed(5)
    identities = torch.randint(0, IDENTITIES, (BATCH, MOST), generator=generator)
    missing = torch.rand(BATCH, MOST, generator=generator) < 0.3
    identities = identities.masked_fill(missing, -1)
    identities[0] = torch.tensor([0, 299, 150, 75])
    identities[1] = torch.tensor([-1, 17, -1, -1])
    identities[2] = identities[9] = identities[23] = -1
    identities[3] = torch.tensor([7, 7, -1, 7])
    identities[4] = torch.tensor([8, 7, 8, 299])
    return identities


def weights():
    """[24, 4], of any sum; one is 0, one beside no identity is no number."""
    given = torch.rand(BATCH, MOST, generator=torch.Generator().manual_seed(6))
    given[0, 1] = 0
    given[1, 0] = torch.nan
    given[5] = given[5] / given[5].sum()
    return given


def loss_of(
    margin,
    embeddings,
    centers,
    identities,
    *,
    sampled,
    state,
    seed=2048,
    kind="mean",
    without="push",
    given=None,
    left_out=None,
):
    """The loss of ``Several(loss=kind, without=without)``; arguments as in ``loss_truth``."""
    per = getattr(margin, "sub_centers", 1)
    sampled = torch.arange(len(centers) // per) if sampled is None else sampled
    noise = torch.from_numpy(normal(np.arange(identities.numel()), key(seed, "margin", 0, 0)))
    margin, state = after_the_batch(margin, embeddings, state)
    lines, every_pair = [], [pairs_of(row, identities, given) for row in range(len(identities))]
    for row, pairs in enumerate(every_pair):
        # Each pair is a line with the margin on its identity; one more has it on none.
        lines += [(row, identity, place) for identity, (_, place) in pairs.items()]
        lines.append((row, -1, 0))
    row_of, identity_of, place_of = torch.tensor(lines).unbind(1)
    own = sampled == identity_of.unsqueeze(1)
    logits = loss_truth.logits_of(
        margin, embeddings[row_of], centers, own, sampled, state, noise[place_of]
    )
    losses = []
    for row, pairs in enumerate(every_pair):
        if not pairs and without == "leave_out":
            continue
        its = row_of == row
        positive = logits[own & its.unsqueeze(1)]
        told_from = ~own[its].any(0)
        if left_out is not None:
            told_from = told_from & ~left_out[row]
        negative = logits[its][-1][told_from]
        weight = torch.tensor([weight for weight, _ in pairs.values()], dtype=torch.float64)
        losses.append(row_loss(margin, positive, negative, weight, state, kind))
        if hasattr(margin, "norm_weight"):
            norm = embeddings[row].norm().clamp(margin.smallest_norm, margin.largest_norm)
            losses[-1] = losses[-1] + margin.norm_weight * (
                norm / margin.largest_norm**2 + 1 / norm
            )
    return torch.stack(losses).mean()


def pairs_of(row, identities, given):
    """Weight, and number of the first pair, of each identity of a row."""
    pairs: dict[int, tuple[float, int]] = {}
    for k, identity in enumerate(identities[row].tolist()):
        weight = 1.0 if given is None else float(given[row, k])
        if identity >= 0 and weight > 0:
            before, place = pairs.get(identity, (0.0, k * len(identities) + row))
            pairs[identity] = before + weight, place
    return pairs


def row_loss(margin, positive, negative, weight, state, kind):
    if type(margin).__name__ == "UniFace":
        apart = F.softplus(negative - state["bias"]).sum()
        return apart + (F.softplus(state["bias"] - positive).mean() if len(positive) else 0)
    if not len(positive):
        return torch.cat([negative, negative.new_zeros(1)]).logsumexp(0)
    if kind == "mean":
        losses = []
        for logit in positive:
            log_p = torch.cat([logit.view(1), negative]).log_softmax(0)
            smoothed = margin.label_smoothing
            losses.append(-(1 - smoothed) * log_p[0] - smoothed * log_p.mean())
        return torch.stack(losses).mean()
    log_p = torch.cat([positive, negative]).log_softmax(0)[: len(positive)]
    return -log_p.logsumexp(0) if kind == "any" else -(weight * log_p).sum()


def after_the_batch(margin, embeddings, state):
    """AdaFace with its averages over rows, not pairs: moved already, and no further."""
    if "norm_mean" not in state:
        return margin, state
    norm, share = embeddings.detach().norm(dim=1).clamp(1e-3, 100), margin.averaging
    mean = (1 - share) * state["norm_mean"] + share * norm.mean()
    deviation = (1 - share) * state["norm_std"] + share * norm.std()
    # A share of 1e-300 of the batch that the equation takes is nothing.
    return dataclasses.replace(margin, averaging=1e-300), {
        "norm_mean": mean,
        "norm_std": deviation,
    }


def gradients_of(margin, embeddings, centers, identities, **settings):
    """Loss and its gradients by embeddings and centers."""
    embeddings = embeddings.detach().double().requires_grad_()
    centers = centers.detach().double().requires_grad_()
    loss = loss_of(margin, embeddings, centers, identities, **settings)
    loss.backward()
    return loss.detach(), embeddings.grad, centers.grad


def batch():
    """Embeddings [24, 32] of norms 1 to 50."""
    generator = torch.Generator().manual_seed(2)
    directions = F.normalize(torch.randn(BATCH, DIM, generator=generator))
    return directions * torch.linspace(1, 50, BATCH).unsqueeze(1)
