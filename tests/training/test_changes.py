"""What is not as it was when a run goes on is said."""

import json

import pytest

from partialfc.config import Config, config_hash, to_toml
from partialfc.data.order import Order
from partialfc.training.changes import what_changed
from partialfc.training.data import TrainingData
from partialfc.training.stages import Span, Stage
from tests.checkpoint.test_checkpoint import save, signed

ORDER = Order(1000, 10, 0, "drop")


def settings(**sections):
    data = {"train": "unused.rec", "global_batch": 10}
    return Config.model_validate({"data": data, **sections})


def whole(config):
    """A run without stages."""
    span = Span(last=config.run.steps, global_batch=10, steps_per_epoch=100)
    return Stage("", config, TrainingData(None, ORDER, config.run.steps), span)


@pytest.fixture
def found(tmp_path):
    """A checkpoint of step 50 of 100, and the settings that it keeps."""
    path, config = save(tmp_path, 50), settings(run={"steps": 100})
    facts = {"config_hash": config_hash(config)}
    signed(path, lambda m: m["facts"].update(facts) or m.update(settings=to_toml(config)))
    return path


def test_the_settings_that_differ_are_named_and_the_jump_of_the_rate(found):
    """More steps changed the rate by a jump, and nothing was said."""
    more = settings(run={"steps": 200}, optimizer={"name": "sgd", "weight_decay": 0.001})
    named, jump = what_changed(found, whole(more))
    assert "going on with other settings: optimizer.weight_decay = 0.001, was 0.0005" in named
    assert "; run.steps = 200, was 100." in named
    assert jump == ("the learning rate goes on at 0.075; by the checkpoint's settings it was 0.05.")


def test_what_changes_no_result_is_not_mentioned(found):
    same = settings(run={"steps": 100, "folder": "elsewhere"}, log={"every_steps": 3})
    assert not list(what_changed(found, whole(same)))


def test_settings_of_another_version_are_not_compared(found):
    signed(found, lambda manifest: manifest.update(settings="[head]\nolder = 1\n"))
    assert json.loads((found / "manifest.json").read_text())["settings"]
    (said,) = what_changed(found, whole(settings(run={"steps": 7})))
    assert "settings that are not those it was written with" in said
