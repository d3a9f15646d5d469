"""SIGUSR2 saves and stops, whenever it comes, on the ranks that a signal reaches or not."""

import os
import signal
import time

import pytest

from partialfc.distributed.agreement import any_rank
from partialfc.distributed.ranks import Ranks
from partialfc.errors import Preempted
from tests.support.processes import Python
from tests.support.ranks import run_on_ranks
from tests.support.runs import losses, run, words

pytestmark = pytest.mark.distributed


def asked_on_rank(rank, world_size, asks_at):
    """The steps at which a rank learns it, where rank 1 alone is asked at one of them."""
    learned = []
    step = 0
    with any_rank(lambda: rank == 1 and step == asks_at, Ranks.of()) as agreed:
        for step in range(6):
            if agreed():
                learned.append(step)
    return learned


@pytest.mark.parametrize("asks_at", [0, 3])
def test_all_ranks_learn_at_the_same_step_what_one_knows(asks_at):
    assert run_on_ranks(3, asked_on_rank, asks_at) == [[asks_at + 1]] * 3


def test_one_rank_learns_at_once():
    assert asked_on_rank(1, 1, 3) == [3]


def test_a_signal_saves_stops_with_its_own_code_and_loses_nothing(packs, tmp_path):
    """Two signals are one. The same command then goes on to the same end."""
    overrides = ("run.steps=60", "checkpoint.every_steps=0", "data.loader=torch")
    said = tmp_path / "stdout", tmp_path / "stderr"
    process = Python(words(packs, tmp_path, *overrides), said)
    deadline = time.monotonic() + 120
    while max(losses_or_none(tmp_path), default=0) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGUSR2)
    status, errors = process.wait(60), said[1].read_text()
    assert status == Preempted.exit_code, errors
    step = max(losses(tmp_path))
    assert f"after the checkpoint of step {step}" in errors
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    done = run(packs, tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path)) == list(range(1, 61))


def losses_or_none(folder):
    return losses(folder) if (folder / "metrics.jsonl").exists() else {}
