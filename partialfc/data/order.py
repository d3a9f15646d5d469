"""Which images are in which batch: (samples seen, rank, world size, seed) -> sample ids.

An epoch is an arrangement of the images, by default one keyed permutation, evaluated only where it
is asked for; :mod:`partialfc.data.arrangements` has others. Global batch k of an epoch is positions
[kB, (k+1)B) of it and a rank takes a contiguous slice, so any number of ranks sees the same global
batches and a run resumes from one integer.

Shape suffixes: B = positions asked for, b = those of a rank's batch.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from partialfc.distributed.shares import Shares
from partialfc.keyed import key, permute

LastBatch = Literal["drop", "pad"]


class Samples(NamedTuple):
    """What is at some positions of an epoch.

    Attributes:
        sample_id_B: int64, in [0, N).
        repeat_B: int64, how often the arrangement has put the same image there before in this
            epoch; 0 unless it repeats images. It changes the augmentation, not the image.
    """

    sample_id_B: NDArray[np.int64]
    repeat_B: NDArray[np.int64]


class Arrangement(Protocol):
    """The positions of an epoch, and which image is at each."""

    @property
    def size(self) -> int:
        """Positions of an epoch, >= 1; the same in every epoch."""

    def at(self, seed: int, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions in [0, size) of an epoch: a pure function."""

    def check(self, global_batch: int) -> None:
        """Raise ValueError if a batch of that size cannot be made."""


@dataclass(frozen=True)
class Shuffled:
    """One keyed permutation of all images: each is at one position of an epoch.

    Attributes:
        size: N, images in the data; >= 1.
    """

    size: int

    def at(self, seed: int, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions in [0, N) of an epoch."""
        ids = permute(position_B, self.size, key(seed, "order", epoch))
        return Samples(ids, np.zeros_like(ids))

    def check(self, global_batch: int) -> None:
        """Any batch can be made."""


@dataclass(frozen=True)
class Order:
    """The order in which a run sees the images of its data.

    Every rank has the same number of steps in every epoch. The state of a run is ``samples_seen``,
    the images that all ranks together have seen. When the global batch changes between runs, the
    new one applies to that number as it is: it is rounded down to a whole batch, so that less than
    a batch of images is seen twice; and as an epoch has a whole number of batches, the place where
    it ends moves by less than a batch for every epoch that went before.

    Attributes:
        num_samples: N, images in the data; >= 1.
        global_batch: B, images of one step over all ranks; >= 1.
        seed: The run's seed.
        last_batch: What happens to the last positions of an epoch that fill no batch. ``"drop"``:
            they are not seen, and are other images in every epoch. ``"pad"``: they are seen, and
            their batch is filled with the first images of the same epoch, several times over if
            the epoch is shorter than a batch.
        arrangement: Of the N images in an epoch; a :class:`Shuffled` if it is left out.
        uneven_by: Where B does not divide by the ranks, what their shares are multiples of and
            differ by at most; it divides B. ``None``: such numbers of ranks are refused.

    Raises:
        ValueError: If a value is outside its range, or an epoch would have no batch.
    """

    num_samples: int
    global_batch: int
    seed: int
    last_batch: LastBatch = "drop"
    arrangement: Arrangement | None = None
    uneven_by: int | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(
                f"num_samples must be >= 1, got {self.num_samples}: the data has no images."
            )
        if self.global_batch < 1:
            raise ValueError(f"data.global_batch must be >= 1, got {self.global_batch}.")
        if self.last_batch not in ("drop", "pad"):
            raise ValueError(f'data.last_batch must be "drop" or "pad", got {self.last_batch!r}.')
        self._arranged.check(self.global_batch)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.global_batch must be at most the {self.epoch_size} images of an epoch, "
                f'got {self.global_batch}: with data.last_batch="drop" no batch is ever full. '
                f'Lower it, or set data.last_batch="pad".'
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank; >= 1."""
        fills_up = self.last_batch == "pad" and self.epoch_size % self.global_batch > 0
        return self.epoch_size // self.global_batch + fills_up

    @property
    def epoch_size(self) -> int:
        """Positions of an epoch: N, unless the arrangement has another number."""
        return self._arranged.size

    @property
    def _arranged(self) -> Arrangement:
        return self.arrangement or Shuffled(self.num_samples)

    def epoch(self, samples_seen: int) -> int:
        """Return the epoch, from 0, of the batch that follows ``samples_seen`` images."""
        return self._batch(samples_seen)[0]

    def sample_ids(
        self, samples_seen: int, rank: int = 0, world_size: int = 1
    ) -> NDArray[np.int64]:
        """Return the image indices [b] of a rank's next batch, each in [0, N).

        Arguments and errors as of :meth:`positions`.
        """
        positions = self.positions(samples_seen, rank, world_size)
        return self.at(self.epoch(samples_seen), positions).sample_id_B

    def at(self, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions [B] of an epoch; those past its end start it again."""
        return self._arranged.at(self.seed, epoch, position_B % self.epoch_size)

    def positions(self, samples_seen: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Return the positions [b] of a rank's next batch in its epoch; b = B / world_size.

        Args:
            samples_seen: Images that all ranks together have seen; >= 0.
            rank: In [0, world_size).
            world_size: Ranks that share the global batch; divides B, unless ``uneven_by`` is set.

        Raises:
            ValueError: If an argument is outside its range.
        """
        own = own_places(self.global_batch, rank, world_size, self.uneven_by)
        start = self._batch(samples_seen)[1] * self.global_batch
        return np.arange(start + own.start, start + own.stop)

    def following(self, position: int, ahead: int) -> int:
        """Return the position so far behind another in the same epoch, as :meth:`at` takes it."""
        return position + ahead

    def _batch(self, samples_seen: int) -> tuple[int, int]:
        """Epoch, and batch of that epoch."""
        if samples_seen < 0:
            raise ValueError(f"samples_seen must be >= 0, got {samples_seen}.")
        return divmod(samples_seen // self.global_batch, self.steps_per_epoch)


def own_places(global_batch: int, rank: int, world_size: int, uneven_by: int | None) -> slice:
    """Return where a rank's images are in a global batch.

    Args:
        global_batch: B, images.
        rank: In [0, world_size).
        world_size: Ranks that share the batch; divides B, unless ``uneven_by`` is set.
        uneven_by: As of :class:`Order`.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), the world size, got {rank}.")
    if global_batch % world_size and uneven_by is None:
        lower = global_batch // world_size * world_size
        nearest = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ValueError(
            f"data.global_batch must be a multiple of the {world_size} ranks, got "
            f"{global_batch}: the nearest is {nearest}."
        )
    return Shares.of(global_batch, world_size, uneven_by or 1).rows(rank)
