"""The stream of batches of one rank: what every loader decodes, and what it does to it.

An image whose record cannot be used is replaced by the one at the next position of the epoch that
can, and takes on the augmentation of the one it replaces. So what a batch is depends on the data
alone: not on ranks, on a resume, or on which batches were decoded before.

Shape suffixes: B = images of one rank's batch, S = side of the final image in pixels.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from partialfc.data.arrangements import Blocks
from partialfc.data.augment import Augmentation, Draw, draw
from partialfc.data.dataset import DataSet
from partialfc.data.images.formats import check_image, plain_image
from partialfc.data.order_of_sets import AnyOrder
from partialfc.data.skip_list import BadRecord
from partialfc.data.source import Source

MOST_IN_A_ROW = 256
"""Positions that are tried for a replacement."""
LOOK_AHEAD = 4
"""Batches that images at a URL are asked for beforehand; a window of blocks, if that is more."""


class Replaced(NamedTuple):
    """A sample that could not be used: its pack, and what is wrong with its record there."""

    sample_id: int
    pack: Source
    bad: BadRecord


class Batch(NamedTuple):
    """A decoded batch: images on the device, all else on the host.

    Attributes:
        images: float32 [B, 3, S, S], RGB, (value - 127.5) / 127.5.
        identities: int64 [B], or [B, K] of several, -1 for none.
        replaced: The samples that others stand for.
        sample_ids: int64 [B] of the data set, of an image that stands for another its own.
        weights: float32, what each of the identities counts for; ``None`` where nobody says so.
    """

    images: Tensor
    identities: Tensor
    replaced: tuple[Replaced, ...]
    sample_ids: NDArray[np.int64]
    weights: Tensor | None = None


Batches: TypeAlias = Generator[Batch, None, None]
"""Batches without end, epoch after epoch. ``close()``, or the end of a ``with
contextlib.closing(batches)``, ends the loader's threads."""


class Encoded(NamedTuple):
    """A batch before it is decoded.

    Attributes:
        sample_id_B: Samples of the data set; of a replaced one that which stands for it.
        jpegs: B images as they are stored, views of a pack's bytes; of one that is not plain, a PNG
            of the upright image [S, S, 3].
        resize_B: Which images are not S x S yet.
        identity_B: int64, in [0, num_identities); or [B, K] of several, -1 for none.
        draw: What happens to each image.
        replaced: The samples that others stand for.
        weight_B: fp32, what each identity counts for; ``None`` where nobody says so.
    """

    sample_id_B: NDArray[np.int64]
    jpegs: list[NDArray[np.uint8]]
    resize_B: NDArray[np.bool_]
    identity_B: NDArray[np.int64]
    draw: Draw
    replaced: tuple[Replaced, ...]
    weight_B: NDArray[np.float32] | None


class _Usable(NamedTuple):
    identity: int
    jpeg: NDArray[np.uint8]
    resize: bool


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One rank's batches, as a pure function of the samples seen.

    Attributes:
        dataset: Where the images are.
        order: Which of them are in which batch; its seed is the augmentation's too.
        augmentation: What happens to them.
        image_size: S; an image of another size is resized, with a filter against aliasing.
        rank: In [0, world_size).
        world_size: Ranks that share the global batch.

    Raises:
        ValueError: If the order cannot be divided among the ranks, or is not of this data set.
    """

    dataset: DataSet
    order: AnyOrder
    augmentation: Augmentation
    image_size: int
    rank: int = 0
    world_size: int = 1
    _undecodable: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order.num_samples != len(self.dataset):
            raise ValueError(
                f"{self.dataset.name}: the order is of {self.order.num_samples} images, must be of "
                f"the {len(self.dataset)} that the data set has."
            )
        self.order.sample_ids(0, self.rank, self.world_size)

    @property
    def batch_per_rank(self) -> int:
        """B, images."""
        return len(self.order.positions(0, self.rank, self.world_size))

    def batch(self, samples_seen: int) -> Encoded:
        """Return the batch that follows ``samples_seen`` images of all ranks.

        An image is usable if its record keeps the rules of the pack, its headers those of
        :func:`~partialfc.data.images.formats.check_image`, and no loader has said that it is not.

        Raises:
            ValueError: If ``MOST_IN_A_ROW`` images are not usable; the message names the last.
        """
        epoch = self.order.epoch(samples_seen)
        positions = self.order.positions(samples_seen, self.rank, self.world_size)
        wanted_B, repeat_B = self.order.at(epoch, positions)
        self._will_need(samples_seen, wanted_B)
        sample_id_B, usable, replaced = wanted_B.copy(), [], []
        for i, found in enumerate(self._look(wanted_B)):
            if isinstance(found, str):
                sample = int(wanted_B[i])
                replaced.append(Replaced(sample, *self.dataset.bad(sample, found)))
                sample_id_B[i], found = self._replacement(epoch, int(positions[i]))
            usable.append(found)
        identity_B = np.array([one.identity for one in usable], np.int64)
        if self.dataset.labelled:
            identity_B = self.dataset.identities(sample_id_B)
        return Encoded(
            sample_id_B=sample_id_B,
            jpegs=[one.jpeg for one in usable],
            resize_B=np.array([one.resize for one in usable]),
            identity_B=identity_B,
            draw=draw(
                self.augmentation,
                self.order.seed,
                epoch,
                wanted_B + len(self.dataset) * repeat_B,
                self.image_size,
            ),
            replaced=tuple(replaced),
            weight_B=self.dataset.weights(sample_id_B),
        )

    def cannot_decode(self, sample_id: int, problem: str) -> None:
        """Replace a sample from now on, in every batch that is asked for, again or anew."""
        self._undecodable[sample_id] = problem

    def _will_need(self, samples_seen: int, wanted_B: NDArray[np.int64]) -> None:
        """Begin to read a batch and, from far away, the one that comes last of those to come."""
        blocks = self.order.arrangement
        stretch, ahead = 1, LOOK_AHEAD
        if isinstance(blocks, Blocks):
            stretch = blocks.block
            ahead = max(ahead, -(-stretch * blocks.window // self.order.global_batch))
        self.dataset.will_need(wanted_B, stretch)
        if self.dataset.is_far:
            seen = samples_seen + ahead * self.order.global_batch
            later_B = self.order.sample_ids(seen, self.rank, self.world_size)
            self.dataset.will_need(later_B, stretch)

    def _look(self, sample_id_B: NDArray[np.int64]) -> list[_Usable | str]:
        """What each sample is, or why it cannot be used."""
        found: list[_Usable | str] = []
        records = self.dataset.records(sample_id_B)
        for sample, record in zip(sample_id_B.tolist(), records, strict=True):
            if isinstance(record, str) or sample in self._undecodable:
                found.append(record if isinstance(record, str) else self._undecodable[sample])
                continue
            identity, jpeg = record
            try:
                frame = check_image(jpeg)
                if not frame.plain:
                    jpeg = plain_image(jpeg, self.image_size)
            except ValueError as error:
                found.append(str(error))
            else:
                is_square = (frame.height, frame.width) == (self.image_size, self.image_size)
                found.append(_Usable(identity, jpeg, frame.plain and not is_square))
        return found

    def _replacement(self, epoch: int, position: int) -> tuple[int, _Usable]:
        """The next usable sample of the epoch: with several sets, of the same set."""
        for ahead in range(1, 1 + MOST_IN_A_ROW):
            following = np.array([self.order.following(position, ahead)])
            sample_id_B = self.order.at(epoch, following).sample_id_B
            (found,) = self._look(sample_id_B)
            if isinstance(found, _Usable):
                return int(sample_id_B[0]), found
            pack, bad = self.dataset.bad(int(sample_id_B[0]), found)
        raise ValueError(
            f"{MOST_IN_A_ROW} images in a row cannot be used, the last of them {pack.path}: {bad}"
        )
