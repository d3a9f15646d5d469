"""A host of four is lost, and a spare one takes its place, with and without copies for peers."""

import json
import re
import time

import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts
from tests.cluster.test_hosts import HANG_SECONDS, Agents
from tests.cluster.training import arguments, assert_equal_runs, last_step, torchrun
from tests.support.places import ROOT
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS = 60
SOON = re.findall(r"--rdzv-conf=\S+", (ROOT / "launch" / "README.md").read_text())[0]
"""How torchrun finds a lost host, as it is recommended."""
WIDE = ("backbone.embedding_dim=512", "head.optimizer.unsampled=stay")


def starts(run):
    """What the ledger says of each start: ranks, the step it went on from, seconds by kind."""
    found = []
    for line in (run / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "start":
            found.append({"ranks": entry["ranks"]})
        elif entry["event"] == "spent":
            found[-1].setdefault("first", entry["step"])
            found[-1].setdefault("restore", entry["seconds"]["restore"])
    return found


@pytest.mark.parametrize(
    "saved",
    [
        ["checkpoint.peers_every_steps=2", "checkpoint.every_steps=0"],
        ["checkpoint.every_steps=20"],
    ],
    ids=["peers", "disk"],
)
def test_a_lost_host_is_replaced_by_a_spare_one(saved, packs, tmp_path):
    """R21: from copies no file of a checkpoint is read, and the run ends as if nothing was."""
    need("ip", "unshare", root=True)
    run = tmp_path / "run"
    words = arguments(packs, run, f"run.steps={STEPS}", *WIDE, *saved)
    words.append(f"run.hang_seconds={HANG_SECONDS}")
    options = ("--nnodes=4", "--nproc-per-node=1", "--max-restarts=9", "--rdzv-id=p", SOON)
    with Hosts(5) as hosts:
        agents = Agents(hosts, tmp_path, "launch/train.py", words, *options)
        try:
            for host in range(5):  # the fifth waits
                agents.start(host)
                if host == 3:
                    wait_for(lambda: last_step(run) >= 3)
            wait_for(lambda: last_step(run) >= 33)
            before, ranks = last_step(run), agents.ranks(0)
            agents.kill_host(3)
            lost = time.monotonic()
            wait_for(lambda: agents.ranks(0) not in ({}, ranks))
            met = time.monotonic() - lost
            wait_for(lambda: len(starts(run)) == 2 and "first" in starts(run)[-1])
            first = starts(run)[-1]["first"]
            wait_for(lambda: last_step(run) > first)
            seconds = time.monotonic() - lost
            assert agents.codes(300) == [0] * 4, agents.log(0)[-3000:]
            log = agents.log(0)
        finally:
            agents.end()
    came = re.search(r"([\d,]+) bytes came to rank 0", log)
    print(
        f"host lost to new ranks {met:.1f} s, to the next step {seconds:.1f} s, of which "
        f"{starts(run)[-1]['restore']:.2f} s restored; {before - first} steps or one more "
        f"repeated; bytes to rank 0: {came[1] if came else 'none'}"
    )
    if "peers" in saved[0]:
        assert f"step {first} is whole in the memory of 4 hosts" in log
        assert not [*(run / "checkpoints").glob(f"step_{first:08d}")]
        assert before - first <= 4
    straight = tmp_path / "straight"
    done = torchrun(4, arguments(packs, straight, f"run.steps={STEPS}", *WIDE, *saved[-1:]))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(run, straight, STEPS)
