"""Runs on hosts that share no disk, as a user starts them: ``checkpoint.shared = false``."""

import shutil

import pytest

from partialfc.checkpoint.folder import path_of, steps
from partialfc.definitions.phrases import to_value
from tests.support.peers import disk_of, memory_of, on_hosts
from tests.support.runs import losses
from tests.training.test_peers_run import RULES, assert_equal

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARED = (*RULES, "checkpoint.every_steps=2")
LOCAL = (*SHARED, "checkpoint.shared=false")


def killed(packs, folder, *words, hosts, each=1, at=7):
    dead = on_hosts(packs, folder, *words, hosts=hosts, each=each, dies_at=at)
    assert dead.returncode == -9, dead.stderr
    return dead.stdout


def ended(packs, folder, *words, hosts, each=1):
    done = on_hosts(packs, folder, *words, hosts=hosts, each=each)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept(folder, host):
    return [path.name for path in steps(disk_of(folder, host) / "checkpoints")]


def together(folder, hosts):
    """One folder of what all hosts have, as rsync makes it."""
    for host in hosts:
        shutil.copytree(disk_of(folder, host), folder, dirs_exist_ok=True)
    shutil.copy2(disk_of(folder, hosts[0]) / "metrics.jsonl", folder)  # rank 0's records
    return folder


@pytest.mark.parametrize(("hosts", "each"), [([0, 1], 2), ([0, 1, 6], 1)])
def test_it_ends_as_on_a_shared_disk_on_the_same_ranks_and_others(hosts, each, packs, tmp_path):
    """R1, R2: losses, weights, rows, momenta, averages and statistics, after a SIGKILL; each host
    keeps and removes its own."""
    local, shared = tmp_path / "local", tmp_path / "shared"
    for folder, words in ((local, LOCAL), (shared, SHARED)):
        killed(packs, folder, *words, hosts=[0, 1], each=2)
    for host in (0, 1):
        assert kept(local, host) == ["step_00000004", "step_00000006"]
    of_hosts = [
        {path.name for path in path_of(disk_of(local, host) / "checkpoints", 6).iterdir()}
        for host in (0, 1)
    ]
    assert of_hosts[0] & of_hosts[1] == {"manifest.json"}
    for folder, words in ((local, LOCAL), (shared, SHARED)):
        said = ended(packs, folder, *words, hosts=hosts, each=each)
        assert "step_00000006" in said
    for host in hosts:
        assert kept(local, host) == (["step_00000008", "step_00000009"])
        assert (disk_of(local, host) / "config.toml").exists()
    assert_equal(together(local, hosts), shared)
    again = ended(packs, local, *LOCAL, hosts=hosts, each=each)  # the summary is rank 0's alone
    assert "the run ended at step 9" in again


def test_a_start_without_a_disk_is_refused_unless_an_older_step_is_whole(packs, tmp_path):
    """It never begins anew; with the disk it goes on, whichever rank has which host."""
    run, words = tmp_path / "run", (*LOCAL, "checkpoint.keep=9")
    killed(packs, run, *words, hosts=[0], each=2, at=3)
    killed(packs, run, *words, hosts=[0, 1], at=7)
    older = path_of(disk_of(run, 0) / "checkpoints", 2)
    older.rename(tmp_path / older.name)
    disk_of(run, 1).rename(tmp_path / "away")
    for hosts, each in (([0], 2), ([1, 0], 1)):
        failed = on_hosts(packs, run, *words, hosts=hosts, each=each)
        assert failed.returncode > 0
        assert "no checkpoint in" in failed.stderr
        assert "step_00000006: " in failed.stderr
        assert "(rank 1)" in failed.stderr
        assert kept(run, 0) == ["step_00000004", "step_00000006"]
    again = tmp_path / "again"
    shutil.copytree(disk_of(run, 0), disk_of(again, 0))
    shutil.copytree(tmp_path / "away", disk_of(again, 1))
    assert "step_00000006" in killed(packs, again, *words, hosts=[1, 0], at=7)
    (tmp_path / older.name).rename(older)  # one host alone wrote it
    said = ended(packs, run, *words, hosts=[0], each=2)
    assert "step_00000006: passed over: " in said
    assert f"{older.name}\n" in said
    assert min(losses(disk_of(run, 0))) == 1


def test_a_part_that_is_corrupt_on_one_host_is_as_missing(packs, tmp_path):
    local, shared = tmp_path / "local", tmp_path / "shared"
    for folder, words in ((local, LOCAL), (shared, SHARED)):
        killed(packs, folder, *words, hosts=[0, 1])
    (part,) = disk_of(local, 1).glob("checkpoints/step_00000006/centers_*.safetensors")
    data = bytearray(part.read_bytes())
    data[-9] ^= 4
    part.write_bytes(data)
    said = ended(packs, local, *LOCAL, hosts=[0, 1])
    assert f"{part.name} is corrupt" in said
    assert "step_00000006: passed over: 1 of its" in said
    assert "step_00000004" in said
    ended(packs, shared, *SHARED, hosts=[0, 1])
    assert_equal(together(local, [0, 1]), shared)


def test_a_stage_begins_with_what_the_hosts_wrote_of_the_one_before(packs, tmp_path):
    """Each host gets what it has not in the middle of a run, too, and after a SIGKILL there."""
    local, shared = tmp_path / "local", tmp_path / "shared"
    stages = [{"name": "one", "steps": 4}, {"name": "two", "steps": 5, "optimizer": {"lr": 0.02}}]
    staged = (*RULES[1:], f"stages={to_value(stages)}", "checkpoint.every_steps=3")
    killed(packs, local, *staged, "checkpoint.shared=false", hosts=[0, 1], at=8)
    said = ended(packs, local, *staged, "checkpoint.shared=false", hosts=[0, 1])
    assert "step_00000006" in said
    said = ended(packs, shared, *staged, hosts=[0, 1])
    assert "stage two begins" in said
    assert_equal(together(local, [0, 1]), shared)


def test_copies_of_peers_make_up_for_a_lost_disk_of_rank_0(packs, tmp_path):
    run, shared = tmp_path / "run", tmp_path / "shared"
    words = (*LOCAL[:-2], "checkpoint.every_steps=3", "checkpoint.peers_every_steps=1")
    killed(packs, run, *words, "checkpoint.shared=false", hosts=[0, 1, 2], at=5)
    shutil.rmtree(disk_of(run, 0))
    shutil.rmtree(memory_of(run, 0))
    said = ended(packs, run, *words, "checkpoint.shared=false", hosts=[7, 1, 2])
    assert "step 5 is whole in the memory of 3 hosts" in said
    ended(packs, shared, *SHARED, hosts=[0, 1, 2])
    assert losses(disk_of(run, 7)) == {
        step: loss for step, loss in losses(shared).items() if step > 5
    }


def test_hosts_that_share_a_disk_after_all_are_refused(packs, tmp_path):
    disk_of(tmp_path / "run", 0).mkdir()
    disk_of(tmp_path / "run", 1).symlink_to(disk_of(tmp_path / "run", 0))
    failed = on_hosts(packs, tmp_path / "run", *LOCAL, hosts=[0, 1])
    assert failed.returncode > 0
    assert "every host needs a disk of its own" in failed.stderr


def test_a_run_that_copies_saved_is_never_begun_anew(packs, tmp_path):
    """The newest copies are of 3, and the checkpoints of 2 and 4 lack host 0. They are set aside,
    and the next start goes on from the copies; without those it is refused."""
    run, again = tmp_path / "run", tmp_path / "again"
    words = (*LOCAL[:-2], "checkpoint.every_steps=2", "checkpoint.peers_every_steps=3")
    words = (*words, "checkpoint.shared=false")
    killed(packs, run, *words, hosts=[0, 1, 2], at=5)
    shutil.rmtree(disk_of(run, 0))
    shutil.rmtree(memory_of(run, 0))
    assert "step 3 is whole" in killed(packs, run, *words, hosts=[7, 1, 2], at=3)
    for host in (7, 1, 2):
        assert kept(run, host) == []
        shutil.copytree(disk_of(run, host), disk_of(again, host))
    refused = on_hosts(packs, again, *words, hosts=[7, 1, 2])
    assert refused.returncode > 0
    assert "no checkpoint in" in refused.stderr
    assert "step 3 is whole" in ended(packs, run, *words, hosts=[7, 1, 2])


def test_a_host_that_comes_back_does_not_take_the_run_back(packs, tmp_path):
    """Its disk says which copies counted before it was away, and it is rank 0."""
    run = tmp_path / "run"
    words = (*RULES, "checkpoint.every_steps=0", "checkpoint.peers_every_steps=1")
    words = (*words, "checkpoint.shared=false")
    killed(packs, run, *words, hosts=[0, 1, 2], at=2)
    killed(packs, run, *words, hosts=[7, 1, 2], at=4)
    assert "step 4 is whole" in killed(packs, run, *words, hosts=[0, 1, 2], at=4)
