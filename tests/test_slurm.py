"""launch/slurm.py without Slurm: the script that it would submit, and mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.submitting.job import TOO_MANY_REQUEUES, Training

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "slurm"

ONE = [
    *("configs/ms1mv3_r50.toml", "--nodes", "4", "--gpus-per-node", "8", "--time", "1-12:30:00"),
    *("--partition", "h100", "--account", "faces", "--qos", "long", "--cpus-per-task", "12"),
    *("--lead", "300", "--setup", "module load cuda", "--slurm", "exclusive"),
    *("--slurm", "constraint=ib", "data.global_batch=4096"),
]
ARRAY = ["configs/demo.toml", "configs/omniglot.toml", "--tasks-per-node=2", "--name=both"]


@pytest.mark.parametrize(("name", "words"), [("one", ONE), ("array", ARRAY)])
def test_the_script_is_the_golden_one(name, words, capsys, monkeypatch):
    """sbatch's options, srun's, and what runs; only this machine's paths are replaced."""
    monkeypatch.chdir(ROOT)
    assert slurm.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out.replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/demo.toml"], "--gpus-per-node = None with --tasks-per-node = None"),
        (["--tasks-per-node=2", "head.scale=1"], "no settings file"),
        (["configs/demo.toml", "--tasks-per-node=2", "head.sample_rat=1"], "head.sample_rate"),
        (["configs/demo.toml", "--tasks-per-node=3"], "data.global_batch"),
        (["configs/demo.toml", "configs/demo.toml", "--tasks-per-node=2"], "run.folder"),
        (["configs/demo.yaml", "--tasks-per-node=2"], "must be a settings file"),
        (["configs/demo.toml", "--tasks-per-node=2", "--nodes=2", "--local"], "one node"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(words, message, tmp_path, capsys):
    assert slurm.main([*words, f"--jobs={tmp_path / 'jobs'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("time", ["24:00", "1:2:3:4", "x", "0"])
def test_a_time_is_days_and_hours_or_minutes(time, capsys):
    with pytest.raises(SystemExit):
        slurm.main(["configs/demo.toml", "--tasks-per-node=2", "--time", time, "--dry-run"])
    assert "[DAYS-]HH:MM:SS" in capsys.readouterr().err


def test_a_folder_that_others_may_write_is_refused(tmp_path, capsys):
    """Who writes there could make the job run another pickle."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    jobs.chmod(0o777)
    words = ["configs/demo.toml", "--tasks-per-node=1", "--local", f"--jobs={jobs}"]
    assert slurm.main(words) == 2
    assert "writable by nobody else" in capsys.readouterr().err


def test_a_job_that_started_too_often_does_not_train():
    """However it came to be started: Slurm counts."""
    code = "from launch.submitting.job import Training; Training(('configs/demo.toml',), 2)()"
    environment = {**os.environ, "SLURM_RESTART_COUNT": "3", "SUBMITIT_EXECUTOR": "slurm"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == TOO_MANY_REQUEUES
    assert "this is start 4, and --max-requeues is 2" in done.stdout


def test_what_is_pickled_is_words():
    """So that a job can be started by another version of this program."""
    assert Training(("a.toml", "b=1"), 5).__dict__ == {
        "arguments": ("a.toml", "b=1"),
        "max_requeues": 5,
    }
