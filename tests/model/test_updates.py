"""Lion, LAMB, Muon and schedule-free: by plain loops, by the libraries, skipped and resumed."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.checkpoint import loading as checkpoint
from partialfc.config import ConfigError
from partialfc.model import updates
from partialfc.model.build import assemble
from partialfc.model.optimizer import clip, set_rate
from partialfc.model.step import train_step
from partialfc.model.updates import Lamb, Lion, MuonAndAdamW, ScheduleFree, ScheduleFreeMean
from tests.support.models import batch, runtime, settings, weights

NAMES = ["lion", "lamb", "muon", "schedule_free"]
RATES = (0.02, 0.03, 0.01, 0.01)


def tensors():
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5,))]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in ((6, 4), (5,))]


def group(weights, decay=0.1, **more):
    return {"params": weights, "lr_factor": 1.0, "weight_decay": decay, **more}


def taken(optimizer, weights):
    """A few steps, the third of which is skipped; copies of the weights after each."""
    after = []
    for step, rate in enumerate(RATES):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient * (math.nan if step == 2 else 1.0)
        for one in optimizer.param_groups:
            one["lr"] = rate
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
        after.append([weight.detach().clone() for weight in weights])
    return after


def counted():
    """(rate, gradients in fp64) of the steps that count."""
    for step, rate in enumerate(RATES):
        if step != 2:
            yield rate, [gradient.double() for gradient in gradients(step)]


def test_lion_is_the_papers_algorithm():
    weights = tensors()
    expected = [weight.detach().double() for weight in weights]
    means = [torch.zeros_like(weight) for weight in expected]
    for rate, step in counted():
        for weight, mean, gradient in zip(expected, means, step, strict=True):
            sign = (0.9 * mean + 0.1 * gradient).sign()
            weight -= rate * (sign + 0.1 * weight)
            mean.mul_(0.99).add_(0.01 * gradient)
    after = taken(Lion([group(weights)], betas=(0.9, 0.99)), weights)[-1]
    for weight, truth in zip(after, expected, strict=True):
        torch.testing.assert_close(weight.double(), truth, rtol=1e-6, atol=1e-7)


def test_lamb_is_the_papers_algorithm_and_does_not_scale_what_does_not_decay():
    matrix, vector = tensors()
    expected = [matrix.detach().double(), vector.detach().double()]
    firsts, seconds = ([torch.zeros_like(one) for one in expected] for _ in range(2))
    for number, (rate, step) in enumerate(counted(), 1):
        for at, decay in enumerate((0.1, 0.0)):
            firsts[at] = 0.9 * firsts[at] + 0.1 * step[at]
            seconds[at] = 0.999 * seconds[at] + 0.001 * step[at] ** 2
            root = (seconds[at] / (1 - 0.999**number)).sqrt() + 1e-6
            update = firsts[at] / (1 - 0.9**number) / root + decay * expected[at]
            ratio = expected[at].norm() / update.norm() if decay else 1.0
            expected[at] = expected[at] - rate * ratio * update
    groups = [group([matrix]), group([vector], decay=0.0)]
    after = taken(Lamb(groups, betas=(0.9, 0.999), eps=1e-6), [matrix, vector])[-1]
    for weight, truth in zip(after, expected, strict=True):
        torch.testing.assert_close(weight.double(), truth, rtol=2e-5, atol=1e-6)


def test_muon_is_torchs_on_matrices_and_torchs_adamw_on_the_rest_to_the_bit():
    matrix, vector = tensors()
    groups = [group([matrix], rotated=True), group([vector], decay=0.0, rotated=False)]
    ours = MuonAndAdamW(groups, momentum=0.95, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    after = taken(ours, [matrix, vector])[-1]
    first, second = tensors()
    muon = torch.optim.Muon([first], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([second], betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for rate, step in counted():
        for one, weight, gradient in zip((muon, adamw), (first, second), step, strict=True):
            weight.grad = gradient.float()
            one.param_groups[0]["lr"] = rate
            one.step()
    assert torch.equal(after[0], first)
    assert torch.equal(after[1], second)


def test_schedule_free_is_its_authors_in_weights_and_in_the_mean():
    """Their counters are on the host, so their own cannot skip a step without a synchronisation."""
    theirs = pytest.importorskip("schedulefree")
    weights, network = tensors(), nn.Module()
    network.matrix, network.vector = weights
    ours = ScheduleFree([group(weights)], betas=(0.9, 0.999), eps=1e-8)
    after = taken(ours, weights)[-1]
    own = tensors()
    reference = theirs.AdamWScheduleFree(own, betas=(0.9, 0.999), weight_decay=0.1)
    reference.train()
    for rate, step in counted():
        for weight, gradient in zip(own, step, strict=True):
            weight.grad = gradient.float()
        reference.param_groups[0]["lr"] = rate
        reference.step()
    torch.testing.assert_close(after, [one.detach() for one in own], rtol=1e-5, atol=1e-6)
    reference.eval()
    mean = ScheduleFreeMean(ours, dict(network.named_parameters()))
    with mean.in_use():
        inside = [weight.detach().clone() for weight in weights]
        torch.testing.assert_close(inside, [one.detach() for one in own], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, inside, mean.tensors.values()))
    assert all(map(torch.equal, weights, after)), "training goes on with its own bits"
    mean.install()
    with mean.in_use():
        assert all(map(torch.equal, weights, inside))
    with torch.no_grad():
        weights[0].add_(1)  # as a warm start gives it other weights
    mean.begin()
    assert all(map(torch.equal, mean.tensors.values(), weights))


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_skipped_steps_change_no_bit(name, monkeypatch):
    """A part is what is updated at once; a skipped first step leaves no trace."""
    config, model = made(name)
    _, other = made(name)
    monkeypatch.setattr(updates, "PART_ELEMENTS", 100)
    images, identities = batch(9, 24)
    images[0] = torch.nan
    before = weights(model)
    assert train_step(model, config, images, identities, 0.01).skipped == 1
    assert all(map(torch.equal, before, weights(model)))
    for step in range(3):
        train_step(model, config, *batch(step, 24), 0.01)
    monkeypatch.undo()
    for step in range(3):
        train_step(other, config, *batch(step, 24), 0.01)
    for one, value in other.backbone.named_parameters():
        assert torch.equal(value, model.backbone.get_parameter(one)), one


class _NeverAsked(TorchDispatchMode):
    """No tensor's value goes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket is not torch.ops.aten._local_scalar_dense, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sgd", "adamw", *NAMES])
def test_a_step_asks_the_device_nothing(name):
    _, model = made(name)
    for number in range(2):
        for one in model.backbone.parameters():
            one.grad = torch.full_like(one, number)
        model.optimizer.found_inf = torch.tensor(0.0)
        with _NeverAsked():
            set_rate(model.optimizer, 0.1)
            clip(model.optimizer, 1.0, each=bool(number))
            model.optimizer.step()
    with pytest.raises(AssertionError), _NeverAsked():
        torch.ones(()).item()


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_checkpoint_changes_no_bit(name, tmp_path):
    """The mean of schedule-free is what every other use of a checkpoint takes."""
    facts = {"seed": 2048}
    config, whole = made(name)
    for step in range(3):
        train_step(whole, config, *batch(step, 24), 0.01)
    path = checkpoint.save(tmp_path, 3, whole, facts, runtime(), keep=1)
    assert (path / "average.safetensors").exists() == (name == "schedule_free")
    _, other = made(name)
    assert checkpoint.load(path, other, facts, runtime()) == 3
    assert all(map(torch.equal, weights(whole), weights(other)))
    for model in (whole, other):
        train_step(model, config, *batch(3, 24), 0.01)
    assert all(map(torch.equal, weights(whole), weights(other)))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_fp16_skips_without_a_trace(name):
    config, model = made(name, precision={"compute": "fp16", "initial_loss_scale": 2.0**26})
    steps = [train_step(model, config, *batch(0, 24), 0.01) for _ in range(40)]
    assert steps[0].skipped == 1
    assert steps[-1].skipped == 0
    assert steps[-1].loss < 0.9 * steps[0].loss


def made(name, **sections):
    schedule = {"name": "linear", "final_factor": 1.0}
    config = settings(optimizer={"name": name, "decay": "matrices"}, schedule=schedule, **sections)
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 16)
    head = PartialFC(40, 16, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    return config, assemble(config, runtime(), nn.Sequential(*layers), head)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"schedule": {"name": "cosine"}}, "final_factor"),
        (
            {"schedule": {"name": "linear", "final_factor": 1.0}, "backbone": {"ema": 0.9}},
            "a mean of the weights",
        ),
        ({"schedule": {"name": "wsd", "final_factor": 1.0, "decay_steps": 9}}, "decay_steps = 9"),
        ({"schedule": {"name": "wsd", "final_factor": 1.0, "shape": "cosine"}}, "shape = "),
        ({"schedule": {"name": "polynomial", "final_factor": 1.0, "power": 3.0}}, "power = 3"),
    ],
)
def test_schedule_free_goes_with_no_schedule_and_no_other_mean(sections, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        settings(optimizer={"name": "schedule_free"}, **sections)
