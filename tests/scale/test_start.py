"""What a start and a step ask of other ranks: as often with 4,096 of them as with 64."""

import json

import numpy as np
import pytest

from partialfc.distributed.links import rounds
from tests.support.processes import python

pytestmark = pytest.mark.slow

SETTINGS = """
[run]
folder = "{folder}/run"
steps = 10
plugins = "tests.support.speech"
device = "cpu"
[data]
kind = "arrays"
train = "{folder}/a.npy"
labels = "{folder}/labels.npy"
shape = [16, 24]
global_batch = 8192
[backbone]
name = "tests.support.speech:XVector"
embedding_dim = 8
[precision]
compute = "fp32"
[schedule]
warmup_steps = 0
[verification]
every_steps = 0
[log]
tensorboard = false
progress = false
every_steps = 100
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    np.save(folder / "a.npy", np.zeros((16384, 16, 24), np.uint8))
    np.save(folder / "labels.npy", np.arange(16384) % 5000)
    (folder / "settings.toml").write_text(SETTINGS.format(folder=folder))
    return folder / "settings.toml"


def counts(settings, rank, ranks):
    done = python("-m", "tests.support.one_of_many", settings, rank, ranks, 3)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def few(settings):
    return counts(settings, 5, 64)


@pytest.fixture(scope="module")
def many(settings):
    return counts(settings, 5, 4096)


def test_a_start_asks_as_often(few, many):
    """The table of launch/README: nothing of it is asked of each rank in turn."""
    for what in ("collectives", "bytes"):
        assert many["start"][what] == few["start"][what]
    assert sum(many["start"]["collectives"].values()) < 20
    assert many["start"]["bytes"] < 4096
    assert many["files"] == few["files"]
    connections = [found["start"]["on links"]["links"] for found in (few, many)]
    assert connections == [3 * 2 * rounds(64), 3 * 2 * rounds(4096)]


def test_a_flag_is_a_message_for_each_doubling_of_the_ranks(few, many):
    """It was a ring of gloo among the hosts: 8,190 messages of a rank, in turn."""
    for found, ranks in ((few, 64), (many, 4096)):
        messages = rounds(ranks)
        assert found["step"]["on links"] == {"links": 0, "sent": messages, "bytes": 5 * messages}
    assert many["step"]["collectives"] == few["step"]["collectives"]
    assert sum(many["step"]["collectives"].values()) == 3  # the head's
