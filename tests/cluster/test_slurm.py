"""launch/slurm.py against a real Slurm: submit, preempt, requeue, limits, cancel."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from partialfc.config import load, to_toml
from partialfc.errors import Preempted
from tests.cluster.training import (
    arguments,
    assert_equal_runs,
    last_step,
    losses,
    torchrun,
)
from tests.support.places import ROOT
from tests.support.processes import send
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

TWO_BY_TWO = ["--nodes=2", "--tasks-per-node=2", "--partition=low", "--time=00:30:00", "--lead=20"]
PREEMPTIONS = int(os.environ.get("PREEMPTIONS", "10"))
STEPS = 30 * PREEMPTIONS


def launch(slurm, *words, check=True, cwd=ROOT):
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "slurm.py"), *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def submit(slurm, packs, tmp_path):
    """Submit a training of this test; its id and its folder."""

    def submit(*words, run="run"):
        folder, jobs = tmp_path / run, tmp_path / "jobs"
        done = launch(slurm, *arguments(packs, folder), *TWO_BY_TWO, f"--jobs={jobs}", *words)
        return done.stdout.partition(":")[0], folder, jobs

    return submit


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a quarter of a minute each, and more where the machine is loaded
def test_preempted_at_random_moments_it_ends_as_if_it_never_was(slurm, submit, packs, tmp_path):
    """No step is repeated or lost; losses, weights, centers and momentum are bit for bit equal."""
    straight = tmp_path / "straight"
    done = torchrun(4, arguments(packs, straight, f"run.steps={STEPS}"))
    assert done.returncode == 0, done.stderr
    draw = random.Random(7)
    job, folder, jobs = submit(f"run.steps={STEPS}", "checkpoint.every_steps=0")
    seconds = []
    for number in range(PREEMPTIONS):
        wait_for(lambda: slurm.job(job)["JobState"] == "RUNNING")
        at = last_step(folder) + draw.randrange(1, 15)
        wait_for(lambda: last_step(folder) >= at, every=0.02)  # noqa: B023
        time.sleep(draw.uniform(0, 0.2))
        if number % 3 == 0:
            slurm.preempt()
        else:  # what Slurm sends before the time limit
            slurm.run("scancel", "--signal=USR2", job)
        asked = time.monotonic()
        wait_for(lambda: slurm.job(job)["Restarts"] == str(number + 1), every=0.05)  # noqa: B023
        seconds.append(time.monotonic() - asked)
        before = last_step(folder)
        saved = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
        assert saved[-1:] == [f"step_{before:08d}"], "the last step is in the checkpoint"
    wait_for(lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert slurm.job(job)["Restarts"] == str(PREEMPTIONS)
    assert_equal_runs(straight, folder, STEPS)
    log = launch(slurm, "logs", job, f"--jobs={jobs}").stdout
    assert log.count("stopped as asked, after the checkpoint of step") == PREEMPTIONS
    assert f"queued again for start {PREEMPTIONS + 1} of at most 101" in log
    print(
        f"{PREEMPTIONS} preemptions, from the signal to the next start {max(seconds):.1f} s at most"
    )


@pytest.mark.slow
def test_the_time_limit_saves_and_goes_on_and_requeues_are_bounded(slurm, submit):
    """A minute is Slurm's shortest limit: the signal comes in the middle of it."""
    job, folder, jobs = submit("run.steps=1000000", "--time=1", "--lead=35", "--max-requeues=1")
    wait_for(lambda: slurm.job(job)["Restarts"] == "1")
    first = last_step(folder)
    assert first > 0
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["ExitCode"] == f"{Preempted.exit_code}:0"
    assert last_step(folder) > first
    log = launch(slurm, "logs", job, f"--jobs={jobs}").stdout
    assert "not queued again: --max-requeues is 1" in log


@pytest.mark.slow
def test_a_run_that_comes_no_further_is_not_queued_again(slurm, submit, packs, tmp_path):
    """Exit code 5 of images that are none, and 8 of the start after it: each ends its job."""
    for name in ("train.rec", "train.idx"):
        data = (packs / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"\xff\xd8\xff", b"non"))
    for code in (5, 8):
        broken = [f"data.train={tmp_path / 'train.rec'}", "run.fruitless_starts=1"]
        job, _, _ = submit("run.steps=50", "--nodes=1", "--tasks-per-node=1", *broken)
        wait_for(lambda: slurm.job(job)["JobState"] == "FAILED")  # noqa: B023
        assert slurm.job(job)["ExitCode"] == f"{code}:0"
        assert slurm.job(job)["Restarts"] == "0"


def test_status_logs_attach_and_cancel(slurm, submit):
    """Without an accounting database; a cancelled job saves, and is not queued again."""
    job, folder, jobs = submit("run.steps=1000000", "checkpoint.every_steps=0")
    for private in (jobs, *jobs.iterdir()):
        assert private.stat().st_mode & 0o777 == 0o700, "who writes there runs as you"
    wait_for(lambda: last_step(folder) >= 3)
    status = launch(slurm, "status", f"--jobs={jobs}").stdout
    assert re.search(rf"{job} .*RUNNING.* 1 .*{folder.name}", status)
    assert "step 1/1000000" in launch(slurm, "logs", job, "--rank=0", f"--jobs={jobs}").stdout
    follow = [sys.executable, "-u", "launch/slurm.py", "attach", job, f"--jobs={jobs}"]
    left = subprocess.Popen(
        follow, cwd=ROOT, env=slurm.environment, stdout=subprocess.PIPE, text=True
    )
    assert left.stdout.readline(), "it has begun to follow"
    left.send_signal(signal.SIGINT)
    assert left.wait(300) == 130
    assert slurm.job(job)["JobState"] == "RUNNING", "Ctrl-C leaves it running"
    attached = subprocess.Popen(
        follow, cwd=ROOT, env=slurm.environment, stdout=subprocess.PIPE, text=True
    )
    launch(slurm, "cancel", job, f"--jobs={jobs}")
    wait_for(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    output, _ = attached.communicate(timeout=300)
    assert attached.returncode == 1
    assert "step 1/1000000" in output
    assert f"job {job}: CANCELLED" in output
    assert (folder / "checkpoints" / f"step_{last_step(folder):08d}").exists()
    assert slurm.job(job)["Restarts"] == "0"
    unknown = launch(slurm, "cancel", "999999", f"--jobs={jobs}", check=False)
    assert unknown.returncode == 2
    assert "job 999999: not submitted from" in unknown.stderr


def test_a_killed_rank_ends_the_job(slurm, submit):
    """--kill-on-bad-exit: no rank is left waiting for one that is gone."""
    job, folder, _ = submit("run.steps=1000000")
    wait_for(lambda: last_step(folder) >= 3)
    killed = time.monotonic()
    os.kill(rank_process(folder, 3), signal.SIGKILL)
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED")
    wait_for(lambda: not processes(folder))
    print(f"killed rank to last process gone: {time.monotonic() - killed:.1f} s")


def processes(folder):
    """Ranks of the job of a test: process id -> rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (entry / "cmdline").read_text(), (entry / "environ").read_text()
        except OSError:
            continue
        if "submitit.core._submit" in command and str(folder.parent) in command:
            rank = re.search(r"(SLURM_PROCID|SUBMITIT_LOCAL_GLOBALID)=(\d+)", environment)
            if rank:
                found[int(entry.name)] = int(rank[2])
    return found


def rank_process(folder, rank):
    return next(process for process, found in processes(folder).items() if found == rank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_gpus_that_slurm_gives_and_torch_does_not_see_end_the_job(slurm, packs, tmp_path):
    """It trained on the CPU of a GPU node, and the job was COMPLETED."""
    folder, jobs = tmp_path / "run", f"--jobs={tmp_path / 'jobs'}"
    where = ["--gpus-per-node=1", "--cpus-per-task=1", "--partition=low", jobs]
    done = launch(slurm, *arguments(packs, folder, "run.steps=4"), *where)
    job = done.stdout.partition(":")[0]
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED")
    assert slurm.job(job)["ExitCode"] == "2:0"
    log = launch(slurm, "logs", job, jobs).stdout
    assert "CUDA_VISIBLE_DEVICES = '0': a GPU is asked for, and torch sees no GPU here" in log


def test_an_array_of_configs(slurm, packs, tmp_path):
    """One submission, two runs in two folders."""
    for number in (0, 1):
        threads = f"data.threads={number + 1}"
        words = arguments(packs, tmp_path / f"run{number}", "run.steps=4", threads)
        (tmp_path / f"{number}.toml").write_text(to_toml(load(ROOT / words[0], words[1:])))
    configs = [str(tmp_path / f"{number}.toml") for number in (0, 1)]
    jobs = f"--jobs={tmp_path}/it's my jobs"
    name = "--name=it's a%j pair\\x/1"
    one_rank = ["--nodes=1", "--tasks-per-node=1", "--partition=low", name, jobs]
    done = launch(slurm, *configs, *one_rank, cwd=tmp_path)
    job = done.stdout.partition(":")[0]
    for number in (0, 1):
        state = slurm.job(f"{job}_{number}")
        assert state["JobName"] == "it_s_a_j_pair_x_1"
        assert state["NumCPUs"] == "2", "data.threads of it"
        assert state.get("WCKey", "") in ("", "*"), "nobody asked for one"
        wait_for(lambda: slurm.job(f"{job}_{number}")["JobState"] == "COMPLETED")  # noqa: B023
        assert sorted(losses(tmp_path / f"run{number}")) == [1, 2, 3, 4]
    status = launch(slurm, "status", job, jobs).stdout
    assert f"{job}_0" in status
    assert f"{job}_1" in status
    same = launch(slurm, configs[0], configs[0], *one_rank, check=False)
    assert same.returncode == 2
    assert "run.folder" in same.stderr


def test_local_runs_the_same_job_and_starts_it_again(slurm, packs, tmp_path):
    """SIGUSR2 to its ranks: saved, started again by submitit's local executor, done."""
    folder, jobs = tmp_path / "run", tmp_path / "jobs"
    words = arguments(packs, folder, "run.steps=400")
    command = [sys.executable, "launch/slurm.py", *words, "--local", "--tasks-per-node=2"]
    running = subprocess.Popen(
        [*command, f"--jobs={jobs}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        text=True,
    )
    preempt_here(folder, after=3)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    assert output.count("stopped as asked") == 1
    assert sorted(losses(folder)) == list(range(1, 401))


def preempt_here(folder, after):
    wait_for(lambda: last_step(folder) >= after, every=0.02)
    for process in processes(folder):
        send(process, signal.SIGUSR2)


@pytest.mark.slow
def test_local_starts_again_are_counted_and_bounded(packs, tmp_path):
    folder = tmp_path / "run"
    words = [*arguments(packs, folder, "run.steps=1000000"), "--local", "--tasks-per-node=1"]
    # As it is where somebody tries it out inside of a Slurm job.
    within = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "9"}
    running = subprocess.Popen(
        [sys.executable, "launch/slurm.py", *words, "--max-requeues=1", f"--jobs={tmp_path}/jobs"],
        cwd=ROOT,
        env=within,
        stdout=subprocess.PIPE,
        text=True,
    )
    preempt_here(folder, after=3)
    preempt_here(folder, after=last_step(folder) + 3)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 1
    assert output.count("stopped as asked") == 2
    assert "queued again for start 2 of at most 2" in output
    assert "not queued again: --max-requeues is 1" in output
