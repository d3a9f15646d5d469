"""The images of a run: what they are, their order, and this rank's batches of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from partialfc.config import Config, ConfigError
from partialfc.data import found_whole
from partialfc.data.arrays import ArrayData
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import DataSet
from partialfc.data.loaders import loader
from partialfc.data.loaders.array_loader import array_batches
from partialfc.data.loaders.stream import Batch, Batches, Stream
from partialfc.data.order import Order
from partialfc.data.order_of_sets import AnyOrder, OrderOfSets
from partialfc.distributed.agreement import from_leader, words_of_any
from partialfc.errors import DataError, in_words
from partialfc.runtime.process import Runtime, local_rank
from partialfc.training.images import open_images, order_of

_SECONDS_TO_OPEN = 24 * 3600.0
"""In which the first rank of a host reads, once, all shards of a data set."""


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        dataset: All images.
        order: In which they come.
        steps: Steps of the whole run.
    """

    dataset: DataSet
    order: AnyOrder
    steps: int

    @property
    def sets(self) -> dict[str, Order]:
        """The sets of the run by name, and the order of each."""
        orders = self.order.orders if isinstance(self.order, OrderOfSets) else (self.order,)
        parts = self.dataset.parts
        return {part.name: one for part, one in zip(parts, orders, strict=True)}

    @property
    def steps_of_sets(self) -> dict[str, int]:
        """Steps of one pass over each of several sets; empty where there is one."""
        sets = self.sets.items()
        return {name: order.steps_per_epoch for name, order in sets} if len(sets) > 1 else {}


def sets_in_words(data: TrainingData) -> str:
    """Say what a run sees of each of several sets; "" where there is one."""
    if len(data.sets) == 1:
        return ""
    parts = zip(data.dataset.parts, data.sets.values(), strict=True)
    return "; ".join(
        f"{part.name} {order.global_batch} images of a batch of {data.order.global_batch}, "
        f"{len(part.samples):,} in all, {len(part.identities):,} identities of its own, "
        f"{data.steps / order.steps_per_epoch:.1f} epochs"
        for part, order in parts
    )


def open_training_data(
    config: Config, runtime: Runtime, dataset: DataSet | None = None
) -> TrainingData:
    """Open what the settings name. Collective: the ranks agree that it is the same on all.

    Args:
        config: Settings of the run.
        runtime: This rank.
        dataset: The images, if they are open already.

    Raises:
        ConfigError: If an image source or the order cannot be, another rank has other images, or
            the warm-up is no shorter than the run.
    """
    dataset = dataset or _open_by_hosts(config, runtime)
    order = order_of(config, dataset)
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


def _open_by_hosts(config: Config, runtime: Runtime) -> DataSet:
    """One rank of each host opens the images; the others wait, and trust what it found whole."""
    if runtime.ranks.size == 1:
        return open_images(config)
    found, problem = None, None
    with runtime.links(_SECONDS_TO_OPEN) as links:
        if local_rank() == 0:
            try:
                found = open_images(config)
            except Exception as error:  # whatever it is, the others wait
                problem = error
        words = "" if problem is None else in_words(problem)
        if words := links.words_of_any(words):  # before others go on and wait
            raise problem or ConfigError(words)
        whole = links.union(found_whole.own() if found else frozenset(), found_whole.BYTES)
    with found_whole.trusting(whole):
        return found or open_images(config)


def steps_of(config: Config, order: AnyOrder) -> int:
    """Return the steps of a whole run; epochs are those of the first set."""
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
    """Open this rank's batches from number ``step`` of their order on.

    Raises:
        ConfigError: If the loader that the settings name cannot do what they ask for.
        DataError: From the batches, if too many images in a row cannot be used.
    """
    if isinstance(data.dataset, ArrayData):
        return _refused(
            array_batches(
                data.dataset,
                data.order,
                step * config.data.global_batch,
                rank=runtime.ranks.rank,
                world_size=runtime.ranks.size,
                device=runtime.device,
                threads=config.data.threads,
                prefetch=config.data.prefetch,
            )
        )
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


def with_next(batches: Batches, steps: int) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yield every batch and, of the first ``steps``, the identities of the one behind it."""
    batch = next(batches)
    for _ in range(steps):
        ahead = next(batches)
        yield batch, ahead.identities
        batch = ahead
    yield batch, None
    for batch in batches:
        yield batch, None


def _refused(batches: Batches) -> Batches:
    try:
        yield from batches
    except ValueError as error:
        raise DataError(str(error)) from error
