"""The stages of a run, open: what each trains on and where it lies among the steps of the run.

A run without stages is one. Steps, and all that is keyed by them, are counted through the run; the
learning rate and the length of a stage are the stage's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from partialfc.config import Config, ConfigError
from partialfc.config.tree import STAGE, flat
from partialfc.data.dataset import DataSet
from partialfc.model.build import new_backbone
from partialfc.runtime.process import Runtime
from partialfc.training.data import TrainingData, open_training_data
from partialfc.training.schedule import learning_rate, weight_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where a stage lies in the run, in numbers.

    Attributes:
        last: Steps of the run at its end.
        global_batch: Images of a step.
        steps_per_epoch: Steps of one pass over its data.
        number: Of the stage, from 1.
        first: Steps of the run before it.
        epoch: Number of its first epoch; every stage begins a new one.
        passes: Over the data before it.
        images: Seen before it.
        sets: Steps of one pass over each of several sets; empty where there is one.
        set_passes: Over each set before it.
    """

    last: int
    global_batch: int
    steps_per_epoch: int
    number: int = 1
    first: int = 0
    epoch: int = 0
    passes: float = 0.0
    images: int = 0
    sets: Mapping[str, int] = field(default_factory=dict)
    set_passes: Mapping[str, float] = field(default_factory=dict)

    def batch(self, step: int) -> int:
        """Return which batch of the images' order follows ``step`` steps of the run."""
        return self.epoch * self.steps_per_epoch + step - self.first

    def passes_at(self, step: int) -> float:
        """Return the passes over the data after ``step`` steps of the run."""
        return self.passes + (step - self.first) / self.steps_per_epoch

    def passes_of_sets(self, step: int) -> dict[str, float]:
        """Return the passes over each of several sets after ``step`` steps of the run."""
        return {
            name: self.set_passes.get(name, 0.0) + (step - self.first) / own
            for name, own in self.sets.items()
        }

    def images_at(self, step: int) -> int:
        """Return the images seen after ``step`` steps of the run."""
        return self.images + (step - self.first) * self.global_batch

    def then(
        self,
        steps: int,
        global_batch: int,
        steps_per_epoch: int,
        sets: Mapping[str, int] | None = None,
    ) -> "Span":
        """Return the span of a stage of ``steps`` steps behind this one."""
        return Span(
            last=self.last + steps,
            global_batch=global_batch,
            steps_per_epoch=steps_per_epoch,
            number=self.number + 1,
            first=self.last,
            epoch=self.epoch - (self.first - self.last) // self.steps_per_epoch,
            passes=self.passes_at(self.last),
            images=self.images_at(self.last),
            sets=sets or {},
            set_passes={**self.set_passes, **self.passes_of_sets(self.last)},
        )


_BEFORE = Span(last=0, global_batch=1, steps_per_epoch=1, number=0)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: "" in a run without stages.
        config: Its settings, as those of a run of its own.
        data: Its images; ``data.steps`` is its length.
        span: Its place in the run.
    """

    name: str
    config: Config
    data: TrainingData
    span: Span

    @property
    def fact(self) -> dict[str, Any]:
        """What its checkpoints say of it; those of the first say nothing, as without stages."""
        about = {"number": self.span.number, "begins": self.span.first}
        return {STAGE: about} if self.span.number > 1 else {}

    def rate(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` steps of the run."""
        return learning_rate(
            min(step - self.span.first, self.data.steps),
            peak=self.config.optimizer.lr,
            total_steps=self.data.steps,
            **self.config.schedule.model_dump(),
        )

    def teacher_factor(self, step: int) -> float:
        """Return the factor of the teacher's weight in the step that follows ``step`` steps."""
        final = self.config.losses.teacher.final_factor
        return weight_factor(step - self.span.first, self.data.steps, final)


def open_stages(config: Config, runtime: Runtime) -> tuple[Stage, ...]:
    """Open the images of every stage, and look whether one can follow the other. Collective.

    Raises:
        ConfigError: If the images of a stage cannot be used, they have another number of
            identities, or its images are of a size that the backbone has no weights for.
    """
    stages: list[Stage] = []
    names = [one.name for one in config.stages] or [""]
    for name, own in zip(names, config.in_stages(), strict=True):
        try:
            data = open_training_data(own, runtime, _same_images(stages, own))
        except ConfigError as error:
            raise ConfigError(f"stages.{name}: {error}" if name else str(error)) from error
        before = stages[-1].span if stages else _BEFORE
        span = before.then(
            data.steps, own.data.global_batch, data.order.steps_per_epoch, data.steps_of_sets
        )
        stages.append(Stage(name, own, data, span))
    if problems := [problem for pair in pairwise(stages) for problem in _cannot_follow(*pair)]:
        raise ConfigError("\n".join(problems))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that goes on after ``step`` steps; at the end and behind it, the last."""
    return next((one for one in stages if step < one.span.last), stages[-1])


def writer_of(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that wrote the checkpoint of a step: at a boundary the one that ended."""
    return next((one for one in stages if step <= one.span.last), stages[-1])


def table_of(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return name, steps and settings of each stage as JSON values: those that are not in all.

    Empty for a run without stages.
    """
    if not stages[0].name:
        return []
    every = [flat(one.config.model_dump(mode="json")) for one in stages]
    keys = dict.fromkeys(key for values in every for key in values)
    differ = [key for key in keys if any(one.get(key) != every[0].get(key) for one in every)]
    return [
        {
            "name": one.name,
            "first": one.span.first,
            "last": one.span.last,
            "epochs": one.span.passes_at(one.span.last) - one.span.passes,
            "settings": {key: values.get(key) for key in differ if not key.startswith("run.")},
        }
        for one, values in zip(stages, every, strict=True)
    ]


def _same_images(stages: Sequence[Stage], config: Config) -> DataSet | None:
    """What an earlier stage opened, if this one says the same of it: millions of labels, once."""
    wanted = config.data.model_dump(exclude=_NOT_THE_IMAGES)
    same = (s for s in stages if s.config.data.model_dump(exclude=_NOT_THE_IMAGES) == wanted)
    return next((one.data.dataset for one in same), None)


_NOT_THE_IMAGES = {
    "loader",
    "global_batch",
    "uneven",
    "image_size",
    "flip",
    "shift",
    "augment",
    "last_batch",
    "images_per_identity",
    "block",
    "block_window",
    "bad_share",
    "threads",
    "prefetch",
}
"""Of data, what is done with the images."""


def _cannot_follow(before: Stage, stage: Stage) -> Iterator[str]:
    both = [[part.identities for part in one.data.dataset.parts] for one in (before, stage)]
    if both[0] != both[1]:
        counts = [", ".join(f"{len(one):,}" for one in its) for its in both]
        yield (
            f"stages.{stage.name}: its sets of images have {counts[1]} identities, and those of "
            f"{before.name} {counts[0]}: the class centers of one stage are those of the next. "
            "Name the same identities in the same order, with data.skip for images to leave out."
        )
    sizes = [one.config.data.image_size for one in (before, stage)]
    if sizes[0] == sizes[1]:
        return
    had, has = (_shapes(one.config) for one in (before, stage))
    if differ := [name for name in has if has[name] != had.get(name)]:
        yield (
            f"stages.{stage.name}: data.image_size = {sizes[1]}: {stage.config.backbone.name} has "
            f"other weights for images of {sizes[0]} pixels ({differ[0]} is "
            f"{list(had.get(differ[0], ()))} there and {list(has[differ[0]])} here). Keep the "
            "size, or take a network that pools: one of timm with backbone.options.pooled = true."
        )


def _shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        backbone = new_backbone(config)
    return {name: value.shape for name, value in backbone.state_dict().items()}
