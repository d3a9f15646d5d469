"""Signals save and stop, whenever they come, on the ranks that one reaches or not."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from partialfc.config.run import Checkpoint
from partialfc.distributed.links import Links, any_rank
from partialfc.distributed.ranks import Ranks
from partialfc.runtime import preemption
from tests.support.places import ROOT
from tests.support.processes import ENVIRONMENT, Python, python
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, command, held, losses, run, words
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.distributed


def asked_on_rank(rank, world_size, asks_at):
    """The steps at which a rank learns it, where rank 1 alone is asked at one of them."""
    learned = []
    step = 0

    def known():
        return rank == 1 and step == asks_at

    with Links(Ranks.of()) as links, any_rank(known, links) as agreed:
        for step in range(6):
            if agreed():
                learned.append(step)
    return learned


@pytest.mark.parametrize("asks_at", [0, 3])
def test_all_ranks_learn_at_the_same_step_what_one_knows(asks_at):
    assert run_on_ranks(3, asked_on_rank, asks_at) == [[asks_at + 1]] * 3


def test_one_rank_learns_at_once():
    assert asked_on_rank(1, 1, 3) == [3]


ONE_SIGNAL = """
import runpy, sys
from partialfc.runtime import preemption
preemption._SAME = 1e9  # two that come late are as near as two that come at once
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR2, 75), (signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
)
def test_a_signal_saves_stops_with_its_own_code_and_loses_nothing(packs, tmp_path, number, code):
    """R13, R18: two signals are one. The same command then goes on to the same end."""
    overrides = ("run.steps=60", "checkpoint.every_steps=0", "data.loader=torch", *UNVERIFIED)
    said = tmp_path / "stdout", tmp_path / "stderr"
    process = Python(["-c", ONE_SIGNAL, *held(50, words(packs, tmp_path, *overrides))], said)
    wait_for(lambda: last_step(tmp_path) >= 5)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)
    status, errors = process.wait(PATIENCE), said[1].read_text()
    assert status == code, errors
    step = max(losses(tmp_path))
    assert f"after the checkpoint of step {step}" in errors
    assert "Traceback" not in errors
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == f"step_{step:08d}"
    assert f"goes on from {saved}" in errors, "what is printed is there"
    if number == signal.SIGUSR2:
        done = run(packs, tmp_path, *overrides)
        assert done.returncode == 0, done.stderr
        assert sorted(losses(tmp_path)) == list(range(1, 61))


STANDS = """
import ctypes, runpy, sys
import partialfc.training.opened, partialfc.training.run
from partialfc.runtime import preemption
{before}
def stands(*_, **__):
    print("here", flush=True)
    {first}
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # waits for itself in C, where Python runs no handler
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
partialfc.training.{name} = stands
sys.argv = {words!r}
runpy.run_path("launch/train.py", run_name="__main__")
"""


def standing_in(name, packs, tmp_path, *, before="", first="pass"):
    """A training that stands in one of its functions and never comes back to Python."""
    said = tmp_path / "stdout", tmp_path / "stderr"
    arguments = words(packs, tmp_path / "run", "run.steps=60", *UNVERIFIED)
    code = STANDS.format(name=name, words=arguments, before=before, first=first)
    process = Python(["-c", code], said)
    wait_for(lambda: said[0].exists() and "here" in said[0].read_text())
    return process, said[1]


STOPS = "SIGTERM: the run stops after this step"


def test_a_second_signal_leaves_at_once_wherever_the_run_stands(packs, tmp_path):
    """R18: even in a collective that does not return."""
    process, errors = standing_in("run.train_step", packs, tmp_path)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: STOPS in errors.read_text())
    time.sleep(preemption._SAME + 0.1)  # or it is the same signal, sent twice
    assert process.poll() is None, "one asks for a checkpoint"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_before_the_first_step_one_signal_is_enough(packs, tmp_path):
    """R18: nothing is lost then, and nothing is promised; also where Python runs no handler."""
    process, errors = standing_in("opened.build", packs, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert "goes on from" not in errors.read_text()


RANKS = """
import os, subprocess, sys
code = "import signal; from partialfc.runtime import preemption; print('here', flush=True); "
code += "input(); print(preemption._is_asked(signal.SIGTERM))"
def rank(number):
    env = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": sys.argv[1], "RANK": str(number)}
    words = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, text=True)
first, second = rank(0), rank(1)
if sys.argv[2] == "dies":
    second.kill()
    second.wait()
print(first.communicate("\\n")[0].removeprefix("here"))
second.kill()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("hosts", "other", "asked"), [(1, "lives", "True"), (1, "dies", "False"), (2, "lives", "False")]
)
def test_sigterm_of_torchrun_is_told_from_one_that_somebody_sent(hosts, other, asked):
    """It ends the others when a rank has died: that start failed. On two hosts nobody can tell."""
    done = python("-c", RANKS, 2 // hosts, other)
    assert done.stdout.split() == [asked], done.stderr


def test_sigterm_to_a_run_of_one_process_is_asked_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert preemption._is_asked(signal.SIGTERM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preemption._is_asked(signal.SIGHUP), "torchrun hands on what it got"


def test_it_is_said_that_there_is_no_checkpoint_where_there_is_none(packs, tmp_path):
    patient = "preemption._SECONDS_TO_LEAVE = 1e9"  # or it leaves without a word, if it is late
    one = "import signal; signal.raise_signal(2)"
    process, errors = standing_in("opened.build", packs, tmp_path, before=patient, first=one)
    assert process.wait(PATIENCE) == 130
    assert errors.read_text() == (
        "stopped by SIGINT before the first step. The same command begins: no checkpoint yet.\n"
    )


@pytest.mark.slow
def test_torchrun_that_is_ended_leaves_a_checkpoint(packs, tmp_path):
    """R18: Kubernetes sends SIGTERM to it, and it hands it on to the ranks and waits for them."""
    overrides = ("run.steps=100000", "checkpoint.every_steps=0", "data.loader=torch", *UNVERIFIED)
    agent = subprocess.Popen(
        command(packs, tmp_path, *overrides, ranks=2),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: last_step(tmp_path) >= 2)
    agent.send_signal(signal.SIGTERM)
    _, errors = agent.communicate(timeout=PATIENCE)
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    assert f"The same command goes on from {saved}" in errors, errors
    assert int(saved.name.removeprefix("step_")) == max(losses(tmp_path))


def test_a_short_run_has_checkpoints_by_default():
    """500 steps had none until their end."""
    default = Checkpoint()
    assert [default.interval(steps) for steps in (10, 500, 5000, 0, 10**6)] == [
        50,
        100,
        1000,
        2000,
        2000,
    ]
    assert Checkpoint(keep_every_steps=4000).interval(500) == 2000
    assert Checkpoint(every_steps=0).interval(500) == 0


def last_step(folder):
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").exists() else 0
