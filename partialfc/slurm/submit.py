"""From a command line of ``partialfc slurm`` to a job, through submitit."""

import os
import shlex
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, SlurmExecutor

from partialfc.config import ConfigError, load
from partialfc.slurm.actions import JobError, Submitted, follow
from partialfc.slurm.task import Training

# Until Python installs a handler, SIGUSR2 would end a task; ignored, nothing is lost: no step yet.
PYTHON = f"env --ignore-signal=USR2 {shlex.quote(sys.executable)}"

REQUEUES = 100
REQUEUES_HERE = 5
"""submitit's local executor starts nothing more often than six times."""

_SLURM_ONLY = ("cpus_per_task", "partition", "account", "qos", "slurm")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, or an array of them: the options of ``partialfc slurm``.

    Attributes:
        configs: Settings files, one run each.
        overrides: ``key.sub=value``, for all of them.
        lead: Seconds between the signal to save and the end of the time limit.
        slurm: ``key=value`` options of sbatch that have no option here.
    """

    configs: tuple[Path, ...]
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    time: int
    partition: str | None
    account: str | None
    qos: str | None
    lead: int
    max_requeues: int
    name: str | None
    setup: Sequence[str]
    slurm: Sequence[str]
    jobs: Path

    @property
    def ranks_per_node(self) -> int:
        """Tasks of a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def trainings(self) -> list[Training]:
        """What each task of each job of the array calls."""
        return [
            Training((str(config.absolute()), *self.overrides), self.max_requeues)
            for config in self.configs
        ]

    def folders(self) -> list[Path]:
        """Return the folder of every run, after a look at its settings.

        Raises:
            ConfigError: If settings are wrong, do not fit the ranks, or two runs share a folder.
        """
        if not self.configs:
            raise ConfigError("no settings file: name at least one CONFIG.toml.")
        folders: list[Path] = []
        for path in self.configs:
            config = load(path, self.overrides)
            config.check(self.nodes * self.ranks_per_node)
            if config.run.folder in folders:
                raise ConfigError(
                    f"{path}: run.folder = {str(config.run.folder)!r} is that of another run of "
                    "this array. Give each its own folder."
                )
            folders.append(config.run.folder)
        return folders


def submit(job: Job) -> Submitted:
    """Hand the job to Slurm; return its id and where it writes.

    Raises:
        ConfigError: If the settings are wrong.
        JobError: If Slurm is not here or refuses the job.
    """
    runs = job.folders()
    folder = _make_folder(job, runs)
    try:
        first, *_ = _slurm(job, folder, runs).submit_array(job.trainings)
    except Exception as error:  # submitit raises what sbatch prints, in several kinds
        raise JobError(f"Slurm did not take the job: {error}") from error
    submitted = Submitted(first.job_id.partition("_")[0], folder, tuple(runs))
    submitted.write()
    return submitted


def submission_text(job: Job) -> str:
    """Return the sbatch script, as Slurm would get it."""
    runs = job.folders()
    executor = _slurm(job, job.jobs.absolute() / _name(job, runs), runs)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def train_here(job: Job) -> int:
    """Run the job on this machine through submitit, and show rank 0's log until it ends.

    Raises:
        ConfigError: If the settings are wrong, are not of one run on one node, or only Slurm knows
            them.
    """
    runs = job.folders()
    if job.nodes > 1 or len(runs) > 1:
        raise ConfigError(
            f"--local with {job.nodes} nodes and {len(runs)} settings files: this machine is one "
            "node and takes one run at a time."
        )
    asked = [name for name in _SLURM_ONLY if getattr(job, name)]
    if asked:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigError(f"--local with {words}: only Slurm can do that. Leave it out here.")
    if job.max_requeues > REQUEUES_HERE:
        raise ConfigError(
            f"--local with --max-requeues = {job.max_requeues}: submitit starts a job here at most "
            f"{REQUEUES_HERE + 1} times. Set {REQUEUES_HERE} or fewer."
        )
    executor = LocalExecutor(_make_folder(job, runs), python=PYTHON)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=job.ranks_per_node,
        gpus_per_node=job.gpus_per_node or 0,
        timeout_min=job.time,
        signal_delay_s=job.lead,
        stderr_to_stdout=True,
        setup=list(job.setup) or None,
    )
    running = executor.submit(job.trainings[0])
    try:
        follow(running.paths.stdout, lambda: running.state == "RUNNING")
    except KeyboardInterrupt:
        running.cancel()
        running.wait()
        return 130
    return 0 if running.exception() is None else 1


class _Slurm(SlurmExecutor):
    """submitit's, which can also write a script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _slurm(job: Job, folder: Path, runs: Sequence[Path]) -> _Slurm:
    """The executor of a job: it knows everything but what to run."""
    optional: dict[str, Any] = {
        "gpus_per_node": job.gpus_per_node,
        "cpus_per_task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
    }
    srun = ["--kill-on-bad-exit=1"]
    if job.cpus_per_task:
        srun.append(f"--cpus-per-task={job.cpus_per_task}")  # since 22.05 srun does not inherit it
    more: dict[str, Any] = {"requeue": True}
    for entry in job.slurm:
        key, equals, value = entry.partition("=")
        more[key.lstrip("-")] = value if equals else True
    executor = _Slurm(folder, python=PYTHON)
    executor.update_parameters(
        job_name=_name(job, runs),
        nodes=job.nodes,
        ntasks_per_node=job.ranks_per_node,
        time=job.time,
        signal_delay_s=job.lead,
        stderr_to_stdout=True,
        setup=list(job.setup) or None,
        srun_args=srun,
        additional_parameters=more,
        wckey="partialfc",
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def _name(job: Job, runs: Sequence[Path]) -> str:
    return job.name or runs[0].name


def _make_folder(job: Job, runs: Sequence[Path]) -> Path:
    """Make the job's folder: its owner's alone, because the job runs what is pickled in it.

    Raises:
        JobError: If others may write where it is made.
    """
    parent = job.jobs.absolute()
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = parent.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise JobError(
            f"--jobs = {str(parent)!r}: must be yours and writable by nobody else, because jobs "
            f"run what lies in it. chmod go-w it, or name another folder."
        )
    folder = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{_name(job, runs)}-{os.getpid()}"
    folder.mkdir(mode=0o700)
    return folder
