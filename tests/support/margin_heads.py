"""A head and a batch for tests of every margin."""

import numpy as np
import torch
import torch.nn.functional as F

from partialfc import ArcFace, RowSGD
from partialfc.keyed import key, normal
from tests.support.gpu import INTERPRETED
from tests.support.heads import flat_head
from tests.support.reference import relative_error

PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)
"""The change of the centers is minus their gradient."""


IDENTITIES, DIM, BATCH = 50 if INTERPRETED else 300, 32, 24


def head_of(margin, **settings):
    """A head with centers of any length, as they are during a run."""
    settings = {"optimizer": PLAIN, **settings}
    head = flat_head(IDENTITIES, DIM, margin, **settings)
    generator = torch.Generator(head.centers.device).manual_seed(1)
    torch.nn.init.normal_(head.centers, 0, 0.3, generator=generator)
    return head


def problem(head, angles="random"):
    """Embeddings of norms 1 to 50; at an angle near 0, pi/2 or pi to their own center if asked."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, IDENTITIES, (BATCH,), generator=generator)
    directions = F.normalize(torch.randn(BATCH, DIM, generator=generator))
    if angles != "random":
        per = head.centers_per_identity
        own = F.normalize(head.centers.detach()[labels * per, :DIM].float())
        across = F.normalize(directions - (directions * own).sum(1, keepdim=True) * own)
        off = torch.linspace(0.01, 0.2, BATCH).unsqueeze(1)
        theta = {"0": off, "pi/2": torch.pi / 2 + off - 0.1, "pi": torch.pi - off}[angles]
        directions = theta.cos() * own + theta.sin() * across
    return directions * torch.linspace(1, 50, BATCH).unsqueeze(1), labels


def settings_of(head, labels):
    """What the equations need to know of the head before its first step."""
    noise = normal(np.arange(BATCH), key(head.seed, "margin", 0, 0))
    sample = head.sampler(0, labels)
    return {
        "state": state_of(head),
        "sampled": sample.rows,
        "log_weight": sample.log_weight_n,
        "noise": torch.from_numpy(noise),
    }


def step(head, embeddings, labels, *, weight=1.0, **more):
    """Loss and gradients by one plain step; a weight lifts a tiny one over rounding."""
    own, before = embeddings.clone().requires_grad_(), head.centers.detach().clone()
    loss = head(own, labels, **more)
    (loss * weight).backward()
    head.optimizer.step()
    return loss.detach(), own.grad / weight, (before - head.centers.detach()) / weight


def assert_micro_batches_equal_one(**settings):
    """Three micro-batches of a step whose sample is fixed have the gradients of one batch."""
    whole, pieces = (head_of(ArcFace(), **settings) for _ in range(2))
    embeddings, labels = problem(whole)
    expected = step(whole, embeddings, labels)
    before, own = pieces.centers.detach().clone(), embeddings.clone().requires_grad_()
    pieces.sample_step(labels)
    for part, its in zip(own.chunk(3), labels.chunk(3), strict=True):
        (pieces(part, its) / 3).backward()
    pieces.optimizer.step()
    assert relative_error(own.grad, expected[1]) < 1e-5
    assert relative_error(before - pieces.centers.detach(), expected[2]) < 1e-5


def step_of_rank(head, centers, embeddings, labels, **more):
    """The same with a rank's rows of given centers; the batch is the rank's own."""
    rows = head.owned_rows
    head.centers.data.copy_(centers[rows.start : rows.stop])
    loss, gradient, change = step(head, embeddings, labels, **more)
    return loss.item(), (gradient / head.ranks.size).numpy(), change.numpy()


def state_of(head):
    """What the margin of a head remembers, as numbers."""
    return {name: float(value) for name, value in head.margin_state().items()}
