"""The head and the trainer on a CUDA device: ``make test-gpu`` where there is one."""

import pytest
import torch

pytest.importorskip("pydantic")

from partialfc import ArcFace, CosFace, RowAdagrad, RowAdamW, RowSGD, Softmax, SubCenterArcFace
from partialfc.distributed.ranks import Ranks
from partialfc.head.rows.formats import FIRST_SCALE, decode
from partialfc.model.build import assemble
from partialfc.model.step import train_step
from partialfc.runtime.process import Runtime
from tests.support import reference
from tests.support.gpu import INTERPRETED, needs_a_gpu
from tests.support.heads import flat_head
from tests.support.models import Flat, batch, settings

pytestmark = needs_a_gpu

PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)
ROWS, STEPS, BATCH = (120, 3, 16) if INTERPRETED else (5000, 20, 64)
FEW = 60 if INTERPRETED else 1000


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize(
    "margin",
    [ArcFace(gradient="exact"), ArcFace(scale=128), CosFace(scale=30, inter_class_filter=0.1)],
    ids=["exact", "row maximum", "filter"],
)
def test_loss_and_gradients_equal_the_fp64_oracle(margin, rate):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(64, 128, generator=generator)
    labels = torch.randint(0, ROWS, (64,), generator=generator)
    centers = torch.randn(ROWS, 128, generator=generator)
    head = flat_head(ROWS, 128, margin, sample_rate=rate, optimizer=PLAIN, device="cuda")
    head.centers.data.copy_(centers)
    rows = head.sampler(0, labels.cuda()).rows
    sampled = torch.arange(ROWS) if rows is None else rows.cpu().sort().values
    truth = reference.gradients_of(
        embeddings,
        centers,
        labels,
        reference.positive_logit(margin),
        scale=margin.scale,
        sampled=sampled,
        inter_class_filter=margin.inter_class_filter,
    )
    own = embeddings.cuda().requires_grad_()
    loss = head(own, labels.cuda())
    weight = float(centers.norm() / truth[2].norm())  # or rounding of w - g would outweigh g
    (loss * weight).backward()
    head.optimizer.step()
    change = centers - head.centers.detach().cpu()
    found = (loss.detach().cpu(), own.grad.cpu() / weight, change / weight)
    for value, expected in zip(found, truth, strict=True):
        assert reference.relative_error(value, expected) < 2e-5


def test_gpu_and_cpu_sample_the_same_rows():
    """Whether a step draws its centers itself, or the step before it did."""
    labels = torch.randint(0, 70_001, (256,), generator=torch.Generator().manual_seed(1))
    heads = [
        flat_head(70_001, 8, ArcFace(), sample_rate=0.05, device=device)
        for device in ("cpu", "cuda")
    ]
    for step in range(4):
        here, there = (head.sample(labels.to(head.device)) for head in heads)
        assert torch.equal(here.rows, there.rows.cpu())
        assert torch.equal(here.target_B, there.target_B.cpu())
        if step % 2:
            heads[1].sample_step(labels, ahead=True)
        for head in heads:
            head.optimizer.step()


@pytest.mark.parametrize("margin", [ArcFace(), Softmax(), SubCenterArcFace(sub_centers=2)], ids=str)
@pytest.mark.parametrize("rule", [RowSGD(), RowAdamW()], ids=["sgd", "adamw"])
def test_a_step_that_is_fixed_ahead_does_not_wait_for_the_gpu(rule, margin):
    """The first one draws for itself, and may."""
    generator = torch.Generator().manual_seed(1)
    head = flat_head(ROWS, 32, margin, sample_rate=0.1, optimizer=rule, device="cuda")
    given = [torch.randint(0, ROWS, (BATCH,), generator=generator) for _ in range(5)]
    own = torch.randn(BATCH, 32, generator=generator).cuda().requires_grad_()
    try:
        for step, labels in enumerate(given[:-1]):
            head.sample_step(given[step + 1], ahead=True)
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
            there = labels.pin_memory().cuda(non_blocking=True)
            head(own, there).backward()
            head.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


FORMATS = [("fp32", "fp32"), ("fp16", "int8"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp8", "int8")]


def trained(device, rule, **settings):
    """Loss of every step, and the centers as they are stored."""
    head = flat_head(
        ROWS, 128, ArcFace(scale=32), sample_rate=0.3, optimizer=rule, device=device, **settings
    )
    start = torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(5)) * 0.01
    head.centers.data.copy_(start / FIRST_SCALE.get(head.centers.dtype, 1))
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(BATCH, 128, generator=generator).to(device).requires_grad_()
        labels = torch.randint(0, ROWS, (BATCH,), generator=generator).to(device)
        if device == "cpu":  # as a GPU does, or it would round what a row has missed once less
            head.optimizer.catch_up(head.sampler(step, labels).rows)
        loss = head(embeddings, labels)
        loss.backward()
        head.optimizer.step()
        losses.append(loss.item())
    scale = head.optimizer.states().get("centers_scale")
    return losses, decode(head.centers.detach(), scale).cpu()


@pytest.mark.parametrize(("center_format", "momentum_format"), FORMATS)
@pytest.mark.parametrize("unsampled", ["stay", "move"])
def test_kernels_train_as_torch_on_the_cpu_does(center_format, momentum_format, unsampled):
    """Same samples, same random bits: only the order of sums differs."""
    rule = RowSGD(lr=0.1, momentum_format=momentum_format, unsampled=unsampled)
    there, here = (trained(d, rule, center_format=center_format) for d in ("cuda", "cpu"))
    plain = (center_format, momentum_format) == ("fp32", "fp32")
    assert there[0] == pytest.approx(here[0], rel=1e-4 if plain else 1e-3)
    assert reference.relative_error(there[1], here[1].double()) < (1e-4 if plain else 2e-2)


@pytest.mark.parametrize("rule", [RowAdamW(lr=0.01), RowAdagrad(lr=0.1)], ids=["adamw", "adagrad"])
def test_rules_without_a_kernel_train_as_on_the_cpu(rule):
    there, here = trained("cuda", rule), trained("cpu", rule)
    assert there[0] == pytest.approx(here[0], rel=1e-3)


@pytest.mark.parametrize("compute", ["tf32", "bf16"])
def test_low_precision_is_no_worse_than_plain_bf16_code(compute):
    """Over ten draws: of a single one, rounding makes either better."""
    margin, draws, rows = ArcFace(), 10, 130 if INTERPRETED else 1000
    mine, allowed = torch.zeros(3), torch.zeros(3)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        embeddings, labels = (
            torch.randn(64, 128, generator=generator),
            torch.arange(64) * (rows // 64),
        )
        head = flat_head(
            rows, 128, margin, optimizer=PLAIN, device="cuda", compute=compute, seed=seed
        )
        centers = head.centers.detach().cpu()
        own = embeddings.cuda().requires_grad_()
        loss = head(own, labels.cuda())
        loss.backward()
        head.optimizer.step()
        found = (loss.detach().cpu(), own.grad.cpu(), centers - head.centers.detach().cpu())
        positive = reference.positive_logit(margin)
        truth = reference.gradients_of(embeddings, centers, labels, positive, scale=margin.scale)
        plain = reference.plain_gradients(embeddings, centers, labels, margin, torch.bfloat16)
        for errors, values in ((mine, found), (allowed, plain)):
            errors += torch.tensor([*map(reference.relative_error, values, truth)]) / draws
    assert (mine <= 1.05 * allowed).all(), (mine, allowed)


def test_kept_exponentials_change_no_result():
    ends = [trained("cuda", RowSGD(lr=0.1), keep_mib=keep)[1] for keep in (0, 1024)]
    assert torch.equal(ends[0], ends[1])


def test_the_update_beside_the_backward_is_the_same_update():
    """On its own stream, and nobody sees a center before it is updated."""
    ends = [trained("cuda", RowSGD(lr=0.1), overlap=overlap) for overlap in (False, True)]
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(compute):
    """All centers in use: any hidden synchronisation with the host raises here."""
    config = settings(precision={"compute": compute})
    head = flat_head(FEW, 64, ArcFace(scale=16), optimizer=RowSGD(lr=0.1), device="cuda")
    model = assemble(config, Runtime(Ranks(), torch.device("cuda")), Flat(8, 64), head)
    images, identities = (part.cuda() for part in batch(0, 64, identities=FEW))
    losses = [train_step(model, config, images, identities, 0.05).loss]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6 if INTERPRETED else 30):
            losses.append(train_step(model, config, images, identities, 0.05).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses[-1] < losses[0]


def test_a_bad_image_changes_nothing_without_the_host():
    config = settings()
    head = flat_head(FEW, 64, ArcFace(scale=16), optimizer=RowSGD(lr=0.1), device="cuda")
    model = assemble(config, Runtime(Ranks(), torch.device("cuda")), Flat(8, 64), head)
    images, identities = (part.cuda() for part in batch(0, 64, identities=FEW))
    train_step(model, config, images, identities, 0.05)
    before = [model.head.centers.detach().clone(), model.backbone.project.weight.detach().clone()]
    images[3] = torch.nan
    assert train_step(model, config, images, identities, 0.05).skipped == 1
    assert torch.equal(model.head.centers, before[0])
    assert torch.equal(model.backbone.project.weight, before[1])
