"""One rank's checkpoints; tests/distributed moves them between world sizes."""

import json
import random
import shutil

import pytest
import torch

from partialfc import checkpoint
from partialfc.checkpoint import CheckpointError
from partialfc.train import train_step
from tests.models import batch, flat_model, runtime, settings, weights

FACTS = {"pack": "abc", "run.seed": 2048}


def trained(steps=1):
    config, model = settings(), flat_model(settings())
    for step in range(steps):
        train_step(model, config, *batch(step, 24), 0.05)
    return model


def save(folder, step, model=None, keep=9):
    return checkpoint.save(folder, step, model or trained(), FACTS, runtime(), keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_and_the_runs_own_settings_stay(tmp_path):
    model = trained(3)
    path = save(tmp_path, 3, model)
    other = flat_model(settings())
    other.optimizer.param_groups[0]["momentum"] = 0.5
    assert checkpoint.load(path, other, FACTS, runtime()) == 3
    assert all(map(torch.equal, weights(other), weights(model)))
    assert other.head.optimizer.steps == 3
    assert other.optimizer.param_groups[0]["momentum"] == 0.5


def test_states_keep_the_memory_layout_of_their_parameter(tmp_path):
    """torch's fused kernels pair elements by memory order and do not look at strides."""
    model = trained()
    weight = model.backbone.project.weight
    save(tmp_path, 1, model)
    other = flat_model(settings())
    other.backbone.project.weight.data = other.backbone.project.weight.data.T.contiguous().T
    checkpoint.load(tmp_path / "step_00000001", other, FACTS, runtime())
    restored = other.backbone.project.weight
    state = other.optimizer.state[restored]["momentum_buffer"]
    assert state.stride() == restored.stride() != weight.stride()
    assert torch.equal(state, model.optimizer.state[weight]["momentum_buffer"])


def test_only_the_newest_are_kept_and_only_checkpoints_are_touched(tmp_path):
    (tmp_path / "step_00000001_best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["notes.txt", "step_00000001_best", "step_00000003", "step_00000010"]
    assert checkpoint.newest(tmp_path, runtime()).name == "step_00000010"


def test_a_corrupt_newest_one_is_set_aside_and_its_step_can_be_written_again(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "backbone.safetensors").write_bytes(b"short")
    assert checkpoint.newest(tmp_path, runtime()).name == "step_00000001"
    assert "backbone.safetensors has 5 bytes" in capsys.readouterr().out
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".step_00000002.invalid", "step_00000002"]
    assert checkpoint.verify(tmp_path / "step_00000002") is None


def test_when_none_is_valid_nothing_is_touched(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in it is valid"):
        checkpoint.newest(tmp_path, runtime())
    assert names(tmp_path) == ["step_00000001"]


def test_a_look_from_outside_touches_nothing(tmp_path, capsys):
    """Another process may be writing what looks like a leftover."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "backbone.safetensors").write_bytes(b"short")
    (tmp_path / ".step_00000003.partial").mkdir()
    before = names(tmp_path)
    assert checkpoint.newest(tmp_path, runtime(), tidy=False).name == "step_00000001"
    assert names(tmp_path) == before


def test_what_a_kill_left_is_removed(tmp_path):
    save(tmp_path, 1)
    for leftover in (".step_00000002.partial", ".step_00000000.deleted"):
        (tmp_path / leftover / "x").mkdir(parents=True)
    checkpoint.newest(tmp_path, runtime())
    assert names(tmp_path) == ["step_00000001"]


def test_no_checkpoint_is_overwritten(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no checkpoint is ever overwritten"):
        save(tmp_path, 1)
    assert checkpoint.verify(tmp_path / "step_00000001") is None


def test_every_damage_is_found(tmp_path):
    """Flipped bytes, cut, missing and swapped files, an edited manifest."""
    path = save(tmp_path, 1)
    copy = tmp_path / "copies" / path.name
    chance = random.Random(0)

    def damaged(change):
        shutil.copytree(path, copy)
        change()
        problem = checkpoint.verify(copy)
        shutil.rmtree(copy)
        return problem

    files = sorted(copy / file.name for file in path.iterdir())

    def flip():
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)

    def cut():
        file = chance.choice(files)
        data = file.read_bytes()
        file.write_bytes(data[: chance.randrange(len(data))])

    def swap():
        one, other = chance.sample(files, 2)
        one.rename(copy / "x")
        other.rename(one)
        (copy / "x").rename(other)

    def edit():
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["step"] = 2
        (copy / "manifest.json").write_text(json.dumps(manifest))

    assert damaged(lambda: None) is None
    for change in [flip] * 60 + [cut] * 20 + [swap] * 6 + [edit]:
        assert damaged(change), change.__name__
    for file in files:
        assert damaged(file.unlink), file.name


def test_another_run_is_named_by_what_differs(tmp_path):
    path = save(tmp_path, 1)
    for facts, message in (
        ({**FACTS, "run.seed": 7}, "run.seed = 2048, this run has 7"),
        ({**FACTS, "new": 1}, "new = null, this run has 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, flat_model(settings()), facts, runtime())
    with pytest.raises(CheckpointError, match="num_identities = 40, this run has 41"):
        checkpoint.load(path, flat_model(settings(), identities=41), FACTS, runtime())
