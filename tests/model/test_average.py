"""The moving average of the backbone: equal to a plain loop, and the one that is measured."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._estimate.backbone import backbone_parts, count
from partialfc.config import ConfigError, load
from partialfc.model.batch_norm import statistics
from partialfc.model.build import assemble
from partialfc.model.step import train_step
from tests.support.models import batch, normed_model, runtime, settings, train_and_stop
from tests.support.places import ROOT
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, killed_at, run

DECAY = 0.3
FACTS = {"seed": 2048}
AVERAGED = {"backbone": {"ema": DECAY}}


def floats(module):
    found = module.state_dict()
    return {name: one.clone() for name, one in found.items() if one.is_floating_point()}


def moved(average, live, step, decay=DECAY):
    """One step of a plain loop over tensors."""
    factor = torch.tensor(1 - min(decay, (1 + step) / (10 + step)))
    return {name: one + (live[name] - one) * factor for name, one in average.items()}


def test_it_is_that_of_a_plain_loop_and_a_skipped_step_changes_nothing():
    config, model = normed_model(**AVERAGED)
    expected = floats(model.backbone)
    for step in range(8):
        images, identities = batch(step, 24)
        if step == 5:
            images = images * torch.nan
        before = floats(model.backbone)
        done = train_step(model, config, images, identities, 0.05)
        assert done.skipped.item() == (step == 5)
        live = floats(model.backbone)
        assert all(torch.equal(live[name], before[name]) == (step == 5) for name in live)
        if step != 5:
            expected = moved(expected, live, step)
        assert expected.keys() == model.average.tensors.keys()
        for name, value in expected.items():
            assert torch.equal(model.average.tensors[name], value), (step, name)
            assert not torch.equal(live[name], value), "a copy of the weights is no average"


def test_the_average_is_measured_and_the_weights_come_back_to_the_bit():
    config, model = normed_model(**AVERAGED)
    for step in range(3):
        train_step(model, config, *batch(step, 24), 0.05)
    live, average = floats(model.backbone), {k: v.clone() for k, v in model.average.tensors.items()}

    def leave_early():
        with model.measured():
            inside = floats(model.backbone)
            assert all(torch.equal(inside[name], average[name]) for name in average)
            raise RuntimeError("an image cannot be decoded")

    with pytest.raises(RuntimeError):
        leave_early()
    after = floats(model.backbone)
    assert all(torch.equal(after[name], live[name]) for name in live)
    assert all(torch.equal(model.average.tensors[name], average[name]) for name in average)


def test_what_is_not_trained_is_not_averaged():
    config = settings(backbone={"ema": DECAY})
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16))
    frozen[1].bias.requires_grad_(False)
    head = PartialFC(40, 16, ArcFace(scale=16), optimizer=RowSGD(lr=0.1))
    assert [*assemble(config, runtime(), frozen, head).average.tensors] == ["1.weight"]


def train_and_stop_on_rank(rank, world_size, folder, stops):
    model = train_and_stop(rank, world_size, folder, stops, FACTS, **AVERAGED)
    return {name: value.numpy().copy() for name, value in model.average.tensors.items()}


def load_on_rank(rank, world_size, path):
    _, model = normed_model(**AVERAGED)
    checkpoint.load(path, model, FACTS, runtime())
    return {name: value.numpy().copy() for name, value in model.average.tensors.items()}


@pytest.mark.distributed
def test_a_resume_goes_on_with_it_bit_for_bit_and_on_any_number_of_ranks(tmp_path):
    """Weights are equal on any number; statistics are each rank's own, or the mean of them."""
    straight = run_on_ranks(2, train_and_stop_on_rank, tmp_path, ())
    stopped = run_on_ranks(2, train_and_stop_on_rank, tmp_path, (1, 3))
    for one, other in zip(straight, stopped, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    path = tmp_path / "step_00000004"
    own = run_on_ranks(2, load_on_rank, path)
    assert not np.array_equal(own[0]["2.running_mean"], own[1]["2.running_mean"])
    alone = load_on_rank(0, 1, path)
    for name, value in alone.items():
        if "running" in name:
            np.testing.assert_allclose(value, (own[0][name] + own[1][name]) / 2, rtol=1e-6)
        else:
            assert np.array_equal(value, own[1][name])


def test_a_run_that_kept_none_goes_on_with_one_that_begins_at_its_weights(tmp_path):
    config, model = normed_model()
    assert model.average is None
    train_step(model, config, *batch(0, 24), 0.05)
    path = checkpoint.save(tmp_path, 1, model, FACTS, runtime(), keep=9)
    assert "average.safetensors" not in checkpoint_folder.read_manifest(path)["files"]
    _, other = normed_model(**AVERAGED)
    checkpoint.load(path, other, FACTS, runtime())
    trained = floats(model.backbone)
    for name, value in other.average.tensors.items():
        assert torch.equal(value, trained[name])


def test_a_decay_of_one_is_refused():
    config = str(ROOT / "configs" / "demo.toml")
    with pytest.raises(ConfigError, match=r"backbone\.ema = 1\.0"):
        load(config, ["backbone.ema=1.0"])


def test_the_estimate_has_its_bytes():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16)).to("meta")
    found = count(layers, (4, 3, 4, 4))
    size = (48 * 16 + 16 + 2 * 16 + 2 * 16) * 4
    for decay, expected in ((0.0, 0), (0.999, size)):
        parts = {
            one.name: one for one in backbone_parts(settings(backbone={"ema": decay}), found, 1)
        }
        assert parts["average"].bytes == (expected,) * 4
        assert parts["distance to the average"].bytes == (0, 0, expected, 0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_goes_on_with_its_average_on_another_number_of_ranks(packs, tmp_path):
    """Every checkpoint has the step of a plain loop over the weights of all of them."""
    common = [
        f"backbone.ema={DECAY}",
        "run.steps=7",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        *UNVERIFIED,
    ]
    killed = killed_at(4, packs, tmp_path, *common)
    assert killed.returncode == -9, killed.stderr
    resumed = run(packs, tmp_path, *common)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stdout

    def tensors(step, file):
        path = tmp_path / "checkpoints" / f"step_{step:08d}" / f"{file}.safetensors"
        return {name: torch.from_numpy(one) for name, one in load_file(path).items()}

    for step in range(1, 7):
        average, live = tensors(step, "average"), tensors(step + 1, "backbone")
        expected = moved(average, {name: live[name] for name in average}, step)
        for name, found in tensors(step + 1, "average").items():
            if "running" in name:
                torch.testing.assert_close(found, expected[name])
            else:
                assert torch.equal(found, expected[name]), (step, name)
    last = tensors(7, "average")
    assert open_backbone(tmp_path).place == tmp_path / "checkpoints" / "step_00000007"
    opened = open_backbone(tmp_path).state
    assert all(torch.equal(opened[name], value) for name, value in last.items())
    assert statistics(open_backbone(tmp_path).backbone()).keys() <= last.keys()
