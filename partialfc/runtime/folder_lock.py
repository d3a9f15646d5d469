"""One start at a time in a run's folder: ``.lock`` in it says who holds it.

The kernel keeps the lock, on NFS the server does, and lets go of it when the process dies, however
it dies; that of a machine that is lost a while later. Some mounts keep locks on their own machine
only, or none. So the holder also touches the file every two seconds: a lock of another machine that
is not touched while one waits is that of a process that is gone. No clocks are compared.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from partialfc.config import ConfigError
from partialfc.distributed.agreement import words_of_any
from partialfc.records.unessential import unessential
from partialfc.runtime.process import Runtime
from partialfc.writing import opened

_SECONDS_BETWEEN_TOUCHES = 2.0
_SECONDS_OF_A_LOOK = 10.0
_SECONDS_OF_A_LEASE = 120.0
"""In which a server finds that a machine is lost, and lets go of its locks; NFS takes 90."""
_SECONDS_TO_SIGN = 0.3
"""In which who took a lock at the same moment writes its name."""
_JOBS = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF", "JOB_ID": "SGE"}
_NEVER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
"""What no waiting mends: here nothing could be saved either."""


@contextmanager
def locked(folder: Path, runtime: Runtime, *, leads: bool | None = None) -> Iterator[None]:
    """Hold a run's folder inside; rank 0 does for all. Collective: the ranks agree on it.

    Args:
        folder: Of the run.
        runtime: This rank.
        leads: Whether this rank holds that of its host, where each has a disk of its own.

    Raises:
        ConfigError: On every rank, if another start holds it, or nothing can be written there.
    """
    held, problem = -1, ""
    if runtime.leads if leads is None else leads:
        held, problem = _take(folder)
        if problem and leads is not None:
            problem += " With checkpoint.shared = false every host needs a disk of its own there."
    if problem := words_of_any(problem, runtime.ranks):
        if held >= 0:
            os.close(held)
        raise ConfigError(f"run.folder = {str(folder)!r}: {problem}")
    ended = threading.Event()
    if held >= 0:
        threading.Thread(target=_touch, args=(held, ended), name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if held >= 0:
            with suppress(OSError):
                os.ftruncate(held, 0)
            os.close(held)


def _take(folder: Path) -> tuple[int, str]:
    """The descriptor of the lock, -1 where it cannot be kept; or what is to be done about it."""
    path, descriptor = folder / ".lock", -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = opened(path, os.O_RDWR | os.O_CREAT)
        with suppress(OSError):  # whoever may write to the folder may go on with the run
            os.fchmod(descriptor, folder.stat().st_mode & 0o666)
        alone = _lock(descriptor)
        if alone is False:
            time.sleep(_SECONDS_TO_SIGN)
        if holder := _alive(path, descriptor, alone):
            problem = f"{holder} trains in it. {_remedy()}"
        else:
            text = json.dumps(_self()).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
            return descriptor, ""
    except OSError as error:
        problem = f"nothing can be written there: {error.strerror}. Choose another folder."
        if error.errno not in _NEVER:
            with unessential(path):  # the disk is full: a lock is no checkpoint
                raise
            problem = ""
    if descriptor >= 0:
        os.close(descriptor)
    return -1, problem


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; ``None`` where the file system knows no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        # Not lockf: it is lost when the process closes any descriptor of the file.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _alive(path: Path, descriptor: int, alone: bool | None) -> str:
    """Who trains there, or may; "" if nobody does. ``alone`` is what :func:`_lock` said."""
    held = _read(path)
    if not held or (alone is not None and _is_here(held)):  # what the kernel says is certain
        return _holder(path) if alone is False else ""
    patience = _SECONDS_OF_A_LEASE if alone is False else _SECONDS_OF_A_LOOK
    print(
        f"{path}: {_holder(path)} did not let go of it. Looking at most {patience:.0f} s whether "
        "it lives.",
        file=sys.stderr,
        flush=True,
    )
    before, until = path.stat().st_mtime_ns, time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(_SECONDS_BETWEEN_TOUCHES / 4)
        if alone is False and _lock(descriptor):
            return ""
        os.close(os.open(path, os.O_RDONLY))  # NFS looks again at what is opened
        if path.stat().st_mtime_ns != before and _read(path):
            return _holder(path)
    return _holder(path) if alone is False else ""


def _touch(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(_SECONDS_BETWEEN_TOUCHES):
        with suppress(OSError):
            os.utime(descriptor)


def _self() -> dict[str, str | int]:
    jobs = [f"{of} job {os.environ[name]}" for name, of in _JOBS.items() if name in os.environ]
    job = "".join(jobs[:1])
    return {"host": socket.gethostname(), "process": os.getpid(), "job": job, "boot": _boot()}


def _is_here(held: Mapping[str, object]) -> bool:
    """Whether a holder is of this machine: containers of several may have one name."""
    return held.get("host") == socket.gethostname() and held.get("boot") == _boot()


def _boot() -> str:
    """Of which start of which machine this is, where the system says it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def _read(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            held = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _holder(path: Path) -> str:
    held = _read(path)
    job = f", {held['job']}" if held.get("job") else ""
    return f"process {held.get('process', '?')} on {held.get('host', 'some host')}{job}"


def _remedy() -> str:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        return (
            f"This is task {os.environ.get('SLURM_PROCID')} of {tasks} that srun started, each to "
            "train alone: start them with partialfc slurm, or srun torchrun."
        )
    return "Wait for its end, stop it, or choose another run.folder."
