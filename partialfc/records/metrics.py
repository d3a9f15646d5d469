"""What a run records: one table of metrics, and the sinks that write them.

Records are written by rank 0 every ``log.every_steps`` steps; verification writes its own.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from partialfc.records.ledger import KINDS
from partialfc.records.lines import Lines, cut_after, is_number, is_step, read_lines
from partialfc.records.parts import parts_of, remove
from partialfc.records.unessential import unessential
from partialfc.writing import write_text

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a run records.

    Attributes:
        name: In metrics.jsonl and TensorBoard.
        unit: What one is, or "" for a plain number.
        help: What it means.
        exported: In Prometheus ``partialfc_<exported>``, where that is not the name.
        labels: In Prometheus.
    """

    name: str
    unit: str
    help: str
    exported: str = ""
    labels: tuple[tuple[str, str], ...] = ()


TABLE = (
    Metric("loss", "", "Mean loss over the global batch and the steps since the last record"),
    Metric("loss_triplet", "", "Triplet loss of this step, without its weight"),
    Metric("loss_contrastive", "", "Contrastive loss of this step, without its weight"),
    Metric("loss_uniformity", "", "Uniformity loss of this step, without its weight"),
    Metric("loss_center", "", "Mean of 1 - cos to the own center at this step"),
    Metric("loss_inter_class", "", "Mean cosine of a center and its nearest one at this step"),
    Metric("loss_teacher", "", "Loss of what a teacher says at this step, without its weight"),
    Metric("learning_rate", "", "Learning rate of the backbone at this step"),
    Metric("gradient_norm", "", "Norm of the backbone's gradient at this step, before clipping"),
    Metric("epoch", "epochs", "Passes over the data so far"),
    Metric("stage", "", "Number of the stage, from 1, in a run with stages"),
    Metric("samples_seen", "images", "Images seen so far by all ranks"),
    Metric(
        "throughput",
        "images/s",
        "Images per second over all ranks since the last record",
        "throughput_images_per_second",
    ),
    Metric("step_seconds", "seconds", "Mean time of a step since the last record"),
    Metric("data_wait_seconds", "seconds", "Mean time that a step waited for its batch"),
    Metric("loss_scale", "", "Loss scale of fp16; 1 without it"),
    Metric(
        "skipped_steps",
        "steps",
        "Steps without an update since the start of this process",
        "skipped_steps_total",
    ),
    Metric(
        "replaced_images",
        "images",
        "Images replaced on all ranks because their record is bad, in this process",
        "replaced_images_total",
    ),
    Metric(
        "lost_records",
        "records",
        "Records and printed lines that rank 0 could not write, in this process",
        "lost_records_total",
    ),
    Metric("peak_memory_bytes", "bytes", "Peak memory of rank 0"),
    Metric("slowest_rank", "", "The rank that the others wait for most"),
    Metric("slowest_rank_seconds", "seconds", "How much longer the others wait in a step for it"),
    Metric("slow_ranks", "ranks", "1 while it is so slow that the run says so"),
    Metric("invalid_checkpoints", "", "Checkpoints that were set aside because they are corrupt"),
    Metric(
        "goodput",
        "",
        "Share of the run's wall time, over all its starts, in steps that count",
        "goodput_ratio",
    ),
    Metric("spent_wall_seconds", "seconds", "Wall time of the run over all its starts"),
    *(
        Metric(f"spent_{kind}_seconds", "seconds", text, "spent_seconds", (("kind", kind),))
        for kind, text in KINDS.items()
    ),
    Metric("verification_accuracy", "", "Ten-fold accuracy on the first verification set"),
    Metric("verification_tar", "", "TAR at FAR 1e-3 on the first verification set"),
    Metric("identification_rank_1", "", "Rank-1 rate on the first identification set"),
)
NAMES = {metric.name for metric in TABLE}
MEASURES = (b'"verification_', b'"identification_')
"""What the lines of held-out sets hold; they are few."""


class Sink(Protocol):
    """Somewhere to write records."""

    def write(self, step: int, values: Values) -> None:
        """Write values of some metrics of ``TABLE`` after ``step`` steps."""

    def close(self) -> None:
        """Write what is left."""


class JsonLines:
    """``metrics.jsonl``: a JSON object per record, with ``step`` and ``time`` (Unix seconds); of a
    long run the newest, and the others in ``metrics.parts`` (:mod:`partialfc.records.parts`).

    Records after ``step`` are dropped: they belong to a part of the run that will be repeated.
    """

    def __init__(self, path: Path, step: int) -> None:
        with unessential(path):
            if step:
                cut_after(path, is_sound, lambda record: record["step"] <= step, MEASURES)
            else:
                write_text(path, "")
                for part in parts_of(path):
                    remove(part)
        self._lines = Lines(path, MEASURES)

    def write(self, step: int, values: Values) -> None:
        """Append one line."""
        self._lines.append(json.dumps({"step": step, "time": time.time(), **values}))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the records of a metrics.jsonl; lines that are damaged or cut short are left out.

    Of a long run, some that are spread over it and all of held-out sets; see
    :func:`~partialfc.records.parts.some_lines`.
    """
    return read_lines(path, is_sound, MEASURES)[0]


def is_sound(record: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is one: a step, and numbers or ``None``."""
    numbers = all(value is None or is_number(value) for value in record.values())
    return numbers and is_step(record.get("step"))


class TensorBoard:
    """TensorBoard event files, written without torch.

    Events after ``step`` in files of earlier starts are not shown any more: they come again.

    Raises:
        OSError: If they cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._folder = folder
        self._writer = EventFileWriter(str(folder))
        begins = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=begins))

    def write(self, step: int, values: Values) -> None:
        """Add one event with a scalar per metric."""
        scalars = [
            self._summary.Value(tag=tag(name), simple_value=value) for name, value in values.items()
        ]
        summary = self._summary(value=scalars)
        with unessential(self._folder):
            self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flush and close the event file."""
        with unessential(self._folder):
            self._writer.close()


def tag(name: str) -> str:
    """Return the name that groups a metric, by what stands before the slash."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("verification", "identification") else f"train/{name}"


def finite(value: Any) -> Any:
    """JSON has no NaN and only text for keys: ``None`` and ``str``."""
    if isinstance(value, dict):
        return {
            f"{name:g}" if isinstance(name, float) else str(name): finite(item)
            for name, item in value.items()
        }
    return None if isinstance(value, float) and not math.isfinite(value) else value
