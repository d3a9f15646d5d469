"""The head and the trainer on a CUDA device: ``make test-gpu`` where there is one."""

import pytest
import torch

from partialfc import ArcFace, CosFace, PartialFC, RowSGD
from partialfc.build import assemble
from partialfc.collectives import Ranks
from partialfc.runtime import Runtime
from partialfc.train import train_step
from tests import reference
from tests.models import Flat, batch, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize(
    "margin",
    [ArcFace(gradient="exact"), ArcFace(scale=128), CosFace(scale=30, inter_class_filter=0.1)],
    ids=["exact", "row maximum", "filter"],
)
def test_loss_and_gradients_equal_the_fp64_oracle(margin, rate):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(64, 128, generator=generator)
    labels = torch.randint(0, 5000, (64,), generator=generator)
    centers = torch.randn(5000, 128, generator=generator)
    head = PartialFC(5000, 128, margin, sample_rate=rate, optimizer=PLAIN, device="cuda")
    head.centers.data.copy_(centers)
    rows = head.sampler(0, labels.cuda()).rows
    sampled = torch.arange(5000) if rows is None else rows.cpu().sort().values
    own = embeddings.cuda().requires_grad_()
    loss = head(own, labels.cuda())
    loss.backward()
    head.optimizer.step()
    truth = reference.gradients_of(
        embeddings,
        centers,
        labels,
        reference.positive_logit(margin),
        scale=margin.scale,
        sampled=sampled,
        inter_class_filter=margin.inter_class_filter,
    )
    found = (loss.detach().cpu(), own.grad.cpu(), centers - head.centers.detach().cpu())
    for value, expected in zip(found, truth, strict=True):
        assert reference.relative_error(value, expected) < 2e-5


def test_gpu_and_cpu_sample_the_same_rows():
    labels = torch.randint(0, 70_001, (256,), generator=torch.Generator().manual_seed(1))
    head = PartialFC(70_001, 8, ArcFace(), sample_rate=0.05)
    for step in range(3):
        here, there = head.sampler(step, labels), head.sampler(step, labels.cuda())
        assert torch.equal(here.rows, there.rows.cpu())
        assert torch.equal(here.target_B, there.target_B.cpu())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(compute):
    """All centers in use: any hidden synchronisation with the host raises here."""
    config = settings(precision={"compute": compute})
    head = PartialFC(1000, 64, ArcFace(scale=16), optimizer=RowSGD(lr=0.1), device="cuda")
    model = assemble(config, Runtime(Ranks(), torch.device("cuda")), Flat(8, 64), head)
    images, identities = (part.cuda() for part in batch(0, 64, identities=1000))
    losses = [train_step(model, config, images, identities, 0.05).loss]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            losses.append(train_step(model, config, images, identities, 0.05).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses[-1] < losses[0]


def test_a_bad_image_changes_nothing_without_the_host():
    config = settings()
    head = PartialFC(1000, 64, ArcFace(scale=16), optimizer=RowSGD(lr=0.1), device="cuda")
    model = assemble(config, Runtime(Ranks(), torch.device("cuda")), Flat(8, 64), head)
    images, identities = (part.cuda() for part in batch(0, 64, identities=1000))
    train_step(model, config, images, identities, 0.05)
    before = [model.head.centers.detach().clone(), model.backbone.project.weight.detach().clone()]
    images[3] = torch.nan
    assert train_step(model, config, images, identities, 0.05).skipped == 1
    assert torch.equal(model.head.centers, before[0])
    assert torch.equal(model.backbone.project.weight, before[1])
