"""What a run leaves behind besides checkpoints: records, the picture, the summary."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from partialfc.checkpoint.folder import count_invalid, path_of
from partialfc.config import Config
from partialfc.distributed.agreement import largest
from partialfc.errors import NonFiniteError
from partialfc.evaluation.sets import Results
from partialfc.model.step import Step
from partialfc.monitoring.monitor import Monitor
from partialfc.protocols.curves import Curves, curves
from partialfc.records.console import ProgressBar, from_here, show_table
from partialfc.records.environment import environment, peak_memory
from partialfc.records.ledger import Ledger
from partialfc.records.metrics import JsonLines, Sink, TensorBoard, finite, read_metrics
from partialfc.records.sinks.beside import Beside, beside
from partialfc.records.sinks.run_sink import Opening
from partialfc.records.stages import read_stages
from partialfc.records.unessential import lost_records, unessential
from partialfc.runtime.process import Runtime
from partialfc.runtime.stragglers import Stragglers
from partialfc.training.bad_images import BadImages
from partialfc.training.stages import Span
from partialfc.words import rate
from partialfc.writing import write_json

_SKIPS_IN_A_ROW = 20
"""Steps that fp16 may skip one after the other while it looks for its loss scale."""


class Recorder:
    """Records every ``log.every_steps`` steps, and decides whether a run is still sound.

    A GPU is synchronised with the host once per record, on every rank.

    Args:
        config: Where to record, and how often.
        runtime: This rank; rank 0 writes.
        step: Steps taken before this process.
        span: Of the stage that they lead into; the whole run, if it has no stages.
        total_steps: Steps of the run.
        ledger: Where the time goes.

    Attributes:
        ledger: The same.
        total: The same as ``total_steps``.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        step: int,
        span: Span,
        total_steps: int,
        ledger: Ledger,
    ) -> None:
        self.ledger, self.total = ledger, total_steps
        self._config, self._runtime = config, runtime
        self._span = span
        self._step = self._first = self._recorded = step
        self._images_before = self._images_recorded = span.images_at(step)
        self._clock, self._waited, self._trained = time.monotonic(), 0.0, 0.0
        device = runtime.device
        zero = torch.zeros((), device=device)
        self._loss, self._skipped = zero.clone(), zero.clone()
        self._bad_losses, self._in_a_row, self._longest = zero.clone(), zero.clone(), zero.clone()
        self.bad_images = BadImages(config.run.folder, config.data.bad_share, runtime.ranks)
        self._stragglers = Stragglers(runtime.ranks, device)
        self._invalid = count_invalid(config.run.folder / "checkpoints")
        self._results: Results | None = None
        self._sinks: list[Sink] = []
        self._beside: list[Beside] = []
        self._monitor: Monitor | None = None

    def __enter__(self) -> "Recorder":
        if self._config.monitor.port is not None:
            self._monitor = Monitor(self._config, self._runtime, self.ledger, self.total)
            self._sinks.append(self._monitor)
        if self._runtime.leads:
            log, folder = self._config.log, self._config.run.folder
            self._sinks.append(JsonLines(folder / "metrics.jsonl", self._step))
            if log.tensorboard:
                with unessential(folder / "tensorboard"):
                    self._sinks.append(TensorBoard(folder / "tensorboard", self._step))
            if log.progress:
                self._sinks.append(ProgressBar(self._step, self.total))
            opening = Opening(
                folder=folder,
                settings=self._config.model_dump(mode="json", exclude_none=True),
                project=log.project,
                name=log.name,
                tracking_uri=log.tracking_uri,
            )
            self._beside = beside(log.sinks, opening, self._step)
        self._clock = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sink in (*self._sinks, *self._beside):
            sink.close()

    def enter(self, span: Span, config: Config) -> None:
        """Go on with the next stage; what was between the two counts for neither."""
        self._span = span
        if self._monitor is not None:
            self._monitor.enter(config)
        self._stragglers.skip()
        self._clock = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        with self.ledger.spending("data"):
            yield
        self._waited += time.monotonic() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave the time inside out of the throughput."""
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()  # host sync: what was queued before belongs to training
        start = time.monotonic()
        yield
        self._stragglers.skip()
        self._clock += time.monotonic() - start

    def stepped(self, step: int, done: Step, rate: float) -> None:
        """Take note of a step, and record it if it is due.

        Raises:
            NonFiniteError: On every rank, at the record after it happened.
        """
        self._step = step
        if self._monitor is not None:
            self._monitor.stepped(step)
        self._loss += done.loss
        self._skipped += done.skipped
        self._bad_losses += ~done.loss.isfinite()
        self._in_a_row = (self._in_a_row + 1) * done.skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)
        if step % self._config.log.every_steps and step != self._span.last:
            return
        # Host sync: one read of all numbers.
        loss, norm, skipped, scale, *terms = torch.stack(
            [self._loss, done.gradient_norm, self._skipped, done.loss_scale, *done.terms.values()]
        ).tolist()
        replaced = self.refuse_unsound()
        now, count = time.monotonic(), step - self._recorded
        images = self._span.images_at(step)
        seconds = now - self._clock
        self._trained += seconds
        values = {
            "loss": loss / count,
            "learning_rate": rate,
            "gradient_norm": norm,
            "epoch": self._span.passes_at(step),
            **{f"epoch_{name}": one for name, one in self._span.passes_of_sets(step).items()},
            "samples_seen": images,
            "throughput": (images - self._images_recorded) / seconds,
            "step_seconds": seconds / count,
            "data_wait_seconds": self._waited / count,
            "loss_scale": scale,
            "skipped_steps": skipped,
            "replaced_images": replaced,
            "peak_memory_bytes": peak_memory(self._runtime.device),
            **{f"loss_{name}": term for name, term in zip(done.terms, terms, strict=True)},
        }
        if self._config.stages:
            values["stage"] = self._span.number
        if slowest := self._stragglers.look(count, seconds / count):
            values["slowest_rank"] = slowest.rank
            values["slowest_rank_seconds"] = slowest.seconds
            values["slow_ranks"] = int(slowest.slow)
        if self._runtime.leads:
            totals = self.ledger.totals()
            values["goodput"] = totals.pop("goodput")
            values["invalid_checkpoints"] = self._invalid
            values["lost_records"] = lost_records()
            values |= {f"spent_{kind}_seconds": value for kind, value in totals.items()}
        self._write(step, {name: value for name, value in values.items() if math.isfinite(value)})
        self._loss.zero_()
        self._recorded, self._clock, self._waited = step, time.monotonic(), 0.0
        self._images_recorded = images

    def refuse_unsound(self) -> int:
        """Return the images that were replaced; raise if they, or steps that fail, are too many.

        Steps fail whose loss is not finite, or that fp16 skips without need. Host sync, and one
        all-reduce. The numbers are the same on all ranks, so all raise together.

        Raises:
            NonFiniteError: Before anything of such a step is recorded or saved.
            DataError: The same for the images.
        """
        skipped, bad, longest = torch.stack(
            [self._skipped, self._bad_losses, self._longest]
        ).tolist()
        allowed = _SKIPS_IN_A_ROW if self._config.precision.compute == "fp16" else 1
        if not bad and longest < allowed:
            return self.bad_images.check(self._span.images_at(self._step) - self._images_before)
        raise NonFiniteError(
            f"the loss was not finite in {bad:.0f} steps, and {skipped:.0f} steps changed nothing "
            f"because the loss or the gradient was not, {longest:.0f} of them in a row, up to step "
            f"{self._step}. Go on from the last checkpoint with a lower optimizer.lr or a longer "
            "schedule.warmup_steps, and look at the images of these steps."
        )

    def validated(self, step: int, results: Results) -> None:
        """Record the numbers of the held-out sets; those at step 0 are the untrained ones."""
        self._results = results
        if step == 0 and self._runtime.leads:
            found = {
                name: {"untrained": {"far": one.far, "tar": one.tar}}
                for name, one in _curves_of(results).items()
            }
            path = self._config.run.folder / "curves.json"
            with unessential(path):  # a file, as another process may take the last step
                write_json(path, found)
        headline = {
            name: value for name, value in results.headline().items() if math.isfinite(value)
        }
        if headline:
            self._write(step, headline)

    def finish(self) -> None:
        """Write summary, curves, picture and report, and show where they are. Collective."""
        peak = largest(peak_memory(self._runtime.device), self._runtime.ranks)
        if not self._runtime.leads:
            return
        # What writes pages and draws is a tenth of a start's imports, and one rank needs it, here.
        from partialfc.records.report import read_run, write_report

        for sink in self._sinks:
            sink.close()
        self._sinks = []
        folder = self._config.run.folder
        records: list[dict[str, float]] = []
        with unessential(folder / "metrics.jsonl"):
            records = read_metrics(folder / "metrics.jsonl")
        summary = self._summary(peak, records)
        with unessential(folder / "summary.json"):
            write_json(folder / "summary.json", summary)
        untrained: dict[str, Any] = {}
        with unessential(folder / "curves.json"):
            began = read_run(folder).curves
            untrained = {name: one.get("untrained") for name, one in began.items()}
        found = {
            name: asdict(one) | {"untrained": untrained.get(name)}
            for name, one in (_curves_of(self._results) if self._results else {}).items()
        }
        with unessential(folder / "curves.json"):
            write_json(folder / "curves.json", found)
        with unessential(folder / "report.html"):
            write_report(folder / "report.html", [read_run(folder)])
        with unessential(folder / "training.png"):
            self._draw(records, untrained)
        artifacts = [folder / "report.html"]
        if self._config.log.upload_checkpoint:
            artifacts.append(path_of(folder / "checkpoints", self._step))
        for sink in self._beside:
            sink.finish(self._step, folder / "training.png", artifacts)
        self._show(summary)

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sink in (*self._sinks, *self._beside):
            sink.write(step, values)

    def _summary(self, peak: int, records: list[dict[str, float]]) -> dict[str, Any]:
        steps = self._recorded - self._first
        losses = [record["loss"] for record in records if "loss" in record]
        summary: dict[str, Any] = {
            "seconds": self.ledger.totals()["wall"],
            "spent": {name: round(value, 3) for name, value in self.ledger.totals().items()},
            "images_per_second": (self._images_recorded - self._images_before)
            / max(self._trained, 1e-9),
            "peak_memory_bytes": peak,
            "world_size": self._runtime.ranks.size,
            "device": self._runtime.device.type,
            "steps": self._step,
            "steps_of_this_process": steps,
            "samples_seen": self._span.images_at(self._step),
            "loss": losses[-1] if losses else None,
            "epochs_of_sets": self._span.passes_of_sets(self._step),
            "torch": torch.__version__,
            "environment": environment(self._runtime.device),
        }
        if self._results is None:
            return summary
        start: dict[str, float] = next((record for record in records if record["step"] == 0), {})
        sets = {
            name: finite(asdict(verified.numbers))
            for name, verified in self._results.verified.items()
        }
        if sets:
            name, numbers = next(iter(sets.items()))
            summary["verification"] = {
                "set": name,
                **numbers,
                "accuracy_untrained": start.get("verification_accuracy"),
                "sets": sets,
            }
        ranked = {
            name: finite(asdict(numbers)) for name, numbers in self._results.identified.items()
        }
        if ranked:
            name, numbers = next(iter(ranked.items()))
            summary["identification"] = {
                "set": name,
                "rank_1": numbers["rate"]["1"],
                "rank_1_untrained": start.get("identification_rank_1"),
                "sets": ranked,
            }
        return summary

    def _draw(self, records: list[dict[str, float]], untrained: dict[str, Any]) -> None:
        from partialfc.records.figures import training_figure

        verified = self._results.verified if self._results else {}
        name, first = next(iter(verified.items()), ("", None))
        start = untrained.get(name)
        losses = [record for record in records if "loss" in record]
        accuracies = [record for record in records if "verification_accuracy" in record]
        training_figure(
            self._config.run.folder / "training.png",
            [record["step"] for record in losses],
            [record["loss"] for record in losses],
            [record["step"] for record in accuracies],
            [record["verification_accuracy"] for record in accuracies],
            first.cosine if first else None,
            first.same if first else None,
            untrained=(start["far"], start["tar"]) if start else None,
            marks=[(one.first, one.name) for one in read_stages(self._config.run.folder)[1:]],
        )

    def _show(self, summary: dict[str, Any]) -> None:
        folder = from_here(self._config.run.folder)
        rows = {
            "time": f"{summary['seconds']:.0f} s, {rate(summary['images_per_second'])} images/s",
            "ranks": f"{summary['world_size']} on {summary['device']}",
            "peak memory": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB per rank",
        }
        if "verification" in summary:
            numbers = summary["verification"]
            untrained = numbers["accuracy_untrained"]
            rows["verification"] = f"{numbers['accuracy']:.4f} ten-fold accuracy" + (
                f" (at step 0: {untrained:.4f})" if untrained is not None else ""
            )
        if "identification" in summary:
            rows["identification"] = f"{summary['identification']['rank_1']:.4f} rank-1"
        rows["checkpoints"] = str(folder / "checkpoints")
        rows["metrics"] = str(folder / "metrics.jsonl")
        if self._config.log.tensorboard:
            rows["TensorBoard"] = f"tensorboard --logdir {folder / 'tensorboard'}"
        rows["picture"] = str(folder / "training.png")
        rows["report"] = str(folder / "report.html")
        rows["summary"] = str(folder / "summary.json")
        show_table("Done", rows)


def _curves_of(results: Results) -> dict[str, Curves]:
    return {name: curves(one.cosine, one.same) for name, one in results.verified.items()}
