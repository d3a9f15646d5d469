"""The images of a run: what they are, their order, and this rank's batches of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from partialfc.config import Config, ConfigError
from partialfc.data.arrangements import arrangement
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.loaders import loader
from partialfc.data.loaders.stream import Batch, Batches, Stream
from partialfc.data.order import Order
from partialfc.distributed.agreement import from_leader, words_of_any
from partialfc.errors import DataError, in_words
from partialfc.runtime.process import Runtime


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        dataset: All images.
        order: In which they come.
        steps: Steps of the whole run.
    """

    dataset: DataSet
    order: Order
    steps: int


def open_training_data(config: Config, runtime: Runtime) -> TrainingData:
    """Open what the settings name. Collective: the ranks agree that it is the same on all.

    Raises:
        ConfigError: If an image source or the order cannot be, another rank has other images, or
            the warm-up is no shorter than the run.
    """
    try:
        data = config.data
        dataset = open_dataset(data.train, data.skip)
        order = Order(
            len(dataset),
            data.global_batch,
            config.run.seed,
            data.last_batch,
            arrangement(
                dataset,
                images_per_identity=data.images_per_identity,
                block=data.block,
                block_window=data.block_window,
            ),
            uneven_by=config.optimizer.accumulation if data.uneven else None,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.train: {in_words(error)}") from error
    _refuse_other_images(dataset, runtime)
    steps = steps_of(config, order)
    if config.schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps = {config.schedule.warmup_steps}: must be fewer than the "
            f"{steps} steps of the run ({order.steps_per_epoch} steps an epoch)."
        )
    decay, room = getattr(config.schedule, "decay_steps", 0), steps - config.schedule.warmup_steps
    if decay > room:
        raise ConfigError(
            f"schedule.decay_steps = {decay}: must be at most {room}, the {steps} steps of the run "
            f"without its warm-up ({order.steps_per_epoch} steps an epoch)."
        )
    return TrainingData(dataset, order, steps)


def steps_of(config: Config, order: Order) -> int:
    """Return the steps of a whole run."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.epochs is not None
    return max(1, round(config.run.epochs * order.steps_per_epoch))


def _refuse_other_images(dataset: DataSet, runtime: Runtime) -> None:
    """A host with a copy of its own, or a folder that still grows, would train on other labels."""
    ranks, prints = runtime.ranks, (dataset.fingerprint, dataset.labels_fingerprint)
    fingerprint = int(prints[0][:15], 16) ^ int(prints[1][:15], 16)
    own = (
        f"rank {ranks.rank} has {len(dataset):,} of {dataset.num_identities:,} identities, "
        f"fingerprint {prints[0]}, that of the labels {prints[1]}"
    )
    same = fingerprint == from_leader(fingerprint, ranks)
    if other := words_of_any("" if same else own, ranks):
        raise ConfigError(
            f"data.train: not all ranks have the same images: {words_of_any(own, ranks)}; {other}. "
            "Give all hosts the same files, which nobody changes."
        )


def open_batches(config: Config, runtime: Runtime, data: TrainingData, step: int) -> Batches:
    """Open this rank's batches from ``step`` on.

    Raises:
        ConfigError: If the loader that the settings name cannot do what they ask for.
        DataError: From the batches, if too many images in a row cannot be used.
    """
    stream = Stream(
        dataset=data.dataset,
        order=data.order,
        augmentation=augmentation_of(config),
        image_size=config.data.image_size,
        rank=runtime.ranks.rank,
        world_size=runtime.ranks.size,
    )
    try:
        batches = loader.open_batches(
            stream,
            step * config.data.global_batch,
            device=runtime.device,
            loader=config.data.loader,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _refused(batches)


def augmentation_of(config: Config) -> Augmentation:
    """Return the random changes that the settings ask for."""
    data = config.data
    return Augmentation(shift=data.shift, flip=data.flip, **data.augment.model_dump())


def with_next(batches: Batches, *, want_next: bool) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yield every batch and, if wanted, the identities of the one behind it."""
    batch = next(batches)
    while True:
        ahead = next(batches) if want_next else None
        yield batch, None if ahead is None else ahead[1]
        batch = next(batches) if ahead is None else ahead


def _refused(batches: Batches) -> Batches:
    try:
        yield from batches
    except ValueError as error:
        raise DataError(str(error)) from error
