"""Weights & Biases. Its environment says the rest: WANDB_MODE, WANDB_ENTITY, WANDB_DIR."""

import os
from pathlib import Path

import wandb

from partialfc.records.metrics import Values
from partialfc.records.sinks.run_sink import Opening


class Wandb:
    """One run of W&B; offline, a folder for each start, with one id.

    Every record is a row of its own over ``step``, as W&B's own counter takes no step twice and
    holds a row back until the next one.
    """

    def __init__(self, opening: Opening) -> None:
        self._run = wandb.init(
            project=opening.project or os.environ.get("WANDB_PROJECT", "partialfc"),
            name=opening.name or os.environ.get("WANDB_NAME", opening.folder.name),
            dir=os.environ.get("WANDB_DIR", opening.folder),
            config=dict(opening.settings),
            id=opening.id,
            resume="allow" if opening.id else None,
            settings=wandb.Settings(
                console="off",  # streams of a run stay as they are
                x_transaction_log_flush_interval=1.0,  # seconds; what a kill takes, offline
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def record(self, step: int, values: Values) -> None:
        """Log a row."""
        self._run.log({**values, "step": step})

    def picture(self, step: int, path: Path) -> None:
        """Log it as media."""
        self._run.log({path.stem: wandb.Image(str(path)), "step": step})

    def artifact(self, path: Path) -> None:
        """Log it as the next version of the artifact of this run and name."""
        kind = "checkpoint" if path.is_dir() else "report"
        artifact = wandb.Artifact(f"{self.id}-{kind}", type=kind, metadata={"name": path.name})
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, *, done: bool) -> None:
        """Finish the run; one that was stopped counts as failed until it goes on."""
        self._run.finish(exit_code=0 if done else 1)
