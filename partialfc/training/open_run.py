"""A run, open for a look: its settings, its pack and the model of its newest checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from partialfc.backbones.lora import merge
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.base import restore_base
from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.trained_backbone import state_at
from partialfc.config import Config, ConfigError, load
from partialfc.config.tree import STAGE
from partialfc.data.dataset import DataSet
from partialfc.evaluation.sets import Evaluation
from partialfc.model.build import Model, assemble, build, new_backbone
from partialfc.model.heads import Heads
from partialfc.runtime.process import running
from partialfc.training.images import numberings, open_images
from partialfc.training.must_match import agreed_shards, must_match


@dataclass(frozen=True, slots=True)
class OpenRun:
    """What a run left, and how its model is measured.

    Attributes:
        config: Its settings; with stages those of the stage that wrote the checkpoint.
        dataset: Its training images.
        place: Of its newest valid checkpoint.
        model: As that has it.
        evaluation: Of its held-out sets.
    """

    config: Config
    dataset: DataSet
    place: Path
    model: Model
    evaluation: Evaluation


@contextmanager
def open_run(folder: Path, *, heads: bool = True) -> Iterator[OpenRun]:
    """Open the run in a folder; nothing in it is changed, so it may still be running. Collective.

    Args:
        folder: Of the run.
        heads: Without them the model has none, and no class center is in memory.

    Raises:
        ConfigError: If the folder holds no run, its pack cannot be opened, or there is no
            checkpoint.
        CheckpointError: If no checkpoint is valid.
    """
    config = load(folder / "config.toml", own=False)
    with running(config) as runtime:
        newest = checkpoint.newest(folder / "checkpoints", runtime, tidy=False)
        noted = {} if newest is None else read_manifest(newest)["facts"]
        config = config.at(noted)
        try:
            dataset = open_images(config)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error
        if newest is None:
            raise ConfigError(f"{folder}: it has no checkpoint.")
        if heads:
            shards = agreed_shards(config, runtime)
            model = build(config, runtime, numberings(config, dataset), kept_shards=shards)
        else:
            model = assemble(config, runtime, new_backbone(config), Heads({}))
        facts = must_match(config, dataset) | {STAGE: noted.get(STAGE)}
        checkpoint.load(newest, model, facts, runtime, verified=True)
        if model.average is not None:
            model.average.install()
        restore_base(newest, model.backbone, config, state_at)
        merge(model.backbone)
        for head in model.heads.values():
            head.optimizer.catch_up(None)  # rows that move unsampled
        yield OpenRun(config, dataset, newest, model, Evaluation(config, runtime))
