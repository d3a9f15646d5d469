"""What several ranks of the trainer must agree on."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from partialfc import (
    CurricularFace,
    Nearest,
    RowAdagrad,
    RowSGD,
    Softmax,
    SubCenterArcFace,
)
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.disk import Disk
from partialfc.model.batch_norm import mean_statistics, statistics, with_mean_statistics
from partialfc.model.step import train_step
from tests.support.models import (
    batch,
    flat_model,
    normed_model,
    runtime,
    settings,
    share,
    train_and_stop,
    weights,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

FACTS = {"seed": 2048, "pack": "abc"}


def steps_on_rank(rank, world_size, accumulation=1, poisoned=None, losses=None):
    optimizer = {"name": "sgd", "accumulation": accumulation}
    config = settings(optimizer=optimizer, losses=losses or {})
    model = flat_model(config)
    values, before = [], None
    for step in range(4):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        if step == 3 and poisoned is not None:
            model.head.optimizer.catch_up(None)  # what was missed is none of the bad step's doing
            before = weights(model)
            if rank == poisoned:
                images[0] = torch.inf
        done = train_step(model, config, images, identities, 0.05)
        values.append(done.loss.item())
    unchanged = before is not None and all(map(torch.equal, before, weights(model)))
    return values, unchanged, model.backbone.project.weight.detach().numpy(), done.skipped.item()


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 3), (3, 2), (4, 1)])
def test_ranks_and_micro_batches_do_not_change_the_training(world_size, accumulation):
    alone = steps_on_rank(0, 1)
    for result in run_on_ranks(world_size, steps_on_rank, accumulation):
        assert result[0] == pytest.approx(alone[0], rel=1e-5)
        np.testing.assert_allclose(result[2], alone[2], rtol=1e-4, atol=1e-6)


def test_ranks_do_not_change_the_training_with_every_loss():
    """The pairs, the nearest centers and the means are those of all ranks."""
    every = ("triplet", "contrastive", "uniformity", "center", "inter_class")
    losses = {name: {"weight": 1.0} for name in every}
    alone = steps_on_rank(0, 1, losses=losses)
    assert alone[0] != pytest.approx(steps_on_rank(0, 1)[0], rel=1e-3)
    for result in run_on_ranks(2, steps_on_rank, 1, None, losses):
        assert result[0] == pytest.approx(alone[0], rel=1e-5)
        np.testing.assert_allclose(result[2], alone[2], rtol=1e-4, atol=1e-6)


def poison_on_rank(rank, world_size, what):
    config, model = settings(), flat_model(settings(), rate=1.0)
    for step in range(2):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        if step == 1:
            if rank == 1 and what == "embedding":
                model.backbone.register_forward_hook(lambda *_: _[2] * torch.nan)
            if rank == 1 and what == "gradient":
                model.backbone.project.bias.register_hook(lambda gradient: gradient * torch.inf)
            if rank == 1 and what == "center":
                model.head.centers.data[3, 2] = torch.nan
            before = [value.view(torch.uint8) for value in weights(model)]
        done = train_step(model, config, images, identities, 0.05)
    after = [value.view(torch.uint8) for value in weights(model)]
    return done.skipped.item(), all(map(torch.equal, before, after))


@pytest.mark.parametrize("what", ["embedding", "gradient", "center"])
def test_what_is_not_finite_on_one_rank_changes_no_ranks_weights(what):
    """R12: byte for byte, momentum too."""
    assert run_on_ranks(2, poison_on_rank, what) == [(1, True)] * 2


@pytest.mark.parametrize("poisoned", [0, 1])
def test_one_ranks_bad_image_changes_no_ranks_weights(poisoned):
    for _, unchanged, _, skipped in run_on_ranks(2, steps_on_rank, 1, poisoned):
        assert unchanged
        assert skipped == 1


def statistics_on_rank(rank, world_size):
    module, ranks = nn.BatchNorm1d(3), runtime().ranks
    module.running_mean.fill_(rank)
    mean = mean_statistics(module, ranks)["running_mean"].tolist()
    with with_mean_statistics(module, ranks):
        inside = module.running_mean.tolist()
    return mean, inside, module.running_mean.tolist()


def test_batch_norm_statistics_are_averaged_for_use_and_stay_each_ranks_own():
    found = run_on_ranks(4, statistics_on_rank)
    assert found == [([1.5] * 3, [1.5] * 3, [float(rank)] * 3) for rank in range(4)]


def train_and_stop_on_rank(rank, world_size, folder, stops):
    model = train_and_stop(rank, world_size, folder, stops, FACTS)
    own = {name: value.numpy().copy() for name, value in statistics(model.backbone).items()}
    return own, [value.numpy() for value in weights(model)]


def test_where_a_run_was_stopped_decides_no_bit_of_batch_norm(tmp_path):
    """Averages over ranks of averages over ranks round, so a checkpoint has each rank's own."""
    straight = run_on_ranks(2, train_and_stop_on_rank, tmp_path, ())
    stopped = run_on_ranks(2, train_and_stop_on_rank, tmp_path, (1, 2, 4))
    for (own, expected), (found, values) in zip(straight, stopped, strict=True):
        assert {"2.running_mean", "2.running_var"} == own.keys()
        for name in own:
            assert np.array_equal(own[name], found[name]), name
        assert all(map(np.array_equal, expected, values))
    assert not np.array_equal(straight[0][0]["2.running_mean"], straight[1][0]["2.running_mean"])


def load_statistics_on_rank(rank, world_size, folder):
    _, model = normed_model()
    try:
        checkpoint.load(folder / "step_00000003", model, FACTS, runtime())
    except checkpoint.CheckpointError as error:
        return str(error)
    return statistics(model.backbone)["2.running_mean"].tolist()


def test_another_number_of_ranks_goes_on_with_the_mean_of_their_statistics(tmp_path):
    """And R3: as many ranks as wrote it do not go on without the file of one of them."""
    saved = run_on_ranks(3, train_and_stop_on_rank, tmp_path, (2,))
    assert len(saved) == 3
    path = tmp_path / "step_00000003"
    own = run_on_ranks(3, load_statistics_on_rank, tmp_path)
    assert own[0] != own[1] != own[2]
    for found in run_on_ranks(2, load_statistics_on_rank, tmp_path):
        np.testing.assert_allclose(found, np.mean(own, axis=0), rtol=1e-6)
    for file in path.glob("statistics_000001.*"):
        file.unlink()
    for refused in run_on_ranks(3, load_statistics_on_rank, tmp_path):
        assert "it lacks statistics_000001.json" in refused


HEADS = {
    "fp32": {},
    "fp16, int8, move": {
        "rule": RowSGD(lr=0.1, momentum_format="int8", unsampled="move"),
        "center_format": "fp16",
    },
    "bf16, adagrad": {"rule": RowAdagrad(lr=0.1), "center_format": "bf16"},
    "sub-centers": {"margin": SubCenterArcFace(scale=16)},
    "a margin's average": {"margin": CurricularFace(scale=16, averaging=0.3)},
    "bias": {"margin": Softmax()},
    "nearest": {"negatives": Nearest(neighbours=3, every_steps=2), "canonical_shards": 4},
    "fp8, int8, in host memory": {
        "rule": RowSGD(lr=0.1, momentum_format="int8", unsampled="stay"),
        "center_format": "fp8",
        "centers_in": "host",
        "states_in": "host",
    },
}


def save_on_rank(rank, world_size, folder, head):
    config = settings()
    model = flat_model(config, **HEADS[head])
    for step in range(3):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        train_step(model, config, images, identities, 0.05)
    checkpoint.save(folder, 3, model, FACTS, runtime(), keep=2)
    return global_state(model)


def load_on_rank(rank, world_size, folder, head):
    model = flat_model(settings(), **HEADS[head])
    found = checkpoint.newest(folder, runtime())
    assert checkpoint.load(found, model, FACTS, runtime()) == 3
    before = global_state(model)
    losses = []
    for step in range(3, 6):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        losses.append(train_step(model, settings(), images, identities, 0.05).loss.item())
    return before, losses


def global_state(model):
    """This rank's rows of everything, and what all ranks share."""
    states = model.head.optimizer.state[model.head.centers]
    rows = [model.head.centers, *(states[name] for name in sorted(states))]
    rows += model.head.lists().values()
    shared = [*model.backbone.parameters()]
    shared += [state["momentum_buffer"] for state in model.optimizer.state.values()]
    shared += model.head.shared_state().values()
    return (
        [row.detach().view(torch.uint8).numpy().copy() for row in rows],
        [tensor.detach().numpy().copy() for tensor in shared],
        model.head.optimizer.steps,
    )


def joined(states):
    return [np.concatenate(parts) for parts in zip(*(state[0] for state in states), strict=True)]


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 4), (4, 1), (3, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_moves_between_world_sizes(tmp_path, saved_at, loaded_at, head):
    """Centers, momentum, backbone and its optimizer are byte-equal, and the losses go on."""
    saved = run_on_ranks(saved_at, save_on_rank, tmp_path, head)
    loaded = run_on_ranks(loaded_at, load_on_rank, tmp_path, head)
    for one, other in zip(joined(saved), joined([state for state, _ in loaded]), strict=True):
        assert np.array_equal(one, other)
    for state, losses in loaded:
        assert all(map(np.array_equal, state[1], saved[0][1]))
        assert state[2] == 3
        assert losses == pytest.approx(loaded[0][1])
    straight = flat_model(settings(), **HEADS[head])
    expected = [
        train_step(straight, settings(), *batch(step, 24), 0.05).loss.item() for step in range(6)
    ]
    assert loaded[0][1] == pytest.approx(
        expected[3:], rel=1e-3 if "center_format" in HEADS[head] else 1e-5
    )


class Full(Disk):
    """A disk that takes a header and nothing more."""

    def write(self, file, data):
        if len(data) > 200 and not bytes(data[:9]).endswith(b"{"):
            raise OSError(28, "No space left on device")
        super().write(file, data)


def fail_on_rank(rank, world_size, folder):
    model = flat_model(settings())
    checkpoint.save(folder, 1, model, FACTS, runtime(), keep=1)
    disk = Full() if rank == 1 else None
    try:
        with checkpoint.Saver(folder, FACTS, runtime(), keep=1, disk=disk) as saver:
            saver.save(2, model)
            while saver._pending is not None:
                saver.check()
    except checkpoint.CheckpointError as error:
        return str(error), checkpoint.newest(folder, runtime()).name
    return "", ""


def test_all_ranks_learn_that_one_disk_is_full(tmp_path):
    """R7: one verdict, what was needed and is free, nothing left, and the one before loads."""
    messages, found = zip(*run_on_ranks(2, fail_on_rank, tmp_path), strict=True)
    for said in messages:
        assert "No space left" in said
        assert re.search(r"[1-9][\d,]* bytes needed by rank 1, [1-9][\d,]* free", said)
    assert found == ("step_00000001",) * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
