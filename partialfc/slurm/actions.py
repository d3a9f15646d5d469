"""What became of jobs: states from scontrol, which needs no accounting database, and from runs."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from partialfc.records.metrics import read_metrics
from partialfc.writing import write_json

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}
_AT_WORK = _WAITING | {"RUNNING", "COMPLETING"}
_SECONDS_BETWEEN_LOOKS = 1.0


class JobError(RuntimeError):
    """Slurm is not here, or does not know or take a job."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submitted job, as its folder keeps it.

    Attributes:
        job_id: Slurm's; of an array, that of the array.
        folder: Scripts and logs.
        runs: Folder of each run of the array.
    """

    job_id: str
    folder: Path
    runs: tuple[Path, ...]

    def write(self) -> None:
        """Write ``job.json``."""
        runs = [str(run) for run in self.runs]
        write_json(self.folder / "job.json", {"job_id": self.job_id, "runs": runs})

    @property
    def members(self) -> Iterator[tuple[str, Path]]:
        """Id and run of each job of the array, or of the one job."""
        for number, run in enumerate(self.runs):
            yield (f"{self.job_id}_{number}" if len(self.runs) > 1 else self.job_id), run

    def log(self, member: str, rank: int) -> Path:
        """The log of one rank of one member; submitit names it."""
        return self.folder / f"{member}_{rank}_log.out"


def all_submitted(jobs: Path) -> list[Submitted]:
    """Return the jobs of a folder, oldest first.

    Raises:
        JobError: If a record is not one that this program wrote.
    """
    found = []
    for path in sorted(jobs.absolute().glob("*/job.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            runs = tuple(Path(run) for run in entry["runs"])
            found.append(Submitted(str(entry["job_id"]), path.parent, runs))
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path}: not a record of a job: {error!r}. Remove it.") from error
    return found


def find(job: str, jobs: Path) -> tuple[Submitted, str]:
    """Return the job of an id and the id of its member: that of an array is ``ID_NUMBER``.

    Raises:
        JobError: If no job of the folder has this id.
    """
    known = all_submitted(jobs)
    for submitted in known:
        members = [member for member, _ in submitted.members]
        if job in members:
            return submitted, job
        if job == submitted.job_id:
            return submitted, members[0]
    ids = ", ".join(submitted.job_id for submitted in known) or "none"
    raise JobError(f"job {job}: not submitted from {jobs.absolute()}, which knows {ids}.")


@dataclass(frozen=True, slots=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: Slurm's word for it, or "" where Slurm has forgotten the job.
        restarts: How often it started again.
        reason: Why it waits, if it does.
    """

    name: str
    restarts: int = 0
    reason: str = ""

    @property
    def at_work(self) -> bool:
        """Whether more is to come."""
        return self.name in _AT_WORK


def state_of(member: str) -> State:
    """Return what Slurm says of a job now.

    Raises:
        JobError: If there is no Slurm here.
    """
    done = slurm("scontrol", "show", "job", "--oneliner", member)
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout.splitlines()[0])) if done else {}
    return State(
        fields.get("JobState", ""), int(fields.get("Restarts", 0)), fields.get("Reason", "")
    )


def show_status(job: str | None, jobs: Path) -> int:
    """Print the state of one job, or of all that were submitted from here."""
    table = Table("job", "state", "starts", "step", "loss", "run")
    for submitted in [find(job, jobs)[0]] if job else all_submitted(jobs):
        for member, run in submitted.members:
            state = state_of(member)
            losses = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
            word = state.name or ("FINISHED" if (run / "summary.json").exists() else "GONE")
            if state.name in _WAITING and state.reason not in ("", "None"):
                word += f" ({state.reason})"
            last = losses[-1] if losses else {}
            table.add_row(
                member,
                word,
                str(state.restarts + 1) if state.name else "",
                str(last.get("step", "")),
                f"{last['loss']:.4f}" if last else "",
                str(run),
            )
    Console(width=None if Console().is_terminal else 200, markup=False).print(table)
    return 0


def show_log(job: str, jobs: Path, rank: int) -> int:
    """Print the log of one rank so far, of all starts."""
    submitted, member = find(job, jobs)
    path = submitted.log(member, rank)
    if not path.exists():
        raise JobError(f"job {member}: rank {rank} has written nothing yet ({path}).")
    print(path.read_text(encoding="utf-8", errors="replace"), end="")
    return 0


def follow_log(job: str, jobs: Path, rank: int) -> int:
    """Print the log of one rank as it grows, until the job ends; Ctrl-C leaves the job running."""
    submitted, member = find(job, jobs)
    try:
        follow(submitted.log(member, rank), lambda: state_of(member).at_work)
    except KeyboardInterrupt:
        return 130
    state = state_of(member).name
    print(f"job {member}: {state or 'ended'}")
    return 0 if state in ("", "COMPLETED") else 1


def cancel(job: str, jobs: Path) -> int:
    """Cancel a job; of an array, one member or all."""
    find(job, jobs)
    if slurm("scancel", job) is None:
        raise JobError(f"job {job}: Slurm does not cancel it; see its state with status.")
    return 0


def follow(path: Path, at_work: Callable[[], bool]) -> None:
    """Print a file as it grows, until ``at_work`` says that nothing more comes."""
    position = 0
    while True:
        more_comes = at_work()
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                print(file.read(), end="", flush=True)
                position = file.tell()
        if not more_comes:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def slurm(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's commands; ``None`` if it fails.

    Raises:
        JobError: If it is not installed.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60
        )
    except FileNotFoundError as error:
        raise JobError(f"{command[0]}: not found. Run this where Slurm is installed.") from error
    return None if done.returncode else done
