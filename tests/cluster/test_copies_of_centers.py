"""Two copies of the class centers over two hosts each, against one copy over all four."""

import os
import signal
import subprocess

import numpy as np
import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts, address
from tests.cluster.training import ENVIRONMENT, arguments, final_tensors, last_step, losses
from tests.support.places import ROOT
from tests.support.processes import send
from tests.support.runs import TORCHRUN
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

STEPS = 12


@pytest.fixture
def hosts():
    need("ip", "unshare", root=True)
    with Hosts(4) as four:
        yield four


def start(hosts, folder, words, name):
    """torchrun on each of the hosts, one rank each."""
    running = []
    for i in range(hosts.count):
        command = [
            *TORCHRUN[:3],
            f"--nnodes={hosts.count}",
            "--nproc-per-node=1",
            f"--node-rank={i}",
        ]
        command += [f"--master-addr={address(0)}", "--master-port=29500", "launch/train.py", *words]
        with (folder / f"{name}{i}.log").open("a") as log:
            running.append(
                subprocess.Popen(
                    hosts.command(i, *command),
                    cwd=ROOT,
                    env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"ve{i}"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return running


def settings(packs, folder, *more):
    return arguments(
        packs,
        folder,
        f"run.steps={STEPS}",
        "optimizer.lr=0.01",  # a network with BatchNorm makes much of the last digits
        "head.sample_rate=0.5",
        "head.canonical_shards=8",
        "checkpoint.every_steps=4",
        *more,
    )


def ended(running, seconds=420):
    return [one.wait(seconds) for one in running]


def joined(folder):
    """All rows of the class centers and their states, and the rest, by name."""
    tensors, rows = final_tensors(folder, STEPS), {}
    found = {}
    for name, value in tensors.items():
        file, tensor = name.split(":", 1)
        if file.startswith("centers_"):
            rows.setdefault(tensor, []).append(value)
        else:
            found[name] = value
    return found | {f"centers:{name}": np.concatenate(parts) for name, parts in rows.items()}


@pytest.mark.slow
def test_two_copies_over_two_hosts_each_train_as_one_over_four(hosts, packs, tmp_path):
    """To rounding, at a rate of 0.5; then hosts that are killed go on to the bit.

    Four starts on four hosts: a minute and more on two cores.
    """
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    assert ended(start(hosts, tmp_path, settings(packs, one), "one")) == [0] * 4
    copies = "head.ranks_per_copy=2"
    assert ended(start(hosts, tmp_path, settings(packs, two, copies), "two")) == [0] * 4
    expected, found = [*losses(one).values()], [*losses(two).values()]
    assert found[:6] == pytest.approx(expected[:6], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-2)
    files = [path.name for path in (two / "checkpoints" / f"step_{STEPS:08d}").glob("centers_*.s*")]
    assert len(files) == 2, "rows are written once"
    expected, found = joined(one), joined(two)
    difference = np.linalg.norm(found["centers:centers"] - expected["centers:centers"])
    assert difference <= 1e-2 * np.linalg.norm(expected["centers:centers"])

    running = start(hosts, tmp_path, settings(packs, again, copies), "again")
    wait_for(lambda: (again / "checkpoints" / "step_00000004").exists())
    wait_for(lambda: last_step(again) >= 5)
    for one_host in running:  # and what it started: as if the power failed
        os.killpg(one_host.pid, signal.SIGKILL)
    ended(running)
    for i in range(hosts.count):
        left = subprocess.run(
            ["ip", "netns", "pids", f"pfc{i}"], capture_output=True, text=True, check=True
        ).stdout
        for process in left.split():
            send(int(process), signal.SIGKILL)
    assert ended(start(hosts, tmp_path, settings(packs, again, copies), "again")) == [0] * 4
    assert losses(again) == losses(two)
    expected, found = joined(two), joined(again)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name
