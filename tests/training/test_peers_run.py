"""Runs that lose a host and go on from copies, as a user starts them."""

import shutil

import pytest

from partialfc.checkpoint.peers.run import LINE
from tests.support.peers import memory_of, on_hosts
from tests.support.runs import losses
from tools.bench._faults.runs import tensors

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RULES = (
    "run.steps=9",
    "head.sample_rate=0.5",
    "head.negatives=nearest",
    "head.center_format=fp16",
    "head.optimizer.momentum_format=int8",
    "backbone.ema=0.9",
)
COPIES = (*RULES, "checkpoint.peers_every_steps=2", "checkpoint.every_steps=0")
FILES = (*RULES, "checkpoint.every_steps=4")


def lost(packs, folder, *, at=6):
    """Four hosts, all of which die; the memory of the last is gone, and the last copy is of 4."""
    dead = on_hosts(packs, folder, *COPIES, hosts=[0, 1, 2, 3], dies_at=at)
    assert dead.returncode == -9, dead.stderr
    shutil.rmtree(memory_of(folder, 3))
    assert not [*folder.glob("checkpoints/*")]


def assert_equal(one, other):
    assert losses(one) == losses(other)
    expected, found = tensors(one, 9), tensors(other, 9)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def test_with_a_spare_host_it_ends_as_if_none_was_lost(packs, tmp_path):
    """R21: losses, weights, rows, momenta, averages and statistics; nothing is left behind."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    lost(packs, run, at=5)
    done = on_hosts(packs, run, *COPIES, hosts=[0, 1, 2, 7])
    assert done.returncode == 0, done.stderr
    assert "step 4 is whole in the memory of 4 hosts, as 4 ranks left it" in done.stdout
    done = on_hosts(packs, straight, *RULES, "checkpoint.every_steps=0", hosts=[0, 1, 2, 3])
    assert done.returncode == 0, done.stderr
    assert_equal(run, straight)
    assert not any([*memory_of(run, host).iterdir()] for host in (0, 1, 2, 7))
    assert not (run / LINE).exists()


@pytest.mark.parametrize(("hosts", "each"), [([0, 1, 2], 1), ([2, 0, 1], 2)])
def test_on_other_ranks_it_goes_on_as_from_the_checkpoint_of_that_step(
    hosts, each, packs, tmp_path
):
    run, saved = tmp_path / "run", tmp_path / "saved"
    lost(packs, run, at=5)
    dead = on_hosts(packs, saved, *FILES, hosts=[0, 1, 2, 3], dies_at=5)
    assert dead.returncode == -9, dead.stderr
    for folder, words in ((run, COPIES), (saved, FILES)):
        done = on_hosts(packs, folder, *words, hosts=hosts, each=each)
        assert done.returncode == 0, done.stderr
    assert_equal(run, saved)


def test_a_newer_checkpoint_goes_before_copies_and_they_before_an_older_one(packs, tmp_path):
    run = tmp_path / "run"
    both = (*COPIES[:-1], "checkpoint.every_steps=3")
    dead = on_hosts(packs, run, *both, hosts=[0, 1], dies_at=3)  # copies of 2, a checkpoint of 3
    assert dead.returncode == -9, dead.stderr
    dead = on_hosts(packs, run, *both, hosts=[0, 1], dies_at=5)
    assert "going on from" in dead.stdout
    assert "step_00000003" in dead.stdout  # and now there are copies of 4
    dead = on_hosts(packs, run, *both, hosts=[0, 1], dies_at=5)
    assert "step 4 is whole in the memory of 2 hosts" in dead.stdout
    dead = on_hosts(packs, run, *FILES, hosts=[0, 1], dies_at=5)  # without copies
    assert "step_00000003" in dead.stdout
    dead = on_hosts(packs, run, *both, hosts=[0, 1], dies_at=5)
    assert "step_00000004" in dead.stdout, "copies that another start has left behind came back"
