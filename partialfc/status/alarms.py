"""What is wrong with a run, from what its folder says: the alerts of a page without Prometheus."""

from collections.abc import Iterator
from statistics import median

from partialfc.records.ledger import was_stopped
from partialfc.status.run import Snapshot
from partialfc.words import duration, names_of, size

_SILENT = 300.0
_STARVED = 0.2
_LATE = 0.15


def alarms(run: Snapshot) -> Iterator[str]:
    """Yield a sentence for each thing that somebody should look at."""
    ending = run.starts[-1].end if run.starts else None
    if ending is not None and not was_stopped(ending):
        yield f"The last start ended with exit code {ending['code']}: {ending['cause']}"
    running = ending is None and not run.ended
    if running and run.silence > _SILENT:
        yield f"Nothing was written for {duration(run.silence)}."
    lost = [one.rank for one in run.ranks if one.step is None]
    if lost:
        yield f"No answer from {names_of(lost)} (of {len(run.ranks)})."
    moving = [one for one in run.ranks if one.step is not None]
    furthest = max((one.step or 0 for one in moving), default=0)
    behind = [one.rank for one in moving if (one.step or 0) < furthest - 1]
    if behind:
        yield f"Behind the others: {names_of(behind)} (of {len(run.ranks)})."
    step = run.last("step_seconds")
    if len(moving) > 2 and step:
        usual = median(one.wait for one in moving)
        late = [one.rank for one in moving if (usual - one.wait) / step > _LATE]
        if late:
            yield f"The others wait for {names_of(late)}."
    if skipped := run.last("skipped_steps"):
        yield f"{skipped:.0f} steps were skipped: the loss or the gradient was not finite."
    waited = run.last("data_wait_seconds")
    if step and waited and waited / step > _STARVED:
        yield f"A step waits {waited / step:.0%} of its time for images."
    if run.checkpoints and run.free < 3 * run.checkpoints[0].bytes:
        taken = size(run.checkpoints[0].bytes)
        yield f"{size(run.free)} are left on the disk, and a checkpoint takes {taken}."
    every = run.config.checkpoint.interval(0) if run.config else 0
    saved = run.checkpoints[0].step if run.checkpoints else 0
    if running and every and run.step - saved > 2 * every + 1:
        old = run.step - saved
        yield f"The newest checkpoint is {old:,} steps old; one is due every {every:,}."
    wall = run.spent.get("wall", 0.0)
    if wall > 3600 and run.spent["goodput"] < 0.8:
        yield f"Of {duration(wall)} only {run.spent['goodput']:.0%} was training."
