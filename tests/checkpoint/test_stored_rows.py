"""Rows of a checkpoint a piece at a time are those of its head, to the last bit."""

import pytest
import torch

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint import stored_rows
from partialfc.config import ConfigError
from partialfc.errors import CheckpointError
from partialfc.head.centers import stored_centers
from partialfc.model import build
from partialfc.model.step import train_step
from tests.model.test_heads import HEADS
from tests.model.test_heads import settings as several_heads
from tests.support.models import Flat, batch, runtime, settings

FP16 = {"center_format": "fp16", "optimizer": {"name": "sgd", "momentum_format": "int8"}}
FP8 = {"center_format": "fp8", "optimizer": {"name": "sgd", "momentum_format": "int8"}}


@pytest.mark.parametrize(
    "head",
    [
        {},
        FP16,
        FP8,
        {"optimizer": {"name": "sgd", "unsampled": "stay"}},
        {"optimizer": {"name": "adamw"}},
        {"sample_rate": 1.0},
        {"margin": {"name": "subcenter_arcface"}},
        {"negatives": "nearest"},
    ],
    ids=["moves", "fp16", "fp8", "stays", "adamw", "every row", "several centers", "nearest"],
)
@pytest.mark.parametrize("rows", [7, 1000])
def test_rows_in_pieces_are_those_of_the_head(tmp_path, monkeypatch, head, rows):
    """Rows that were not sampled are behind; rounding is a function of the row among all."""
    config = settings(head={"sample_rate": 0.3, **head}, backbone={"embedding_dim": 16})
    torch.manual_seed(0)
    made = build._head(config, runtime(), 40, 0)
    model = build.assemble(config, runtime(), Flat(8, 16), made)
    for step in range(5):
        train_step(model, config, *batch(step, 24), 0.05)
    path = checkpoint.save(tmp_path, 5, model, {}, runtime(), keep=1)
    before = stored_centers(made.centers, made.optimizer.states()).clone()
    made.optimizer.catch_up(None)
    expected = stored_centers(made.centers, made.optimizer.states())
    if (
        getattr(config.head.optimizer, "unsampled", "stay") == "move"
        and config.head.sample_rate < 1
    ):
        assert not torch.equal(before, expected), "no row is behind"
    monkeypatch.setattr(stored_rows, "_PIECE_BYTES", 4 * 16 * rows)
    stored = stored_rows.StoredRows(path, config)
    found = [*stored]
    assert len(found) == -(-40 // stored.piece)
    assert torch.equal(torch.cat(found), expected)
    assert (stored.num_identities, stored.seed) == (40, made.seed)


def test_a_run_with_several_heads_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="people, things, and this is for runs with one head"):
        stored_rows.StoredRows(tmp_path, several_heads(heads=HEADS))


def test_a_file_without_what_unsampled_rows_missed_is_named(tmp_path, monkeypatch):
    config = settings(head={"sample_rate": 0.3}, backbone={"embedding_dim": 16})
    model = build.assemble(config, runtime(), Flat(8, 16), build._head(config, runtime(), 40, 0))
    path = checkpoint.save(tmp_path, 0, model, {}, runtime(), keep=1)
    monkeypatch.setattr(stored_rows, "read_tensors", lambda *_, **__: {})
    with pytest.raises(CheckpointError, match=f"{path}: it lacks the tensor moves"):
        [*stored_rows.StoredRows(path, config)]
