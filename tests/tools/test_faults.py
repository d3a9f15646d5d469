"""Real processes that are killed, stopped and starved; tools/bench/faults.py does more of it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE, wait_for
from tools.bench._faults.runs import Run, command, steps_in

pytestmark = pytest.mark.distributed

COMMON = [
    "verification.pairs=[]",
    "verification.identification=[]",
    "verification.every_steps=0",
    "run.epochs=",
    "schedule.warmup_steps=2",
    "data.global_batch=48",
    "backbone.name=convnet_s",
    "log.every_steps=1",
    "log.tensorboard=false",
]


@pytest.fixture
def start(packs, tmp_path):
    """Starts runs in this test's folder, and ends what is left of them."""
    runs = []

    def start(*overrides, ranks=2, launcher=(), folder="run"):
        where = [f"data.train={packs / 'train.rec'}", f"run.folder={tmp_path / folder}"]
        words = command("configs/omniglot.toml", [*where, *COMMON, *overrides], ranks, *launcher)
        runs.append(Run(words, tmp_path / f"log{len(runs)}.txt"))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def gone(process):
    return not Path(f"/proc/{process}").exists()


@pytest.mark.slow
def test_a_stopped_rank_is_named_with_the_stacks_of_the_living(start, tmp_path):
    """R11: gloo has no watchdog of its own, so without ours all wait for ever."""
    run = start("run.steps=100000", "run.hang_seconds=15", ranks=3)
    run.until(lambda: steps_in(tmp_path / "run") >= 3)
    stopped = run.ranks()[1]
    os.kill(stopped, signal.SIGSTOP)
    run.until(lambda: "rank 1 gave no sign of life for " in run.text())
    assert re.search(r"rank [02]: rank 1 gave no sign of life for \d+ s; when", run.text())
    folder = tmp_path / "run" / "stacks"
    run.until(lambda: len(list(folder.rglob("rank_*.txt"))) == 2)
    stacks = {path.name: path for path in folder.rglob("rank_*.txt")}
    assert sorted(stacks) == ["rank_00000.txt", "rank_00002.txt"]
    for path in stacks.values():  # where the main thread waits
        run.until(lambda path=path: "train_step" in path.read_text())
    ledger = tmp_path / "run" / "ledger.jsonl"
    run.until(lambda: '"code": 6' in ledger.read_text().splitlines()[-1])


@pytest.mark.slow
def test_a_killed_rank_of_two_hosts_ends_both_and_is_named(start, tmp_path):
    """R10: the agent of the other host sees nothing but what its own ranks tell."""
    port = free_port()

    def agent(number):
        launcher = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}"]
        launcher += [f"--master-port={port}", "--master-addr=localhost"]
        return start("run.steps=100000", launcher=launcher)

    first, second = agent(0), agent(1)
    first.until(lambda: steps_in(tmp_path / "run") >= 3)
    everyone = first.everyone() + second.everyone()
    os.kill(second.ranks()[1], signal.SIGKILL)
    assert first.wait() != 0
    assert second.wait() != 0
    wait_for(lambda: all(map(gone, everyone)))
    assert re.search(r"rank 1 was lost at step \d+", first.text())
    assert re.search(r"exitcode  : 7", first.text())
    assert re.search(r"rank      : 1 .*\n.*exitcode  : -9", second.text())


@pytest.mark.slow
def test_a_late_rank_is_named_and_a_nan_of_one_ends_all_with_one_code(packs, tmp_path):
    """R15, R12: within 50 steps; and no rank has changed a weight, a state or a statistic."""
    words = [f"data.train={packs / 'train.rec'}", f"run.folder={tmp_path / 'run'}", *COMMON]
    words += ["run.steps=1000", "log.every_steps=10", "data.loader=torch", "log.progress=false"]
    words += ["head.optimizer.unsampled=stay"]  # a forward stores rows that move where they are
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "tests/support/faulty_rank.py", tmp_path),
                *("configs/omniglot.toml", *words),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                **where,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3], said
    assert re.search(r"rank 1 is slow: the others wait \d+ ms for it in every step", said[0][0])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    slow = [one["slowest_rank"] for one in records if one["step"] <= 50 and one["slow_ranks"]]
    assert 1 in slow, records
    for rank, (_, errors) in enumerate(said):
        assert f"rank {rank}: the loss was not finite in 0 steps, and 1 steps changed no" in errors
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()), "nothing was changed"


@pytest.fixture
def broken(packs, tmp_path):
    """A pack whose images are none."""
    for name in ("train.rec", "train.idx"):
        data = (packs / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"\xff\xd8\xff", b"none"[:3]))
    return f"data.train={tmp_path / 'train.rec'}"


@pytest.mark.slow
def test_starts_that_come_no_further_are_refused_with_their_causes(start, broken):
    """R14: a scheduler would start it again and again. Torchrun's summary has each message."""
    summaries = []
    for allowed in (1, 1, 0):
        run = start("run.steps=50", broken, f"run.fruitless_starts={allowed}")
        assert run.wait() != 0
        summaries.append(run.text().rpartition("Root Cause (first observed failure)")[2])
    failed, refused, again = summaries
    for summary in (failed, again):
        assert "exitcode  : 5 " in summary
        assert re.search(r"train.rec: image \d+, .*offset \d+", summary)
    assert "exitcode  : 8 " in refused
    assert re.search(r"run.fruitless_starts = 1: .* \(at step 0: (rank 1: )?DataError: ", refused)


@pytest.mark.slow
def test_the_benchmark_of_faults_in_small(tmp_path):
    """A kill in the second save, ending equal to the bit; tools/bench has all of it."""
    record = tmp_path / "faults.json"
    tool = [sys.executable, "tools/bench/faults.py", "--json", str(record)]
    small = ["--only", "kills,corruption", "--kills", "1", "--seed", "5", "--corruptions", "20"]
    done = subprocess.run([*tool, *small], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(record.read_text())
    assert all(found["kills"]["equal"].values()), done.stdout
    assert found["kills"]["survived"] == 1
    assert found["kills"]["during_a_save"] == 1
    assert not found["corruption"]["accepted"]
    wall = found["kills"]["wall_seconds"]
    assert wall / 2 < found["kills"]["spent_sum"] <= wall + 0.5
