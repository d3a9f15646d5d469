"""Checkpoints of several copies of the class centers: written once, read by any layout."""

import numpy as np
import pytest
import torch

from partialfc import CurricularFace, Nearest, RowSGD
from partialfc.checkpoint import loading as checkpoint
from partialfc.errors import CheckpointError
from partialfc.model.step import train_step
from tests.support.models import batch, flat_model, runtime, settings, share
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

FACTS = {"seed": 2048, "pack": "abc"}
HEADS = {
    "fp16, int8, move": {
        "rule": RowSGD(lr=0.1, momentum_format="int8", unsampled="move"),
        "center_format": "fp16",
    },
    "a margin's average, nearest": {
        "margin": CurricularFace(scale=16, averaging=0.3),
        "negatives": Nearest(neighbours=3, every_steps=2),
    },
}


def model_of(head, ranks_per_copy):
    settings_of = {"canonical_shards": 8, **HEADS[head]}
    model = flat_model(settings(), ranks_per_copy=ranks_per_copy, **settings_of)
    # DDP sums the gradients of its very first backward in another order, as build() knows.
    (0.0 * model.embed(torch.zeros(6, 3, 8, 8)).sum()).backward()
    model.optimizer.zero_grad()
    return model


def steps(model, rank, world_size, numbers):
    losses = []
    for step in numbers:
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        losses.append(train_step(model, settings(), images, identities, 0.05).loss.item())
    return losses


def rows_of(model):
    """Bits of the rows of this rank and all that belongs to them, and the first of them."""
    head = model.head
    states = {"centers": head.centers, **head.optimizer.states(), **head.lists()}
    shared = {name: value.clone() for name, value in head.shared_state().items()}
    bits = {name: value.detach().view(torch.uint8).numpy().copy() for name, value in states.items()}
    return head.owned.start, bits, shared


def save_on_rank(rank, world_size, folder, ranks_per_copy):
    found = {}
    for head in HEADS:
        model = model_of(head, ranks_per_copy)
        steps(model, rank, world_size, range(3))
        checkpoint.save(folder / head, 3, model, FACTS, runtime(), keep=2)
        found[head] = rows_of(model), steps(model, rank, world_size, range(3, 6)), rows_of(model)
    return found


def load_on_rank(rank, world_size, folder, ranks_per_copy):
    found = {}
    for head in HEADS:
        model = model_of(head, ranks_per_copy)
        path = checkpoint.newest(folder / head, runtime())
        assert checkpoint.load(path, model, FACTS, runtime()) == 3
        found[head] = rows_of(model), steps(model, rank, world_size, range(3, 6)), rows_of(model)
    return found


def whole(results, head, part):
    """All rows, from the first copy of each; all others must be the same."""
    found = {}
    for result in results:
        first, bits, shared = result[head][part]
        if first in found:
            assert all(np.array_equal(bits[name], found[first][0][name]) for name in bits)
        found[first] = bits, shared
    parts = [found[first][0] for first in sorted(found)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, 2), (4, None)),
        ((4, None), (4, 2)),
        ((4, 2), (2, 1)),
        ((2, 1), (4, 2)),
        ((4, 2), (1, None)),
        ((1, None), (4, 2)),
    ],
    ids=str,
)
def test_any_layout_goes_on_from_any_other_bit_for_bit(tmp_path, saved, loaded):
    """Every row is written once; the layout that wrote it goes on as if it had not stopped."""
    before = run_on_ranks(saved[0], save_on_rank, tmp_path, saved[1])
    after = run_on_ranks(loaded[0], load_on_rank, tmp_path, loaded[1])
    again = run_on_ranks(saved[0], load_on_rank, tmp_path, saved[1])
    for head in HEADS:
        names = [path.name for path in (tmp_path / head / "step_00000003").glob("centers_*")]
        per_copy = saved[1] or saved[0]
        assert len([name for name in names if name.endswith("safetensors")]) == per_copy
        expected, there = whole(before, head, 0), whole(after, head, 0)
        for name, bits in expected.items():
            assert np.array_equal(bits, there[name]), f"{head}: {name}"
        losses = after[0][head][1]
        assert losses == pytest.approx(before[0][head][1], rel=1e-3 if "fp16" in head else 1e-5)
        assert again[0][head][1] == before[0][head][1], "resumed, to the last bit"
        expected, there = whole(before, head, 2), whole(again, head, 2)
        assert all(np.array_equal(expected[name], there[name]) for name in expected)


def spoil_on_rank(rank, world_size, folder):
    model = model_of("a margin's average, nearest", 2)
    steps(model, rank, world_size, range(2))
    if rank == 3:  # a flipped bit in one memory
        model.head.centers.data.view(torch.int32)[2, 5] ^= 1
    try:
        checkpoint.save(folder, 2, model, FACTS, runtime(), keep=1)
    except CheckpointError as error:
        return str(error)
    return ""


def test_copies_that_differ_in_one_bit_are_not_saved_and_named_on_every_rank(tmp_path):
    for said in run_on_ranks(4, spoil_on_rank, tmp_path):
        assert "centers: ranks 1, 3 hold the same rows, and their bits differ" in said
    assert not [*tmp_path.iterdir()]
