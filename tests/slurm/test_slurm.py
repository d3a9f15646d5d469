"""partialfc slurm without Slurm: the script that it would submit, and mistakes."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from partialfc.__main__ import main
from partialfc.errors import Preempted
from partialfc.slurm import command as slurm
from partialfc.slurm.submit import PYTHON
from partialfc.slurm.task import TOO_MANY_REQUEUES, Training
from tests.support.places import FIXTURES, ROOT

GOLDEN = FIXTURES / "slurm"

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
        (
            ["configs/demo.toml", "--tasks-per-node=2", "--local", "--qos=a", "--slurm=exclusive"],
            "--local with --qos, --slurm: only Slurm",
        ),
        (["configs/demo.toml", "--tasks-per-node=2", "--local", "--cpus-per-task=2"], "--cpus-per"),
        (
            ["configs/demo.toml", "--tasks-per-node=2", "--time=2"],
            "--lead = 120 with --time = 2 min",
        ),
        (["configs/demo.toml", "--tasks-per-node=2", "--slurm=time=1"], "Set --time"),
        (["configs/demo.toml", "--tasks-per-node=2", "--slurm=signal=INT@9"], "Set --lead"),
        (["configs/demo.toml", "--gpus-per-node=2", "run.device=cpu"], "GPUs would stand idle"),
        (["configs/demo.toml", "--tasks-per-node=2", "--jobs=a%j"], "without % and"),
        (
            ["configs/demo.toml", "--tasks-per-node=2", "--local", "--max-requeues=6"],
            "at most 6 times",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(words, message, tmp_path, capsys):
    assert main(["slurm", f"--jobs={tmp_path / 'jobs'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    "named",
    ["--name=a%j", "--name=it's 5\\x", "--name=exp/1", 'run.folder="runs/a\\nrm b"', "--name=ü"],
)
def test_a_name_means_nothing_to_slurm_or_a_shell(named, monkeypatch, capsys):
    """%j is replaced by Slurm, a slash is another folder, a line break ends the option."""
    monkeypatch.chdir(ROOT)
    words = ["configs/demo.toml", "--tasks-per-node=2", named]
    assert slurm.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    (name,) = re.findall(r"^#SBATCH --job-name=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w.+-]+", name, re.ASCII)
    lines = text.splitlines()
    script = lines[: lines.index("# command")]
    assert all(line.startswith("#") or not line for line in script)
    assert f"--output=ROOT/jobs/{name}/%j_0_log.out" in text.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("word", ["--qos=a\nrm -r b", "--slurm=comment=a\nb"])
def test_an_option_is_one_line_of_the_script(word, capsys):
    with pytest.raises(SystemExit):
        slurm.main(["configs/demo.toml", "--tasks-per-node=2", word, "--dry-run"])
    assert "must be on one line" in capsys.readouterr().err


def test_a_task_ignores_the_signal_before_python_has_a_handler():
    """With sh alone: env --ignore-signal came with coreutils 8.31."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('still here')"
    command = [*shlex.split(PYTHON), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.stdout == "still here\n", done.stderr


def test_a_script_for_slurm_and_a_run_without_it_are_not_asked_for_together(capsys):
    with pytest.raises(SystemExit):
        slurm.main(["configs/demo.toml", "--tasks-per-node=2", "--local", "--dry-run"])
    assert "not allowed with" in capsys.readouterr().err


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
    assert main(["slurm", *words]) == 2
    assert "writable by nobody else" in capsys.readouterr().err


def test_a_job_that_started_too_often_does_not_train():
    """However it came to be started: Slurm counts."""
    code = "from partialfc.slurm.task import Training; Training(('configs/demo.toml',), 2)()"
    environment = {**os.environ, "SLURM_RESTART_COUNT": "3", "SUBMITIT_EXECUTOR": "slurm"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == TOO_MANY_REQUEUES
    assert "this is start 4, and --max-requeues is 2" in done.stdout


EVERY_END = """
import os, signal, sys
import partialfc.commands.train
from partialfc.runtime import preemption
from partialfc.slurm.task import Training
for code in map(int, sys.argv[1:]):
    for number in (None, signal.SIGTERM, signal.SIGUSR2):
        preemption.forget()
        def main(words):
            if number:
                os.kill(os.getpid(), number)
            return code
        partialfc.commands.train.main = main
        print(f"case {code} {number and number.name}", flush=True)
        try:
            Training((), 5)()
        except SystemExit as end:
            print(f"exit {end.code}", flush=True)
os._exit(0)  # otherwise the process ends with the status of the last case
"""


def test_only_what_a_signal_stopped_goes_back_to_the_queue(tmp_path):
    """Of every exit code that users are told: a crash loop, or a fault, is not started again.

    scontrol is a script here, which does to the task what Slurm does: it ends it.
    """
    page = (ROOT / "partialfc" / "config" / "README.md").read_text()
    table = page.partition("| exit code | cause |")[2]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", table.partition("\n\n")[0], re.M)]
    assert {0, 2, 8, Preempted.exit_code, 130} < set(codes)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "scontrol $*"\nkill -TERM $PPID\n')
    scontrol.chmod(0o755)
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_END, *map(str, codes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    cases = dict(re.findall(r"case (\d+ \w+)\n(.*?)(?=case|\Z)", done.stdout, re.S))
    assert len(cases) == 3 * len(codes), done.stdout
    assert [case for case, text in cases.items() if "queue" in text] == ["75 SIGUSR2"]
    assert "queued again for start 2 of at most 6" in cases["75 SIGUSR2"]
    for case, text in cases.items():
        code = case.split()[0]
        assert text.endswith(f"exit {code}\n") or code == "0", case


def test_what_is_pickled_is_words():
    """So that a job can be started by another version of this program."""
    assert Training(("a.toml", "b=1"), 5).__dict__ == {
        "arguments": ("a.toml", "b=1"),
        "max_requeues": 5,
    }
