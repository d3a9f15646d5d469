"""Which images are in which batch: (samples seen, rank, world size, seed) -> sample ids.

An epoch is one keyed permutation of the images, evaluated only where it is asked for. Global batch
k of an epoch is positions [kB, (k+1)B) of it and a rank takes a contiguous slice, so any number of
ranks sees the same global batches and a run resumes from one integer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from partialfc.permutation import key, permute

LastBatch = Literal["drop", "pad"]


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
        last_batch: What happens to the last N % B positions of an epoch. ``"drop"``: they are not
            seen, and are other images in every epoch. ``"pad"``: they are seen, and their batch is
            filled with the first images of the same epoch, several times over if N < B.

    Raises:
        ValueError: If a value is outside its range, or an epoch would have no batch.
    """

    num_samples: int
    global_batch: int
    seed: int
    last_batch: LastBatch = "drop"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(
                f"num_samples must be >= 1, got {self.num_samples}: the data has no images."
            )
        if self.global_batch < 1:
            raise ValueError(f"data.global_batch must be >= 1, got {self.global_batch}.")
        if self.last_batch not in ("drop", "pad"):
            raise ValueError(f'data.last_batch must be "drop" or "pad", got {self.last_batch!r}.')
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.global_batch must be at most the {self.num_samples} images of the data, "
                f'got {self.global_batch}: with data.last_batch="drop" no batch is ever full. '
                f'Lower it, or set data.last_batch="pad".'
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank; >= 1."""
        fills_up = self.last_batch == "pad" and self.num_samples % self.global_batch > 0
        return self.num_samples // self.global_batch + fills_up

    def epoch(self, samples_seen: int) -> int:
        """Return the epoch, from 0, of the batch that follows ``samples_seen`` images."""
        return self._batch(samples_seen)[0]

    def sample_ids(
        self, samples_seen: int, rank: int = 0, world_size: int = 1
    ) -> NDArray[np.int64]:
        """Return the image indices [B / world_size] of a rank's next batch, each in [0, N).

        Args:
            samples_seen: Images that all ranks together have seen; >= 0.
            rank: In [0, world_size).
            world_size: Ranks that share the global batch; must divide B.

        Raises:
            ValueError: If an argument is outside its range.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), the world size, got {rank}.")
        if self.global_batch % world_size:
            lower = self.global_batch // world_size * world_size
            nearest = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
            raise ValueError(
                f"data.global_batch must be a multiple of the {world_size} ranks, got "
                f"{self.global_batch}: the nearest is {nearest}."
            )
        epoch, batch = self._batch(samples_seen)
        per_rank = self.global_batch // world_size
        start = batch * self.global_batch + rank * per_rank
        positions = np.arange(start, start + per_rank) % self.num_samples
        return permute(positions, self.num_samples, key(self.seed, "order", epoch))

    def _batch(self, samples_seen: int) -> tuple[int, int]:
        """Epoch, and batch of that epoch."""
        if samples_seen < 0:
            raise ValueError(f"samples_seen must be >= 0, got {samples_seen}.")
        return divmod(samples_seen // self.global_batch, self.steps_per_epoch)
