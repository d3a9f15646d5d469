"""From a command line of ``partialfc slurm`` to a job, through submitit."""

import os
import re
import shlex
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, SlurmExecutor

from partialfc.checkpoint.shards import kept_shards, refuse_more_ranks
from partialfc.config import Config, ConfigError, load
from partialfc.slurm.actions import JobError, Submitted, follow
from partialfc.slurm.task import Training
from partialfc.words import duration

# Until Python installs a handler, SIGUSR2 would end a task; ignored, nothing is lost: no step yet.
PYTHON = f"""sh -c 'trap "" USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""

REQUEUES = 100
REQUEUES_HERE = 5
"""submitit's local executor starts nothing more often than six times."""

_SLURM_ONLY = ("cpus_per_task", "partition", "account", "qos", "slurm")

_OWN = {
    "time": "time",
    "signal": "lead",
    "nodes": "nodes",
    "ntasks-per-node": "tasks-per-node",
    "gpus-per-node": "gpus-per-node",
    "cpus-per-task": "cpus-per-task",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "job-name": "name",
}
"""Options of sbatch that have one here: given to Slurm twice, neither is sure to count."""


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

    @property
    def sbatch_options(self) -> dict[str, str | bool]:
        """``slurm`` by name; an option without a value is true."""
        parts = (entry.partition("=") for entry in self.slurm)
        return {
            key.lstrip("-").replace("_", "-"): value if equals else True
            for key, equals, value in parts
        }

    def runs(self) -> list[Config]:
        """Return the settings of every run, after a look at them and at the job's own.

        Raises:
            ConfigError: If settings are wrong, do not fit the ranks or a checkpoint that is there,
                two runs share a folder, or the job could not save before its end.
        """
        if not self.configs:
            raise ConfigError("no settings file: name at least one CONFIG.toml.")
        if self.lead >= 60 * self.time:
            raise ConfigError(
                f"--lead = {self.lead} with --time = {duration(60 * self.time)}: the signal to "
                "save comes so many seconds before the end, and would come before the start. Lower "
                "--lead, or raise --time."
            )
        if not (jobs := str(self.jobs.absolute())).isprintable() or {"%", "\\"} & set(jobs):
            raise ConfigError(
                f"--jobs = {jobs!r}: the path of a job's scripts must be on one line, without % "
                "and \\, which Slurm reads as its own. Name another folder."
            )
        for name in self.sbatch_options.keys() & _OWN.keys():
            raise ConfigError(f"--slurm {name}: it has an option here. Set --{_OWN[name]}.")
        runs: list[Config] = []
        for path in self.configs:
            config = load(path, self.overrides)
            ranks = self.nodes * self.ranks_per_node
            config.check(ranks)
            refuse_more_ranks(config, kept_shards(config), ranks)
            if self.gpus_per_node and config.run.device == "cpu":
                raise ConfigError(
                    f'{path}: run.device = "cpu" with --gpus-per-node = {self.gpus_per_node}: the '
                    "GPUs would stand idle. Set --tasks-per-node instead, or remove run.device."
                )
            if config.run.folder in [other.run.folder for other in runs]:
                raise ConfigError(
                    f"{path}: run.folder = {str(config.run.folder)!r} is that of another run of "
                    "this array. Give each its own folder."
                )
            runs.append(config)
        return runs


def submit(job: Job) -> Submitted:
    """Hand the job to Slurm; return its id and where it writes.

    Raises:
        ConfigError: If the settings are wrong.
        JobError: If Slurm is not here or refuses the job.
    """
    runs = job.runs()
    folder = _make_folder(job, runs)
    try:
        first, *_ = _slurm(job, folder, runs).submit_array(job.trainings)
    except Exception as error:  # submitit raises what sbatch prints, in several kinds
        raise JobError(f"Slurm did not take the job: {error}") from error
    folders = tuple(config.run.folder for config in runs)
    submitted = Submitted(first.job_id.partition("_")[0], folder, folders)
    submitted.write()
    return submitted


def submission_text(job: Job) -> str:
    """Return the sbatch script, as Slurm would get it."""
    runs = job.runs()
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
    runs = job.runs()
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


def _slurm(job: Job, folder: Path, runs: Sequence[Config]) -> _Slurm:
    """The executor of a job: it knows everything but what to run."""
    cpus = job.cpus_per_task
    if cpus is None and "cpus-per-gpu" not in job.sbatch_options:
        cpus = max(config.data.threads for config in runs)  # Slurm's own default is one
    optional: dict[str, Any] = {
        "gpus_per_node": job.gpus_per_node,
        "cpus_per_task": cpus,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
    }
    srun = ["--kill-on-bad-exit=1"]
    if cpus:
        srun.append(f"--cpus-per-task={cpus}")  # since 22.05 srun does not inherit it
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
        additional_parameters={"requeue": True, **job.sbatch_options},
        wckey=None,  # submitit's own name, unless it is told
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def _name(job: Job, runs: Sequence[Config]) -> str:
    """The job's name, of letters that mean nothing to a shell, to sbatch and in a path."""
    return re.sub(r"[^\w.+-]+", "_", job.name or runs[0].run.folder.name, flags=re.ASCII) or "run"


def _make_folder(job: Job, runs: Sequence[Config]) -> Path:
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
