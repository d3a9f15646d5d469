"""R17: one start at a time in a run's folder; a lock of the dead holds up nobody."""

import fcntl
import json
import os
import signal
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from partialfc.config import ConfigError
from partialfc.runtime import folder_lock
from partialfc.runtime.folder_lock import locked
from tests.support.models import runtime
from tests.support.processes import ENVIRONMENT, Python, python
from tests.support.runs import UNVERIFIED, run, words
from tests.support.waiting import PATIENCE, wait_for


def contents(folder):
    """Every file, and what is in those that do not grow while a run stands still."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_is_refused_and_touches_nothing(packs, tmp_path, capsys):
    """One destroyed the other's records and half-written checkpoint; srun starts two at once."""
    folder = tmp_path / "run"
    overrides = ("run.steps=100000", "checkpoint.every_steps=5", "data.loader=torch", *UNVERIFIED)
    first = Python(
        words(packs, folder, *overrides),
        (tmp_path / "stdout", tmp_path / "stderr"),
        env={**ENVIRONMENT, "SLURM_JOB_ID": "1234"},
    )
    wait_for(lambda: list(folder.glob("checkpoints/step_*")))
    first.send_signal(signal.SIGSTOP)
    wait_for(lambda: stands_still(first.pid))  # what its threads were writing comes to its end
    half_written = folder / "checkpoints" / ".step_00999999.partial"
    half_written.mkdir()
    before = contents(folder)
    second = run(packs, folder, *overrides)
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    by_srun = python(*words(packs, folder, *overrides), env={**ENVIRONMENT, **tasks})
    assert contents(folder) == before
    assert half_written.is_dir()
    first.kill()
    assert second.returncode == by_srun.returncode == 2
    who = f"process {first.pid} on {socket.gethostname()}, Slurm job 1234 trains in it"
    assert f"run.folder = '{folder}': {who}. Wait for its end" in second.stderr
    assert f"{who}. This is task 1 of 2 that srun started" in by_srun.stderr
    assert "Traceback" not in second.stderr + by_srun.stderr
    capsys.readouterr()
    with locked(folder, runtime()):
        assert not capsys.readouterr().err, "the kernel knows that it is dead: no look is needed"


def stands_still(process):
    """Whether each of its threads has stopped."""
    threads = Path(f"/proc/{process}/task").glob("*/stat")
    return all(thread.read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


def test_a_lock_is_let_go_of_and_says_nothing_then(tmp_path):
    folder = tmp_path / "run"
    with locked(folder, runtime()):
        assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
    assert (folder / ".lock").read_text() == ""


@pytest.mark.parametrize("lives", [True, False])
def test_a_lock_of_another_host_counts_while_somebody_touches_it(tmp_path, monkeypatch, lives):
    """Where a mount keeps locks on its own host, or none; clocks of hosts are not compared."""
    monkeypatch.setattr(folder_lock, "_SECONDS_OF_A_LOOK", PATIENCE if lives else 0.5)
    monkeypatch.setattr(folder_lock, "_SECONDS_BETWEEN_TOUCHES", 0.1)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 7, "job": "Slurm job 8"}))
    os.utime(lock, (10**9, 10**9) if lives else None)
    if lives:
        match = "process 7 on elsewhere, Slurm job 8 trains in it"
        with touched(lock), pytest.raises(ConfigError, match=match):
            locked(tmp_path, runtime()).__enter__()
        assert json.loads(lock.read_text())["process"] == 7
    else:
        with locked(tmp_path, runtime()):
            assert json.loads(lock.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("dies", [True, False])
def test_a_lock_of_a_lost_machine_is_waited_for(tmp_path, monkeypatch, dies):
    """A server keeps it for a minute or two: an elastic run burned all its restarts meanwhile."""
    monkeypatch.setattr(folder_lock, "_SECONDS_OF_A_LEASE", PATIENCE if dies else 0.5)
    monkeypatch.setattr(folder_lock, "_SECONDS_BETWEEN_TOUCHES", 0.1)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 7}))
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if dies:
            threading.Timer(0.6, fcntl.flock, (held, fcntl.LOCK_UN)).start()
            with locked(tmp_path, runtime()):
                assert json.loads(lock.read_text())["process"] == os.getpid()
        else:  # a machine that lives keeps it, and its process may be stopped
            with pytest.raises(ConfigError, match="process 7 on elsewhere trains in it"):
                locked(tmp_path, runtime()).__enter__()


def test_a_container_of_the_same_name_on_another_machine_is_another_host(tmp_path, monkeypatch):
    """Where locks do not reach other machines, both trained in the folder."""
    monkeypatch.setattr(folder_lock, "_SECONDS_OF_A_LOOK", PATIENCE)
    monkeypatch.setattr(folder_lock, "_SECONDS_BETWEEN_TOUCHES", 0.1)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "process": 1, "boot": "another"}))
    with touched(lock), pytest.raises(ConfigError, match="process 1 on"):
        locked(tmp_path, runtime()).__enter__()


@contextmanager
def touched(lock):
    """Inside, its holder lives."""
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(lock)

    touching = threading.Thread(target=touch)
    touching.start()
    try:
        yield
    finally:
        ended.set()
        touching.join()


@pytest.mark.parametrize("text", ["", "no json", "[1]", "[" * 9000, '{"host": 7}'])
def test_a_damaged_lock_holds_up_nobody(tmp_path, monkeypatch, text):
    monkeypatch.setattr(folder_lock, "_SECONDS_OF_A_LOOK", 0.1)
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path, runtime()):
        pass


def test_a_folder_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="nothing can be written there: File exists"):
        locked(tmp_path / "run", runtime()).__enter__()


def test_a_full_disk_takes_no_lock_and_trains(tmp_path, monkeypatch, capsys):
    """R16: a lock is no checkpoint."""

    def full(path, flags):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folder_lock, "opened", full)
    with locked(tmp_path, runtime()):
        pass
    assert "cannot be written: No space left on device" in capsys.readouterr().err
