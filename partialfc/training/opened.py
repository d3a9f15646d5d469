"""What a stage trains and is measured with, and how it gets the state that it goes on from.

One stage follows another in the way that a start follows a kill: what the stage before left is in
its last checkpoint, and the next is made anew and loads it. So where a run was interrupted decides
no bit.
"""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.base import fact_of, may_vanish, restore_base
from partialfc.checkpoint.folder import read_manifest, steps
from partialfc.checkpoint.local_disks.disks import LocalDisks
from partialfc.checkpoint.peers.run import LINE, Peers
from partialfc.checkpoint.pretrained import load_pretrained
from partialfc.checkpoint.teacher import Teacher, open_teacher
from partialfc.checkpoint.trained_backbone import state_at
from partialfc.checkpoint.warm_start import warm_start
from partialfc.config import Config
from partialfc.config.heads import each_head
from partialfc.data.dataset import DataSet
from partialfc.distributed.agreement import from_leader
from partialfc.errors import CheckpointError, DamagedError
from partialfc.evaluation.sets import Evaluation
from partialfc.margins import guidance
from partialfc.model.adapted import adapted_words
from partialfc.model.build import Model, build
from partialfc.model.frozen import frozen_words
from partialfc.model.optimizer import groups_in_words
from partialfc.records.console import from_here
from partialfc.runtime.process import Runtime
from partialfc.training.changes import what_changed
from partialfc.training.data import sets_in_words
from partialfc.training.images import numberings
from partialfc.training.must_match import must_match
from partialfc.training.stages import Stage, stage_at, writer_of
from partialfc.training.start import begin_centers, refuse_two_starts


class Opened:
    """A stage, and what is exchanged when the next one begins.

    Args:
        stage: Where the run seems to go on.
        runtime: This rank.
        shards: Canonical shards of each head in the checkpoint to go on from; 0 for none.
        disks: Of the hosts, if they share none.

    Attributes:
        disks: The same.
        runtime: This rank.
        stage: The present one.
        model: What it trains.
        teacher: If it has one.
        evaluation: Of the held-out sets.
        facts: What its checkpoints note, and a run that goes on from them must have.
    """

    stage: Stage
    model: Model
    teacher: Teacher | None
    evaluation: Evaluation
    facts: dict[str, object]

    def __init__(
        self,
        stage: Stage,
        runtime: Runtime,
        shards: Mapping[str, int],
        disks: LocalDisks | None = None,
    ) -> None:
        self.runtime, self._shards, self.disks = runtime, shards, disks
        self._open(stage)

    def _open(self, stage: Stage) -> None:
        config, dataset = stage.config, stage.data.dataset
        self.stage = stage
        self.evaluation = Evaluation(config, self.runtime)
        self.teacher = open_teacher(config, dataset, self.runtime)
        numbered = numberings(config, dataset)
        self.model = build(config, self.runtime, numbered, kept_shards=self._shards)
        if self.runtime.leads:
            if words := sets_in_words(stage.data):
                print(f"sets: {words}", flush=True)
            _warn(config, self.model)
        self.facts = must_match(config, dataset, self.teacher) | stage.fact

    def _close(self) -> None:
        """Let go of the memory before the next stage takes its own."""
        heads = self.model.heads.items()
        self._shards = {name: head.sharding.canonical_shards for name, head in heads}
        del self.evaluation, self.teacher, self.model
        gc.collect()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(
        self, stages: Sequence[Stage], peers: Peers | None = None
    ) -> tuple[int, dict[str, object]]:
        """Load what the run goes on from or begins with, in the stage that it then is in.

        Collective. Returns the steps taken, and the base of adapters as a fact for checkpoints.

        Args:
            stages: Of the run.
            peers: At a start, copies that may be newer than what is on the disk.

        Raises:
            CheckpointError: If there are checkpoints and none is valid, or it is of another run.
        """
        damaged: dict[Path, str] = {}
        while True:
            found, step, copies = self._newest(peers, damaged)
            if (stage := stage_at(stages, step)) is not self.stage or damaged:
                self._close()
                self._open(stage)
            try:
                base = self._filled(found, step, writer_of(stages, step), copies)
            except DamagedError as error:
                if found is None or found == self.stage.config.run.resume_from:
                    raise DamagedError(self._with_remedy(error, copies)) from error
                damaged[found] = str(error).removeprefix(f"{found}: ")
                if self.runtime.leads:
                    print(f"{found}: not a valid checkpoint: {damaged[found]}", flush=True)
                continue  # the model is half filled: it is made anew
            if self.disks is not None:
                self.disks.forget()
            if peers is not None:
                peers.begin(self.model, step, from_copies=copies is not None)
            return step, base

    def _with_remedy(self, error: DamagedError, copies: Peers | None) -> str:
        """What to do where there is no checkpoint before the damaged one to take."""
        words = str(error).removesuffix(".")
        if copies is None:
            return f"{words}. {checkpoint.NAME_ANOTHER}"
        line = self.stage.config.run.folder / LINE
        return f"{words}. Remove {line} to go on from the newest checkpoint instead of copies."

    def _newest(
        self, peers: Peers | None, damaged: Mapping[Path, str]
    ) -> tuple[Path | None, int, Peers | None]:
        """A checkpoint, looked at as it is read; its step; copies in its place."""
        run, runtime = self.stage.config.run, self.runtime
        if peers is not None and peers.step >= peers.on_disk:
            return None, peers.step, peers
        if self.disks is not None:
            has_copies = peers is not None and peers.found is not None
            found = self.disks.newest(damaged, has_copies=has_copies)
        else:
            folder = run.folder / "checkpoints"
            found = checkpoint.newest(folder, runtime, content=False, damaged=damaged)
        if found is None and run.resume_from is not None:
            found = checkpoint.named(run.resume_from, runtime, content=False)
        step = 0 if found is None else int(read_manifest(found)["step"])
        if peers is not None and peers.step > step:  # also where newer files are damaged
            return None, peers.step, peers
        return found, step, None

    def _filled(
        self, found: Path | None, step: int, writer: Stage, copies: Peers | None
    ) -> dict[str, object]:
        if copies is not None:
            with copies.fetched(self.model) as path:
                return self._go_on(path, step, writer, verified=True)
        if found is None:
            return self._begin()
        of_hosts = self.disks is not None and found != self.stage.config.run.resume_from
        if self.disks is not None and of_hosts:
            self.disks.bring(self.model.heads)
        return self._go_on(found, step, writer, verified=of_hosts)

    def _begin(self) -> dict[str, object]:
        config, dataset = self.stage.config, self.stage.data.dataset
        refuse_two_starts(config)
        base = begin(config, self.runtime, self.model, dataset)
        begin_centers(config, self.runtime, self.model, dataset, self.evaluation)
        return base

    def _go_on(
        self, found: Path, step: int, writer: Stage, *, verified: bool = False
    ) -> dict[str, object]:
        config, model, begins = self.stage.config, self.model, writer is not self.stage
        facts = self.facts
        if begins:
            teacher = open_teacher(writer.config, writer.data.dataset, self.runtime)
            facts = must_match(writer.config, writer.data.dataset, teacher) | writer.fact
        new = {
            name: {key: state.clone() for key, state in model.heads[name].margin_state().items()}
            for name, before in each_head(writer.config).items()
            if before.head.margin.name != each_head(config)[name].head.margin.name
        }
        checkpoint.load(found, model, facts, self.runtime, begins=begins, verified=verified)
        for name, states in new.items():
            for key, state in model.heads[name].margin_state().items():
                state.copy_(states[key])
        if self.runtime.leads:
            print(f"going on from {from_here(found)}", flush=True)
            for sentence in what_changed(found, writer):
                print(f"warning: {sentence}", flush=True)
            if begins:
                print(f"stage {self.stage.name} begins", flush=True)
        return restore_base(found, model.backbone, config, state_at)


def likely_step(config: Config, runtime: Runtime, peers: Peers | None = None) -> int:
    """Return the step that a run will go on from if its newest checkpoint is valid. Collective."""
    if peers is not None and peers.step >= peers.on_disk:
        return peers.step
    *_, path = config.run.resume_from, *steps(config.run.folder / "checkpoints")
    step = 0
    if runtime.leads and path is not None:
        with suppress(CheckpointError):
            step = int(read_manifest(path)["step"])
    return from_leader(step, runtime.ranks)


def begin(config: Config, runtime: Runtime, model: Model, dataset: DataSet) -> dict[str, object]:
    """Fill the model of a new run with what it begins with; return what its adapters need of it.

    Raises:
        ConfigError, ForeignError, CheckpointError: If that is not there or does not fit.
    """
    if config.run.start_from is not None:
        place = warm_start(config.run.start_from, config, model, runtime, dataset)
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
        *_of_heads(config, model),
        *(
            ['backbone.shard = "fsdp2": on one rank there is nothing to divide the backbone among.']
            if config.backbone.shard == "fsdp2" and model.shards is None
            else []
        ),
        *guidance.pair_warnings(pairs, config.data.images_per_identity),
    ):
        print(f"warning: {sentence}", flush=True)


def _of_heads(config: Config, model: Model) -> Iterator[str]:
    for name, one in each_head(config).items():
        head = model.heads[name]
        identities = head.sharding.num_identities
        sampled = max(2, math.ceil(identities * one.head.sample_rate))
        sentences = guidance.warnings(head.margin, sampled, config.backbone.embedding_dim)
        if identities == 1:
            sentences = [
                "all images are of one identity, and a softmax that has no other to tell it from "
                "learns nothing. Is there a folder, or a label, for each?"
            ]
        for sentence in sentences:
            yield f"heads.{name}: {sentence}" if name else sentence
