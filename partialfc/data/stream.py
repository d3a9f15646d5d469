"""The stream of batches of one rank: what every loader decodes, and what it does to it.

Shape suffixes: B = images of one rank's batch, S = side of the final image in pixels.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from partialfc.data.augment import Augmentation, Draw, draw
from partialfc.data.dataset import DataSet
from partialfc.data.jpeg import check_jpeg
from partialfc.data.order import Order

Batches: TypeAlias = Generator[tuple[Tensor, Tensor], None, None]
"""(images, identities) without end, epoch after epoch, both on the device: images are float32
[B, 3, S, S], RGB, (value - 127.5) / 127.5; identities are int64 [B]. ``close()``, or the end of a
``with contextlib.closing(batches)``, ends the loader's threads."""


class Encoded(NamedTuple):
    """A batch before it is decoded.

    Attributes:
        sample_id_B: Samples of the data set.
        jpegs: B views of the packs' bytes.
        resize_B: Which images are not S x S yet.
        identity_B: int64, in [0, num_identities).
        draw: What happens to each image.
    """

    sample_id_B: NDArray[np.int64]
    jpegs: list[NDArray[np.uint8]]
    resize_B: NDArray[np.bool_]
    identity_B: NDArray[np.int64]
    draw: Draw


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
    order: Order
    augmentation: Augmentation
    image_size: int
    rank: int = 0
    world_size: int = 1

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
        return self.order.global_batch // self.world_size

    def batch(self, samples_seen: int) -> Encoded:
        """Return the batch that follows ``samples_seen`` images of all ranks.

        Raises:
            ValueError: If an image breaks a rule of :func:`~partialfc.data.jpeg.check_jpeg`, or its
                record one of the pack; the message names the pack, the image and its offset.
        """
        epoch = self.order.epoch(samples_seen)
        positions = self.order.positions(samples_seen, self.rank, self.world_size)
        sample_id_B, repeat_B = self.order.at(epoch, positions)
        jpegs = [self.dataset.jpeg_view(i) for i in sample_id_B.tolist()]
        resize_B = np.empty(len(jpegs), bool)
        for i, jpeg in enumerate(jpegs):
            try:
                frame = check_jpeg(jpeg)
            except ValueError as error:
                raise self.error(int(sample_id_B[i]), str(error)) from None
            resize_B[i] = (frame.height, frame.width) != (self.image_size, self.image_size)
        draw_id_B = sample_id_B + len(self.dataset) * repeat_B
        return Encoded(
            sample_id_B=sample_id_B,
            jpegs=jpegs,
            resize_B=resize_B,
            identity_B=self.dataset.identities(sample_id_B),
            draw=draw(self.augmentation, self.order.seed, epoch, draw_id_B),
        )

    def error(self, sample_id: int, problem: str) -> ValueError:
        """Return the error that says ``problem`` of one sample."""
        pack, bad = self.dataset.bad(sample_id, problem)
        return ValueError(f"{pack.path}: {bad}")
