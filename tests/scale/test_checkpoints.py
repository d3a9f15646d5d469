"""Checkpoints of a thousand ranks, as real files: what each opens and reads, and many of them."""

import json
import sys
from collections import Counter
from math import gcd

import pytest

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.disk import Disk
from partialfc.status.run import MOST_CHECKPOINTS, RunFolder
from tests.checkpoint.test_checkpoint import save
from tests.support.models import runtime
from tests.support.processes import python

pytestmark = pytest.mark.slow


def done(folder, *words):
    """What each word comes to; see :mod:`tests.support.many_ranks_files`."""
    found = python("-m", "tests.support.many_ranks_files", folder, *words, timeout=900)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith(("[", "{"))]
    return [json.loads(line) for line in lines]


def most(counts):
    """The largest number of each kind that any rank has."""
    joined = Counter()
    for one in counts:
        joined |= Counter(one)
    return dict(joined)


def total(counts, kind):
    return sum(one.get(kind, 0) for one in counts)


OWN = {
    f"{part}.{what}": 1 for part in ("statistics", "centers") for what in ("json", "safetensors")
}
"""What every rank writes for itself."""
WHOLE = {"backbone.safetensors": 1, "optimizer.safetensors": 1, "head.safetensors": 1}
"""What every rank reads, once."""


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few ranks: what they write, and what fewer and as many read of it."""
    return done(tmp_path_factory.mktemp("few"), "save:8:32", "load:8:24", "load:8:32")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """As above a thousand ranks; and what they read of it when the fewer have saved in turn."""
    words = "save:1:1024", "load:1:768", "load:1:1024:16", "save:2:768", "load:2:1024:7"
    return done(tmp_path_factory.mktemp("many"), *words)


def test_a_rank_writes_as_many_files_of_a_thousand_ranks(few, many):
    """Its parts and their notes; rank 0 what all share, and a manifest of the same length."""
    for saved in (few[0], many[0], many[3]):
        *others, leader = saved
        assert all(one.keys() - {"bytes said"} == OWN.keys() for one in others)
        assert most(others) == {**OWN, "bytes said": most(others)["bytes said"]}
        assert leader == {**OWN, **WHOLE, "manifest.json": 1, "bytes said": leader["bytes said"]}
        assert most(saved)["bytes said"] < 8192
    assert abs(few[0][-1]["bytes said"] - many[0][-1]["bytes said"]) < 32  # digits


def test_parts_of_1024_ranks_are_read_by_768_with_one_or_two_opens_each(few, many):
    """Every rank opened all of them: 786,432 opens, and 43 GB of manifests."""
    for elastic, parts, ranks in ((few[1], 32, 24), (many[1], 1024, 768)):
        counts = elastic["load"]
        assert len(counts) == ranks
        assert total(counts, "centers.safetensors") == parts + ranks - gcd(parts, ranks)
        assert most(counts)["centers.safetensors"] == most(counts)["centers.json"] == 2
        assert most(counts)["manifest.json"] == 1
        assert {kind: most(counts)[kind] for kind in WHOLE} == WHOLE
        assert "statistics.safetensors" not in most(counts)  # the mean is the backbone's
        assert most(counts)["bytes said"] < 8192


def test_parts_of_768_ranks_are_read_by_1024_with_one_or_two_opens_each(many):
    """Every rank finds its rows, states and neighbours, which are functions of the row."""
    counts = many[4]["load"]
    for number, one in enumerate(counts):
        quarters = range(3 * 7 * number, 3 * 7 * number + 3)  # of a part, that rank 7 n needs
        assert one["centers.safetensors"] == quarters[-1] // 4 - quarters[0] // 4 + 1
    assert most(counts)["bytes said"] < 8192


def test_as_many_ranks_open_their_own_part_alone(few, many):
    for same in (few[2], many[2]):
        found = most(same["load"])
        assert found["centers.safetensors"] == found["statistics.safetensors"] == 1
        assert found["bytes said"] < 8192


def test_looking_whether_all_files_are_there_is_a_share_of_each_rank(few, many):
    for found in (few[1], few[2], many[1], many[2], many[4]):
        opens = [
            sum(count for kind, count in one.items() if kind.endswith("safetensors"))
            for one in found["look"]
        ]
        assert max(opens) <= 4  # two parts a rank, and those that a cut goes through
        assert most(found["look"])["manifest.json"] == 1
    looks = many[1]["look"]
    assert sum(total(looks, f"{part}.safetensors") for part in ("centers", "statistics")) >= 2048


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
