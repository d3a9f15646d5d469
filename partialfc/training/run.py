"""A run, in the order the data flows: open, restore, then steps with measures and saves between."""

import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.base import fact_of, may_vanish, restore_base
from partialfc.checkpoint.folder import path_of
from partialfc.checkpoint.pretrained import load_pretrained
from partialfc.checkpoint.saving import Saver
from partialfc.checkpoint.teacher import Teacher, open_teacher
from partialfc.checkpoint.trained_backbone import state_at
from partialfc.checkpoint.warm_start import warm_start
from partialfc.config import Config, ConfigError, to_toml
from partialfc.config.conflicts import head_compute
from partialfc.config.heads import each_head
from partialfc.data.loaders.stream import Batches
from partialfc.data.names import NAMES, Names, names_file, names_of
from partialfc.distributed.agreement import any_rank, words_of_any
from partialfc.errors import CrashLoopError, Preempted
from partialfc.evaluation.sets import Evaluation
from partialfc.margins import guidance
from partialfc.model.adapted import adapted_words
from partialfc.model.build import Model, build
from partialfc.model.frozen import frozen_words
from partialfc.model.heads import Numbering
from partialfc.model.optimizer import groups_in_words
from partialfc.model.step import train_step
from partialfc.records.console import from_here
from partialfc.records.ledger import fruitless, keeping
from partialfc.records.sinks.run_sink import find
from partialfc.records.unessential import unessential
from partialfc.runtime import preemption
from partialfc.runtime.folder_lock import locked
from partialfc.runtime.place import elastic_warning, own_place
from partialfc.runtime.process import Runtime
from partialfc.training.changes import what_changed
from partialfc.training.data import (
    TrainingData,
    open_batches,
    open_training_data,
    sets_in_words,
    with_next,
)
from partialfc.training.images import numberings
from partialfc.training.must_match import agreed_shards, must_match
from partialfc.training.preflight import Finding, preflight, report
from partialfc.training.recorder import Recorder
from partialfc.training.schedule import learning_rate, weight_factor
from partialfc.training.start import begin_centers, refuse_two_starts
from partialfc.writing import write_text


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
        _announce(config, runtime)
    with locked(config.run.folder, runtime):
        _train(config, runtime)


def _train(config: Config, runtime: Runtime) -> None:
    if config.run.preflight:
        report(look_before(config, runtime), runtime)
    shards = agreed_shards(config, runtime)
    folder, settings = config.run.folder, to_toml(config)
    data = open_training_data(config, runtime)
    evaluation = Evaluation(config, runtime)
    teacher = open_teacher(config, data.dataset, runtime)
    numbered = numberings(config, data.dataset)
    model = build(config, runtime, numbered, kept_shards=shards)
    facts = must_match(config, data.dataset, teacher)
    if runtime.leads:
        if words := sets_in_words(data):
            print(f"sets: {words}", flush=True)
        _warn(config, model)
    if not config.run.resume and checkpoint.exist(folder / "checkpoints"):
        raise ConfigError(
            f"run.resume = false with run.folder = {str(folder)!r}, which holds checkpoints of a "
            "run. Choose another folder, or set run.resume = true to go on."
        )
    written = folder / "ledger.jsonl" if runtime.leads else None
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    with keeping(written, ranks=runtime.ranks.size, settings=digest) as ledger:
        if runtime.watchdog is not None:
            runtime.watchdog.follow(ledger)
        _refuse_crash_loop(config, runtime, ledger.before, digest)
        with ledger.spending("restore"):
            step, base = _restore(config, runtime, model, facts, data, evaluation)
        ledger.at(step, now=True)
        summary = folder / "summary.json"
        if step >= data.steps and summary.exists():
            if runtime.leads:
                print(f"{summary}: the run ended at step {step}, and {data.steps} are asked for.")
            return
        if runtime.leads:
            with unessential(folder / "config.toml"):
                write_text(folder / "config.toml", settings)
            with unessential(folder / NAMES):
                if step == 0 and (names := names_of(data.dataset)):
                    _write_names(folder, names, numbered)
        with (
            Recorder(
                config,
                runtime,
                step,
                data.steps,
                data.order.steps_per_epoch,
                ledger,
                data.steps_of_sets,
            ) as recorder,
            Saver(
                folder / "checkpoints",
                {**facts, **base},
                runtime,
                keep=config.checkpoint.keep,
                keep_every_steps=config.checkpoint.keep_every_steps,
                settings=settings,
            ) as saver,
            closing(open_batches(config, runtime, data, step)) as batches,
            any_rank(preemption.asked, runtime.ranks) as asked_to_stop,
            preemption.stepping(),
        ):
            if runtime.watchdog is not None:
                runtime.watchdog.follow(ledger, saver)
            loop = _Loop(config, runtime, model, teacher, batches, evaluation, recorder, saver)
            reached = loop.run(step, data.steps, asked_to_stop)
            if reached < data.steps:
                saved = from_here(path_of(folder / "checkpoints", reached))
                raise Preempted(
                    f"stopped as asked, after the checkpoint of step {reached}. The same command "
                    f"goes on from {saved}.",
                    by_ctrl_c=preemption.received(signal.SIGINT),
                )


def look_before(config: Config, runtime: Runtime) -> list[Finding]:
    """Return what a look at the machines finds, before a run or instead of it. Collective."""
    agreed_shards(config, runtime)
    data = open_training_data(config, runtime)
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
        f"{', '.join(dict.fromkeys(of_heads))}",
        flush=True,
    )
    if sentence := elastic_warning(config, own_place()):
        print(f"warning: {sentence}", flush=True)


def _warn(config: Config, model: Model) -> None:
    words = (
        frozen_words(model.backbone, config.backbone.freeze),
        adapted_words(model.backbone, config.backbone.lora),
        groups_in_words(model.optimizer, model.shards),
    )
    if any(words):
        print(f"backbone: {'; '.join(filter(None, words))}", flush=True)
    losses = model.losses.losses.items()
    pairs = [name for name, one in losses if one.loss.compares_pairs]
    for sentence in (
        *_of_margins(config, model),
        *(
            ['backbone.shard = "fsdp2": on one rank there is nothing to divide the backbone among.']
            if config.backbone.shard == "fsdp2" and model.shards is None
            else []
        ),
        *guidance.pair_warnings(pairs, config.data.images_per_identity),
    ):
        print(f"warning: {sentence}", flush=True)


def _of_margins(config: Config, model: Model) -> Iterator[str]:
    for name, one in each_head(config).items():
        head = model.heads[name]
        sampled = max(2, math.ceil(head.sharding.num_identities * one.head.sample_rate))
        for sentence in guidance.warnings(head.margin, sampled, config.backbone.embedding_dim):
            yield f"heads.{name}: {sentence}" if name else sentence


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


def _restore(
    config: Config,
    runtime: Runtime,
    model: Model,
    facts: dict[str, object],
    data: TrainingData,
    evaluation: Evaluation,
) -> tuple[int, dict[str, object]]:
    """Load what the run goes on from or begins with; return the steps taken, and the base of its
    adapters as a fact for checkpoints."""
    found = checkpoint.newest(config.run.folder / "checkpoints", runtime)
    if found is None and config.run.resume_from is not None:
        found = checkpoint.named(config.run.resume_from, runtime)
    if found is not None:
        step = checkpoint.load(found, model, facts, runtime)
        if runtime.leads:
            print(f"going on from {from_here(found)}", flush=True)
            for sentence in what_changed(found, config, data.order):
                print(f"warning: {sentence}", flush=True)
        return step, restore_base(found, model.backbone, config, state_at)
    refuse_two_starts(config)
    base = _begin(config, runtime, model, data)
    begin_centers(config, runtime, model, data.dataset, evaluation)
    return 0, base


def _begin(config: Config, runtime: Runtime, model: Model, data: TrainingData) -> dict[str, object]:
    """Give a new run what it begins with; return the base of its adapters."""
    if config.run.start_from is not None:
        place = warm_start(config.run.start_from, config, model, runtime, data.dataset)
        if runtime.leads and (sentence := may_vanish(place, config)):
            print(f"warning: {sentence}", flush=True)
        return fact_of(place, model.backbone, config)
    if config.backbone.pretrained is not None:
        load_pretrained(config.backbone.pretrained, config, model)
        return fact_of(config.backbone.pretrained, model.backbone, config)
    if config.backbone.freeze and runtime.leads:
        print(
            "warning: backbone.freeze without run.start_from or backbone.pretrained: what is "
            "frozen stays as it was drawn at random.",
            flush=True,
        )
    return {}


@dataclass(frozen=True, slots=True)
class _Loop:
    """The steps of a run, and what happens between them."""

    config: Config
    runtime: Runtime
    model: Model
    teacher: Teacher | None
    batches: Batches
    evaluation: Evaluation
    recorder: Recorder
    saver: Saver

    def run(self, step: int, total_steps: int, asked_to_stop: Callable[[], bool]) -> int:
        """Go from ``step`` to the end, or to where it is asked to stop; return the step reached."""
        config, heads, recorder = self.config, self.model.heads, self.recorder
        ledger = recorder.ledger
        if step == 0 or step >= total_steps:
            self._verify(step)
        ledger.switch("train")
        uses_host = any(head.memory.uses_host for head in heads.values())
        stop, pairs = False, with_next(self.batches, want_next=uses_host)
        while step < total_steps and not stop:
            with recorder.waiting():
                batch, next_identities = next(pairs)
            recorder.bad_images.note(batch.replaced)
            rate = learning_rate(
                step,
                peak=config.optimizer.lr,
                total_steps=total_steps,
                **config.schedule.model_dump(),
            )
            self.saver.check()
            if next_identities is not None:
                heads.prefetch(config, next_identities)
            lesson_of = None
            if self.teacher is not None:
                final_factor = config.losses.teacher.final_factor
                factor = weight_factor(step, total_steps, final_factor)
                lesson_of = self.teacher.lessons(batch.sample_ids, factor)
            done = train_step(
                self.model,
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
            self._pause(
                step,
                verify=_due(step, config.verification.every_steps, total_steps),
                save=stop or _due(step, config.checkpoint.interval(total_steps), total_steps),
                in_a_hurry=stop,
            )
        with ledger.spending("save"):
            self.saver.wait()
        if step >= total_steps:
            with ledger.spending("other"):
                recorder.finish()
        return step

    def _pause(self, step: int, *, verify: bool, save: bool, in_a_hurry: bool) -> None:
        if not (verify or save):
            return
        self.recorder.refuse_unsound()
        with self.recorder.pausing():
            if in_a_hurry:  # who asks a run to stop may not wait for a verification
                self._save(step)
            if verify:  # before the checkpoint, so that no kill leaves a step without it
                self._verify(step)
            if save and not in_a_hurry:
                self._save(step)

    def _save(self, step: int) -> None:
        with self.recorder.ledger.spending("save"):
            self.saver.save(step, self.model)
        self.recorder.ledger.at(step, now=True)

    def _verify(self, step: int) -> None:
        with self.recorder.ledger.spending("other"):
            self.recorder.validated(step, self.evaluation.measure(self.model))


def _due(step: int, every: int, total_steps: int) -> bool:
    return step == total_steps or (every > 0 and step % every == 0)
