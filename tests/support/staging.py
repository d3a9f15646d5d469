"""Heads whose rows lie elsewhere, and their training."""

import copy
import itertools

import torch

from partialfc import ArcFace, RowAdagrad, RowAdamW, RowSGD
from tests.support.heads import flat_head

IDENTITIES, DIM, BATCH, STEPS = 400, 16, 24, 30
HOST = {"centers_in": "host", "states_in": "host"}


RULES = {
    "sgd": (RowSGD(unsampled="stay"), "fp32"),
    "sgd bf16": (RowSGD(momentum_format="bf16", unsampled="stay"), "bf16"),
    "sgd fp16 int8": (RowSGD(momentum_format="int8", unsampled="stay"), "fp16"),
    "sgd move": (RowSGD(unsampled="move"), "fp32"),
    "sgd move fp8 int8": (RowSGD(momentum_format="int8", unsampled="move"), "fp8"),
    "adamw": (RowAdamW(), "fp32"),
    "adagrad": (RowAdagrad(), "fp32"),
}


def head_of(rule, center_format, placement, *, margin=None, rate=0.3, device=None):
    return flat_head(
        IDENTITIES,
        DIM,
        margin or ArcFace(scale=16),
        sample_rate=rate,
        optimizer=copy.deepcopy(rule),
        center_format=center_format,
        **(placement or {}),
        device=device,
    )


def trained(head, *, prefetch=True, parts=1, fixed=True, given=None):
    """Losses, centers and states after some steps; a batch in which a value is not finite too."""
    losses = []
    device = head.device
    given = [(own.to(device), labels.to(device)) for own, labels in given or batches()]
    for (embeddings, labels), ahead in itertools.zip_longest(given, given[1:]):
        if prefetch and ahead is not None:
            head.prefetch(ahead[1])
        if parts > 1 and fixed:
            head.sample_step(labels)
        pieces = zip(embeddings.chunk(parts), labels.chunk(parts), strict=True)
        for piece, identities in pieces:
            own = piece.clone().requires_grad_()
            if len(losses) == 7:
                own = own / 0
            loss = head(own, identities) / parts
            loss.backward()
            losses.append(loss.item())
        head.optimizer.step()
    head.optimizer.settle()
    return losses, head.centers.detach().clone(), dict(head.optimizer.states())


def assert_equal(one, other):
    assert torch.equal(torch.tensor(one[0]).nan_to_num(), torch.tensor(other[0]).nan_to_num())
    assert torch.equal(one[1].view(torch.uint8), other[1].view(torch.uint8))
    assert one[2].keys() == other[2].keys()
    for name, state in one[2].items():
        assert torch.equal(state, other[2][name]), name


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(BATCH, DIM, generator=generator),
            torch.randint(0, IDENTITIES, (BATCH,), generator=generator),
        )
        for _ in range(steps)
    ]
