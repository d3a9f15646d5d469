"""Runs of ten thousand checkpoints: who looks lists their folder, and opens the newest."""

import sys

import pytest

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.disk import Disk
from partialfc.status.run import MOST_CHECKPOINTS, RunFolder
from tests.checkpoint.test_checkpoint import save
from tests.support.models import runtime

pytestmark = pytest.mark.slow

CHECKPOINTS = 10_000


@pytest.fixture
def long_run(tmp_path):
    """Its newest checkpoint is one; the others are folders, which nobody should look into."""
    folder = tmp_path / "checkpoints"
    for step in range(1, CHECKPOINTS):
        checkpoint_folder.path_of(folder, step).mkdir(parents=True)
    save(folder, CHECKPOINTS, keep=CHECKPOINTS)
    return tmp_path


@pytest.fixture
def looks(long_run):
    """Folders of the run that are listed, and its files that are opened."""
    seen, wanted = [], [str(long_run)]

    def note(event, words):
        looked = wanted and event in ("os.scandir", "os.listdir", "open")
        if looked and str(words[0]).startswith(wanted[0]):
            seen.append((event, str(words[0])))

    sys.addaudithook(note)
    yield seen
    wanted.clear()


def listings(looks, folder):
    return sum(path == str(folder) for event, path in looks if event != "open")


def test_what_to_keep_of_ten_thousand_checkpoints_is_one_list(long_run, looks):
    """Each save asks it."""
    folder = long_run / "checkpoints"
    checkpoint_folder.retain(folder, keep=2, keep_every_steps=1, disk=Disk())
    assert listings(looks, folder) == len(looks) == 1
    looks.clear()
    checkpoint_folder.retain(folder, keep=CHECKPOINTS - 2, keep_every_steps=0, disk=Disk())
    assert listings(looks, folder) == 1
    assert len(looks) < 10  # into the two that go
    assert len(checkpoint_folder.steps(folder)) == CHECKPOINTS - 2


def test_the_newest_of_ten_thousand_checkpoints_is_found_by_opening_it_alone(long_run, looks):
    folder = long_run / "checkpoints"
    found = checkpoint.newest(folder, runtime(), content=False)
    assert found == checkpoint_folder.path_of(folder, CHECKPOINTS)
    assert listings(looks, folder) <= 3
    opened = {path for event, path in looks if event == "open"}
    assert opened
    assert all(path.startswith(str(found)) for path in opened)


def test_a_page_of_ten_thousand_checkpoints_looks_at_the_newest(long_run, looks):
    run = RunFolder(long_run)
    assert run.look().checkpoints[0].step == CHECKPOINTS
    assert listings(looks, long_run / "checkpoints") == 1
    assert len(looks) < 10 + MOST_CHECKPOINTS
    looks.clear()
    assert run.look().checkpoints[0].step == CHECKPOINTS
    assert listings(looks, long_run / "checkpoints") == 1
    assert not any("step_0001" in path for _, path in looks)
