"""A run, in the order the data flows: open, restore, then steps with measures and saves between."""

import hashlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.folder import path_of
from partialfc.checkpoint.local_disks.disks import LocalDisks
from partialfc.checkpoint.peers.run import Peers, peers_of
from partialfc.checkpoint.saving import Saver
from partialfc.config import Config, ConfigError, to_toml
from partialfc.config.conflicts import head_compute, why_no_overlap
from partialfc.config.heads import each_head
from partialfc.data.loaders.stream import Batches
from partialfc.data.names import NAMES, Names, names_file, names_of
from partialfc.distributed.agreement import from_leader, total, words_of_any
from partialfc.distributed.links import any_rank
from partialfc.errors import CrashLoopError, Preempted, need
from partialfc.model.heads import Numbering
from partialfc.model.step import train_step
from partialfc.records.console import from_here
from partialfc.records.ledger import fruitless, keeping
from partialfc.records.sinks.run_sink import find
from partialfc.records.stages import STAGES
from partialfc.records.unessential import unessential
from partialfc.runtime import preemption
from partialfc.runtime.folder_lock import locked
from partialfc.runtime.place import elastic_warning, own_place
from partialfc.runtime.process import Runtime
from partialfc.training.data import open_batches, with_next
from partialfc.training.findings import Finding
from partialfc.training.images import numberings
from partialfc.training.must_match import agreed_shards
from partialfc.training.opened import Opened, likely_step
from partialfc.training.preflight import preflight, report
from partialfc.training.recorder import Recorder
from partialfc.training.stages import Stage, open_stages, stage_at, table_of
from partialfc.writing import write_json, write_text


def train(config: Config, runtime: Runtime) -> None:
    """Train as the settings say, from the newest checkpoint on if there is one. Collective.

    Raises:
        ConfigError: If the settings do not fit the data, the sets or the backbone, or another start
            trains in the folder.
        NonFiniteError: If the loss or the gradient is not finite.
        CheckpointError: If a checkpoint cannot be written, or is of another run.
        DataError: If too many images cannot be decoded.
        CrashLoopError: If the last starts came to no new step.
        Preempted: On every rank, after a checkpoint, if a signal asked any of them to stop.
    """
    if runtime.leads:
        find(config.log.sinks)  # what is not installed is said before anything takes time
        need("jinja2", "matplotlib")
        _announce(config, runtime)
    saved = config.run.folder / "checkpoints"
    disks = None if config.checkpoint.shared else LocalDisks(saved, runtime)
    leads = None if disks is None else disks.leads
    with locked(config.run.folder, runtime, leads=leads), peers_of(config, runtime) as peers:
        _train(config, runtime, peers, disks)


def _train(config: Config, runtime: Runtime, peers: Peers | None, disks: LocalDisks | None) -> None:
    if not config.run.resume and total(
        checkpoint.exist(config.run.folder / "checkpoints"), runtime.ranks
    ):
        raise ConfigError(
            f"run.resume = false with run.folder = {str(config.run.folder)!r}, which holds "
            "checkpoints of a run. Choose another folder, or set run.resume = true to go on."
        )
    if disks is not None and (peers is None or peers.step < peers.on_disk):
        disks.newest(has_copies=peers is not None and peers.found is not None)
    if config.run.preflight:
        report(look_before(config, runtime), runtime)
    shards = agreed_shards(config, runtime, peers)
    folder, settings = config.run.folder, to_toml(config)
    stages = open_stages(config, runtime)
    stage = stage_at(stages, likely_step(config, runtime, peers))
    opened = Opened(stage, runtime, shards, disks)
    written = folder / "ledger.jsonl" if runtime.leads else None
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    with keeping(written, ranks=runtime.ranks.size, settings=digest) as ledger:
        if runtime.watchdog is not None:
            runtime.watchdog.follow(ledger)
        _refuse_crash_loop(config, runtime, ledger.before, digest)
        with ledger.spending("restore"):
            step, base = opened.restore(stages, peers)
        ledger.at(step, now=True)
        summary, end = folder / "summary.json", stages[-1].span.last
        if step >= end and from_leader(summary.exists(), runtime.ranks):
            if runtime.leads:
                print(f"{summary}: the run ended at step {step}, and {end} are asked for.")
            return
        if runtime.leads if disks is None else disks.leads:
            _describe(folder, settings, step, stages)
        with (
            Recorder(config, runtime, step, opened.stage.span, end, ledger) as recorder,
            runtime.links() as links,
            any_rank(preemption.asked, links) as asked_to_stop,
            preemption.stepping(),
        ):
            step, stop = _train_stage(opened, step, base, recorder, asked_to_stop, peers)
            while step < end and not stop:
                with ledger.spending("restore"):
                    step, base = opened.restore(stages)
                recorder.enter(opened.stage.span, opened.stage.config)
                step, stop = _train_stage(opened, step, base, recorder, asked_to_stop, peers)
            if step < end:
                saved = from_here(path_of(folder / "checkpoints", step))
                raise Preempted(
                    f"stopped as asked, after the checkpoint of step {step}. The same command "
                    f"goes on from {saved}.",
                    by_ctrl_c=preemption.received(signal.SIGINT),
                )


def _train_stage(
    opened: Opened,
    step: int,
    base: Mapping[str, object],
    recorder: Recorder,
    asked_to_stop: Callable[[], bool],
    peers: Peers | None,
) -> tuple[int, bool]:
    """Go from a step to the end of its stage; return the step reached, and whether to stop."""
    stage, runtime, ledger = opened.stage, opened.runtime, recorder.ledger
    config = stage.config
    facts, settings = {**opened.facts, **base}, to_toml(config)
    with (
        Saver(
            config.run.folder / "checkpoints",
            facts,
            runtime,
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
            settings=settings,
            disks=opened.disks,
        ) as saver,
        closing(open_batches(config, runtime, stage.data, stage.span.batch(step))) as batches,
    ):
        if runtime.watchdog is not None:
            runtime.watchdog.follow(ledger, saver)
        copy = (
            partial(peers.copy, model=opened.model, facts=facts, settings=settings)
            if peers
            else None
        )
        loop = _Loop(opened, batches, recorder, saver, copy)
        return loop.run(step, asked_to_stop)


def _describe(folder: Path, settings: str, step: int, stages: Sequence[Stage]) -> None:
    """Write into the run's folder what the run is."""
    with unessential(folder / "config.toml"):
        write_text(folder / "config.toml", settings)
    with unessential(folder / NAMES):
        if step == 0 and (names := names_of(stages[0].data.dataset)):
            _write_names(folder, names, numberings(stages[0].config, stages[0].data.dataset))
    with unessential(folder / STAGES):
        if table := table_of(stages):
            write_json(folder / STAGES, {"stages": table})
        else:
            (folder / STAGES).unlink(missing_ok=True)


def look_before(config: Config, runtime: Runtime) -> list[Finding]:
    """Return what a look at the machines finds, before a run or instead of it. Collective.

    Every stage is looked through, and the machines at what the largest global batch needs.
    """
    agreed_shards(config, runtime)
    most = max(open_stages(config, runtime), key=lambda one: one.config.data.global_batch)
    config, data = most.config, most.data
    return preflight(
        config,
        runtime,
        data.dataset,
        numberings(config, data.dataset),
        lambda: open_batches(config, runtime, data, 0),
    )


def _write_names(folder: Path, names: Names, numbered: Mapping[str, Numbering]) -> None:
    """Whom each head's identities are, in a file for each of several."""
    for head, numbering in numbered.items():
        own = [names[number] for span in numbering.spans for number in span]
        write_text(folder / names_file(head), json.dumps(own, indent=0) + "\n")


def _announce(config: Config, runtime: Runtime) -> None:
    """Say where the run is and in which precision: before all else, so that nobody is surprised."""
    ranks, device = runtime.ranks.size, runtime.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    threads = torch.get_num_threads()
    of_heads = (head_compute(one, device.type) for one in each_head(config).values())
    print(
        f"{ranks} rank{'s' * (ranks > 1)} on {device.type}{name}, {threads} thread"
        f"{'s' * (threads > 1)} each; backbone {config.precision.compute}, head "
        f"{', '.join(dict.fromkeys(of_heads))}{_where_centers_are_updated(config, runtime)}",
        flush=True,
    )
    if sentence := elastic_warning(config, own_place()):
        print(f"warning: {sentence}", flush=True)


def _where_centers_are_updated(config: Config, runtime: Runtime) -> str:
    """On a GPU, whether beside the backbone's backward, and why not."""
    device, ranks = runtime.device.type, runtime.ranks.size
    if device != "cuda":
        return ""
    reasons = (why_no_overlap(one, device, ranks) for one in each_head(config).values())
    places = ("beside" if why is None else f"behind ({why})" for why in reasons)
    return f"; centers updated {', '.join(dict.fromkeys(places))} the backbone's backward"


def _refuse_crash_loop(
    config: Config, runtime: Runtime, before: list[dict[str, Any]], settings: str
) -> None:
    allowed = config.run.fruitless_starts
    failed = fruitless(before, settings)
    causes = "; ".join(
        f"at step {start.reached}: {start.end['cause'] if start.end else 'killed'}"
        for start in (failed[-allowed:] if 0 < allowed <= len(failed) else ())
    )
    if causes := words_of_any(causes, runtime.ranks):  # rank 0 alone has read the ledger
        raise CrashLoopError(
            f"run.fruitless_starts = {allowed}: so many starts in a row came to no new step "
            f"({causes}). Repair the cause and start once with run.fruitless_starts=0, or with "
            "other settings."
        )


@dataclass(frozen=True, slots=True)
class _Loop:
    """The steps of a stage, and what happens between them."""

    opened: Opened
    batches: Batches
    recorder: Recorder
    saver: Saver
    copy: Callable[..., None] | None

    def run(self, step: int, asked_to_stop: Callable[[], bool]) -> tuple[int, bool]:
        """Go from ``step`` to the end of the stage, or to where it is asked to stop.

        Return the step reached, and whether it was asked to.
        """
        stage, model, recorder = self.opened.stage, self.opened.model, self.recorder
        config, heads, end = stage.config, model.heads, recorder.total
        teacher, last = self.opened.teacher, stage.span.last
        ledger = recorder.ledger
        if step == 0 or step >= end:
            self._verify(step)
        ledger.switch("train")
        stop = False
        pairs = with_next(self.batches, last - 1 - step if heads.draw_ahead else 0)
        while step < last and not stop:
            with recorder.waiting():
                batch, next_identities = next(pairs)
            recorder.bad_images.note(batch.replaced)
            rate = stage.rate(step)
            self.saver.check()
            if next_identities is not None:
                heads.sample_step(config, next_identities, ahead=True)
            lesson_of = None
            if teacher is not None:
                lesson_of = teacher.lessons(batch.sample_ids, stage.teacher_factor(step))
            done = train_step(
                model,
                config,
                batch.images,
                batch.identities,
                rate,
                lesson_of,
                batch.weights,
            )
            step += 1
            ledger.at(step)
            recorder.stepped(step, done, rate)
            stop = asked_to_stop()
            if step == last and last < end:  # the next stage may sample in another way
                for head in heads.values():
                    head.optimizer.catch_up(None)
            self._pause(
                step,
                verify=_due(step, config.verification.every_steps, last),
                save=stop or _due(step, config.checkpoint.interval(end), last),
                copy=self._copies(step, last) and not stop,
                in_a_hurry=stop,
            )
        with ledger.spending("save"):
            self.saver.wait()
        if step >= end:
            with ledger.spending("other"):
                recorder.finish()
        return step, stop

    def _copies(self, step: int, last: int) -> bool:
        every = self.opened.stage.config.checkpoint.peers_every_steps
        return every > 0 and step % every == 0 and step < last

    def _pause(self, step: int, *, verify: bool, save: bool, copy: bool, in_a_hurry: bool) -> None:
        if not (verify or save or copy):
            return
        self.recorder.refuse_unsound()
        with self.recorder.pausing():
            if in_a_hurry:  # who asks a run to stop may not wait for a verification
                self._save(step)
            if verify:  # before the checkpoint, so that no kill leaves a step without it
                self._verify(step)
            if save and not in_a_hurry:
                self._save(step)
            if copy and self.copy is not None:
                with self.recorder.ledger.spending("save"):
                    self.copy(step, saved=self.saver.last)

    def _save(self, step: int) -> None:
        with self.recorder.ledger.spending("save"):
            self.saver.save(step, self.opened.model)
        self.recorder.ledger.at(step, now=True)

    def _verify(self, step: int) -> None:
        with self.recorder.ledger.spending("other"):
            self.recorder.validated(step, self.opened.evaluation.measure(self.opened.model))


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
