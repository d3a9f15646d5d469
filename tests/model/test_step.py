"""One optimizer step of the trainer on one rank."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from partialfc import ArcFace, PartialFC
from partialfc.model.batch_norm import Remembered
from partialfc.model.build import assemble
from partialfc.model.step import train_step
from tests.support.models import Flat, batch, flat_model, runtime, settings, weights


def run(config, steps=4, **model):
    made = flat_model(config, **model)
    losses = [train_step(made, config, *batch(step, 24), 0.05).loss.item() for step in range(steps)]
    return losses, weights(made)


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_micro_batches_equal_one_batch(parts):
    """arcface_torch's accumulation is not divided by the number of micro-batches."""
    whole, parted = (
        run(settings(optimizer={"name": "sgd", "accumulation": accumulation, "clip_norm": 1.0}))
        for accumulation in (1, parts)
    )
    assert parted[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(parted[1], whole[1], strict=True):
        assert (one - other).float().norm() <= 1e-5 * other.float().norm()


def test_gradient_is_clipped_to_the_setting():
    moved = {}
    for clip in (0.0, 1e-3):
        config = settings(optimizer={"name": "sgd", "clip_norm": clip, "weight_decay": 0.0})
        model = flat_model(config)
        before = model.backbone.project.weight.detach().clone()
        done = train_step(model, config, *batch(0, 24), 0.05)
        moved[clip] = (model.backbone.project.weight - before).norm() / 0.05
        assert done.gradient_norm > 1e-2, "the recorded norm is that before clipping"
    assert moved[0.0] > 1e-2
    assert moved[1e-3] <= 1.001e-3


def test_rate_of_the_centers_is_a_multiple_of_the_backbones():
    config = settings(head={"optimizer": {"name": "sgd", "lr_factor": 3.0}})
    model = flat_model(config)
    train_step(model, config, *batch(0, 24), 0.05)
    assert model.optimizer.param_groups[0]["lr"] == 0.05
    assert model.head.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)


def test_fp16_skips_together_lowers_the_scale_and_then_learns():
    """Backbone and centers skip the same steps; the first one leaves no garbage in the momentum."""
    config = settings(precision={"compute": "fp16", "initial_loss_scale": 2.0**30})
    model = flat_model(config)
    before = weights(model)
    assert train_step(model, config, *batch(0, 24), 0.05).skipped == 1
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=False)]
    assert not any(changed)
    skips = [train_step(model, config, *batch(0, 24), 0.05) for _ in range(40)]
    assert model.scaler.get_scale() < 2.0**30
    assert skips[-1].skipped == 0
    assert skips[-1].loss < skips[0].loss


@pytest.mark.parametrize(
    "precision", [{"compute": "fp16", "initial_loss_scale": 256.0}, {"compute": "bf16"}]
)
def test_mixed_precision_follows_fp32(precision):
    exact, _ = run(settings(), steps=10)
    mixed, _ = run(settings(precision=precision), steps=10)
    assert mixed == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_non_finite_image_changes_nothing(compute):
    config = settings(precision={"compute": compute})
    model = flat_model(config)
    train_step(model, config, *batch(0, 24), 0.05)
    model.head.optimizer.catch_up(None)  # what was missed before is none of the bad step's doing
    before = weights(model)
    images, identities = batch(1, 24)
    images[5, 0, 0, 0] = torch.nan
    assert train_step(model, config, images, identities, 0.05).skipped == 1
    assert all(map(torch.equal, before, weights(model)))
    assert train_step(model, config, *batch(2, 24), 0.05).skipped == 0


def test_a_bad_batch_leaves_batch_norms_statistics_alone():
    """Weights are gated by the optimizers, but forward has already counted the batch."""
    config = settings(backbone={"channels_last": False})
    head = PartialFC(40, 16, ArcFace(scale=16))
    normalised = nn.Sequential(Flat(8, 16), nn.BatchNorm1d(16))
    model = assemble(config, runtime(), normalised, head)
    train_step(model, config, *batch(0, 24), 0.05)
    before = model.backbone[1].running_var.clone()
    images, identities = batch(1, 24)
    images[0] = torch.nan
    assert train_step(model, config, images, identities, 0.05).skipped == 1
    assert torch.equal(model.backbone[1].running_var, before)
    train_step(model, config, *batch(2, 24), 0.05)
    assert not torch.equal(model.backbone[1].running_var, before)


def test_losses_beside_the_softmax_are_added_and_recorded():
    """By their weights, on the same embeddings; the record has them without."""
    losses = {"triplet": {"weight": 0.5, "margin": 0.4}, "center": {"weight": 2.0}}
    config = settings(losses=losses)
    model, plain = flat_model(config), flat_model(settings())
    images, identities = batch(0, 24)
    done = train_step(model, config, images, identities, 0.05)
    softmax = train_step(plain, settings(), images, identities, 0.05).loss
    assert set(done.terms) == {"triplet", "center"}
    expected = softmax + 0.5 * done.terms["triplet"] + 2.0 * done.terms["center"]
    assert float(done.loss) == pytest.approx(float(expected), rel=1e-6)
    assert done.terms["triplet"] > 0


class _Launches(TorchDispatchMode):
    """Counts operators that are kernels on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        views = {"view", "split_with_sizes", "split", "slice", "detach", "alias"}
        self.count += function.overloadpacket.__name__ not in views
        return function(*arguments, **(options or {}))


def test_statistics_are_kept_and_given_back_in_a_handful_of_launches():
    """A clone, a choice and a copy of each of 150 buffers took longer to start than to run."""
    many = [torch.full((4,), float(i)) for i in range(150)]
    many += [torch.full((), 7.0, dtype=torch.float64), torch.full((2, 3), 8.0)]
    own = [one.clone() for one in many]
    with _Launches() as kept:
        before = Remembered(many)
    for one in many:
        one.fill_(torch.nan)
    with _Launches() as given_back:
        before.restore_where(torch.tensor(True))
    assert all(torch.equal(*pair) for pair in zip(many, own, strict=True))
    assert kept.count + given_back.count < 12
    for one in many:
        one.fill_(1)
    before.restore_where(torch.tensor(False))
    assert all(bool((one == 1).all()) for one in many)
