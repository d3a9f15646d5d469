"""Settings of the run as a whole, of what it saves and of what it records."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from partialfc.config.schema import OneOrMore, Section, UserPath
from partialfc.definitions import Range, Unit
from partialfc.definitions.phrases import to_value
from partialfc.records.sinks.run_sink import refuse_unknown

EverySteps = Annotated[int, Range(ge=0), Unit("steps")]

_LONGEST_INTERVAL, _SHORTEST_INTERVAL = 2000, 50


class Run(Section):
    """The run as a whole."""

    folder: UserPath = Path("runs/default")
    """Where checkpoints, logs and the resolved settings go. Made if it does not exist."""

    seed: Annotated[int, Range(ge=0, lt=2**63)] = 2048
    """Key of every random choice. Any number of ranks with the same seed makes the same choices."""

    epochs: Annotated[float | None, Range(gt=0), Unit("epochs")] = 20.0
    """Length of the run in passes over the data, fractions allowed. Left out when ``steps`` is
    set."""

    steps: Annotated[int | None, Range(ge=1), Unit("steps")] = None
    """Length of the run in optimizer steps, instead of ``epochs``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. ``auto`` is a GPU per rank if there are GPUs, otherwise the CPU; where a job
    or CUDA_VISIBLE_DEVICES asks for GPUs and torch sees none, the run is refused."""

    threads: Annotated[int | None, Range(ge=1), Unit("threads")] = None
    """CPU threads per rank for torch's operators. Left out, OMP_NUM_THREADS; without it, the CPUs
    that the ranks of a host may use are divided among them."""

    resume: bool = True
    """Go on from the newest valid checkpoint in ``folder``, if there is one."""

    resume_from: UserPath | None = None
    """A checkpoint to go on from where ``folder`` has none yet, such as
    runs/a/checkpoints/step_00002000; the run that wrote it is left as it is."""

    start_from: UserPath | None = None
    """What a new run begins with: a run's folder, a checkpoint or a file of weights for the
    backbone alone, or a folder that partialfc identities made, for its class centers as well."""

    fruitless_starts: Annotated[int, Range(ge=0)] = 3
    """Starts in a row that may fail before they come to a new step; the next one is refused with
    their causes. Other settings begin a new count, and 0 refuses none."""

    hang_seconds: Annotated[float, Range(ge=0), Unit("seconds")] = 60.0
    """How long a rank may give no sign of life before the run names it and ends; a step may take
    ten times as long, and the first one, a verification or a save sixty times. 0 never ends a
    run; ranks that agree on a checkpoint wait two hours for one another, or longer if this lets
    them."""

    preflight: bool = False
    """Look at the machines before the first step, as partialfc preflight does; a few seconds."""

    deterministic: bool = False
    """Use deterministic kernels only, for a run that repeats bit for bit on the same hardware.
    Slower."""

    plugins: Annotated[tuple[str, ...], OneOrMore] = Field(default=(), strict=False)
    """Modules of your own that are imported before anything is checked: the names in their
    BACKBONES, MARGINS, LOSSES, ROW_RULES and SINKS are then names here. "my.module:Name" needs no
    entry."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is not None:
            return {"epochs": None, **values}
        return values

    @model_validator(mode="after")
    def _one_beginning(self) -> "Run":
        if self.start_from is not None and self.resume_from is not None:
            raise ValueError(
                f'start_from = "{self.start_from}" with run.resume_from = "{self.resume_from}": a '
                "run begins anew with what was trained, or goes on from a checkpoint. Remove one."
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "Run":
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"epochs = {self.epochs} with run.steps = {self.steps}: only one of the two may "
                "set the length of the run. Remove one (on the command line: run.epochs= or "
                "run.steps=)."
            )
        return self


class Checkpoint(Section):
    """What is saved, for resuming and for use."""

    every_steps: Annotated[int | None, Range(ge=0), Unit("steps")] = None
    """Steps between checkpoints. Left out, it is 2000, or a fifth of a shorter run, but 50 at
    least. 0 saves at the end only."""

    keep: Annotated[int, Range(ge=1)] = 2
    """Newest checkpoints kept. One is deleted only after its successor is complete."""

    keep_every_steps: EverySteps = 0
    """Checkpoints of multiples of this number of steps are never deleted; it is a multiple of
    ``every_steps``. 0 keeps no more than ``keep``."""

    shared: bool = True
    """Whether all hosts see one ``run.folder``. With ``false`` each has a disk of its own at this
    path and writes there what its ranks write. At a start it gets what it lacks from the others, so
    each file of a checkpoint must be on one of them."""

    peers_every_steps: EverySteps = 0
    """Steps between copies that each host keeps in its memory of the ranks of another one, so that
    a run that loses a host goes on from them and reads no checkpoint. 0 makes none."""

    peers_folder: UserPath = Path("/dev/shm")
    """Where they lie on every host: in memory, or on a disk of its own."""

    @model_validator(mode="after")
    def _folder_of_copies(self) -> "Checkpoint":
        folder = type(self).model_fields["peers_folder"].default
        if not self.peers_every_steps and self.peers_folder != folder:
            raise ValueError(
                f"peers_folder = {to_value(self.peers_folder)}: with peers_every_steps = 0 no "
                "copies are made. Set peers_every_steps, or remove it."
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> "Checkpoint":
        every = self.interval(0)
        if self.keep_every_steps and (not every or self.keep_every_steps % every):
            raise ValueError(
                f"keep_every_steps = {self.keep_every_steps}: must be a multiple of "
                f"checkpoint.every_steps = {every}, or no checkpoint is ever of such a step."
            )
        return self

    def interval(self, total_steps: int) -> int:
        """Return the steps between checkpoints; 0 for none but the last.

        Args:
            total_steps: Of the run; 0 where they are not known.
        """
        if self.every_steps is not None:
            return self.every_steps
        if not total_steps or self.keep_every_steps:  # multiples of 2000 must be saved
            return _LONGEST_INTERVAL
        return min(_LONGEST_INTERVAL, max(_SHORTEST_INTERVAL, total_steps // 5))


class Log(Section):
    """What is recorded of a run, and where."""

    every_steps: Annotated[int, Range(ge=1), Unit("steps")] = 10
    """Steps between records of the metrics."""

    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""

    progress: bool = True
    """Show progress on the terminal."""

    sinks: Annotated[tuple[str, ...], OneOrMore] = Field(default=(), strict=False)
    """Where else the run is followed: wandb, mlflow, or a class of your own as
    "my.module:Class"."""

    project: str | None = None
    """Project of the run in wandb, experiment in mlflow. Left out, WANDB_PROJECT or
    MLFLOW_EXPERIMENT_NAME, and without it partialfc."""

    name: str | None = None
    """Name of the run there. Left out, WANDB_NAME in wandb, and without it that of
    ``run.folder``."""

    tracking_uri: str | None = None
    """Server or store of mlflow, such as http://localhost:5000. Left out, MLFLOW_TRACKING_URI."""

    upload_checkpoint: bool = False
    """Give the sinks a copy of the last checkpoint when the run is done."""

    @model_validator(mode="after")
    def _sinks_have_names(self) -> "Log":
        for name in self.sinks:
            refuse_unknown(name)
        if not self.sinks:
            for key in ("project", "name", "tracking_uri", "upload_checkpoint"):
                if value := getattr(self, key):
                    raise ValueError(
                        f"{key} = {to_value(value)} without log.sinks: nothing takes it. Remove "
                        'it, or set log.sinks = ["wandb"] or ["mlflow"].'
                    )
        return self
