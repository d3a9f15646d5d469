"""One task of a job: one rank. submitit starts it on every node.

submitit hands over a :class:`Training` as a pickle: it holds the words of a command line and
nothing else, and its folder is its owner's alone.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from partialfc.errors import Preempted
from partialfc.runtime import preemption

TOO_MANY_REQUEUES = 76
"""Exit code of a job that was started as often as it may be."""

_SECONDS_TO_BE_KILLED = 60.0


@dataclass(frozen=True)
class Training:
    """Train in the ranks of this job, and queue it again if it is preempted or out of time.

    Attributes:
        arguments: Of ``partialfc train``: a settings file and overrides.
        max_requeues: How often the job may start again, whatever the reason.
    """

    arguments: tuple[str, ...]
    max_requeues: int

    def __call__(self) -> None:
        """Train; return when the run is done, and exit with its code otherwise."""
        # Before anything slow, in place of submitit's handlers. SIGTERM, from scancel or where
        # Slurm's preemption sends no other, saves as well, but what was cancelled stays so.
        preemption.listen()
        restarts = restart_count()
        if restarts > self.max_requeues:
            _say(f"this is start {restarts + 1}, and --max-requeues is {self.max_requeues}.")
            sys.exit(TOO_MANY_REQUEUES)
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        from partialfc.commands.train import main

        code = main(list(self.arguments))
        if code == Preempted.exit_code and preemption.received(preemption.SIGNAL):
            if restarts < self.max_requeues:
                _requeue(restarts, self.max_requeues)
            else:
                _say(f"not queued again: --max-requeues is {self.max_requeues}. Submit it again.")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's, while submitit ends the task
        atexit.register(_leave, code)
        if code:
            sys.exit(code)


def _leave(code: int) -> None:
    """End the process without the teardown of torch, gloo and DALI, as ``partialfc train`` does."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk must not change the status
            stream.flush()
    os._exit(code)


def restart_count() -> int:
    """How often this job was started again; Slurm counts without an accounting database."""
    if _in_slurm():
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return int(_counter().read_text(encoding="utf-8")) if _counter().exists() else 0


def _in_slurm() -> bool:
    """Not whether there is a Slurm job: ``--local`` may run inside of one."""
    return os.environ["SUBMITIT_EXECUTOR"] == "slurm"


def _counter() -> Path:
    """submitit's local executor does not count: rank 0 does, before the ranks start again."""
    return Path(os.environ["SUBMITIT_FOLDER"]) / "restarts"


def _requeue(restarts: int, limit: int) -> None:
    """Rank 0 puts the job back into the queue, and Slurm then ends all tasks."""
    job = JobEnvironment()
    _say(f"queued again for start {restarts + 2} of at most {limit + 1}.")
    if job.global_rank == 0:
        if not _in_slurm():
            _counter().write_text(str(restarts + 1), encoding="utf-8")
        job._requeue(limit - restarts - 1)
    if _in_slurm():  # a task that ended by itself would be taken for a failure
        until = time.monotonic() + _SECONDS_TO_BE_KILLED
        while not preemption.received(signal.SIGTERM) and time.monotonic() < until:
            time.sleep(0.1)


def _say(text: str) -> None:
    if JobEnvironment().global_rank == 0:
        print(f"job {JobEnvironment().job_id}: {text}", flush=True)
