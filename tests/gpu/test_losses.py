"""Every margin on a CUDA device against the dense fp64 equations."""

import pytest
import torch

from partialfc import PartialFC, RowSGD
from tests.support import loss_truth
from tests.support.every_margin import EVERY_MARGIN
from tests.support.gpu import INTERPRETED, needs_a_gpu
from tests.support.margin_heads import head_of, problem, settings_of, step
from tests.support.reference import relative_error

pytestmark = needs_a_gpu


@pytest.mark.parametrize("angles", ["random", "0", "pi/2", "pi"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_loss_and_gradients_equal_the_fp64_equations(name, rate, angles):
    head = head_of(EVERY_MARGIN[name], sample_rate=rate)
    embeddings, labels = problem(head, angles)
    centers = head.centers.detach().clone()
    truth = loss_truth.gradients_of(
        head.margin, embeddings, centers, labels, **settings_of(head, labels)
    )
    there = head_of(EVERY_MARGIN[name], sample_rate=rate, device="cuda")
    there.centers.data.copy_(centers)
    weight = 1 / float(truth[2].norm())
    found = step(there, embeddings.cuda(), labels.cuda(), weight=weight)
    limit = {"random": 1e-5, "pi/2": 1e-5, "0": 5e-3, "pi": 1e-3}[angles]
    for value, expected in zip(found, truth, strict=True):
        assert relative_error(value.cpu(), expected) < limit


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_no_margin_waits_for_the_device(name):
    """All centers in use: any hidden synchronisation with the host raises here."""
    rows, steps = (40, 2) if INTERPRETED else (1000, 5)
    head = PartialFC(rows, 64, EVERY_MARGIN[name], optimizer=RowSGD(lr=0.1), device="cuda")
    embeddings = torch.randn(64, 64, device="cuda")
    labels = torch.randint(0, rows, (64,), device="cuda")

    def one() -> torch.Tensor:
        loss = head(embeddings.clone().requires_grad_(), labels)
        loss.backward()
        head.optimizer.step()
        return loss.detach()

    losses = [one()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [one() for _ in range(steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
