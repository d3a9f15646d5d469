"""Hosts with a disk of their own at one path, under torchrun."""

import os
import shutil
import signal

import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts
from tests.cluster.test_hosts import HANG_SECONDS, Agents
from tests.cluster.training import arguments, final_tensors, last_step, losses, torchrun
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS = 40
SAVED = ("checkpoint.every_steps=10", "checkpoint.keep=2")


def test_torchrun_starts_again_from_what_hosts_have_on_their_own_disks(packs, tmp_path):
    """After a SIGKILL of a rank it ends as on one disk, whichever host has rank 0 then."""
    need("ip", "unshare", "mount", root=True)
    run = tmp_path / "run"
    disks = {i: (tmp_path / f"disk{i}", run) for i in range(2)}
    for folder in (run, *(disk for disk, _ in disks.values())):
        folder.mkdir()
    words = arguments(packs, run, f"run.steps={STEPS}", *SAVED, "checkpoint.shared=false")
    words.append(f"run.hang_seconds={HANG_SECONDS}")
    options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=9", "--rdzv-id=d")
    with Hosts(2, disks) as hosts:
        agents = Agents(hosts, tmp_path, "launch/train.py", words, *options)
        try:
            agents.start(0)
            agents.start(1)

            def steps():
                return max(last_step(disk) for disk, _ in disks.values())

            wait_for(lambda: steps() >= 13)
            os.kill(agents.ranks(1)[0], signal.SIGKILL)
            assert agents.codes(300) == [0, 0], agents.log(0)[-3000:]
            log = agents.log(0) + agents.log(1)
        finally:
            agents.end()
    assert "step_00000010" in log
    assert "files went to hosts that lacked them" in log
    assert not [*run.iterdir()]
    parts = [{path.name for path in disk.rglob("step_00000040/*")} for disk, _ in disks.values()]
    assert parts[0] & parts[1] == {"manifest.json"}
    both = tmp_path / "both"
    for disk, _ in disks.values():
        shutil.copytree(disk, both, dirs_exist_ok=True)
    straight = tmp_path / "straight"
    done = torchrun(2, arguments(packs, straight, f"run.steps={STEPS}", *SAVED))
    assert done.returncode == 0, done.stderr
    assert losses(straight) == {
        step: loss for disk, _ in disks.values() for step, loss in losses(disk).items()
    }
    expected, found = final_tensors(straight, STEPS), final_tensors(both, STEPS)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name
