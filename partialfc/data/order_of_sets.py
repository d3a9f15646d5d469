"""The order of a run on several sets: each has its part of every batch, an order and epochs.

Shape suffixes: B = positions asked for, b = those of a rank's batch.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from partialfc.data.order import Arrangement, Order, Samples, own_places
from partialfc.data.parts import parts_of_batch


@dataclass(frozen=True)
class OrderOfSets:
    """The orders of several sets in one, with the methods of :class:`Order`.

    A batch takes from each set what that set's own order has in its batch of the same number: so a
    set sees each of its images once in an epoch of its own, whatever the others do. Samples are
    those of the sets one after the other. :func:`~partialfc.data.parts.parts_of_batch` says which
    places of a batch are of which set.

    Each batch stands for an epoch here: ``epoch`` is its number, by which augmentation is keyed,
    and ``positions`` are its places.

    Attributes:
        orders: Of each set, with a seed of its own; its ``global_batch`` is its part of a batch.
        seed: The run's seed.
        together: Places in a row that are of one set.
        uneven_by: As of :class:`Order`.
    """

    orders: tuple[Order, ...]
    seed: int
    together: int = 1
    uneven_by: int | None = None

    @cached_property
    def images(self) -> tuple[int, ...]:
        """Of a batch, by set."""
        return tuple(order.global_batch for order in self.orders)

    @property
    def global_batch(self) -> int:
        """B, images of one step over all ranks."""
        return sum(self.images)

    @property
    def num_samples(self) -> int:
        """N, images of all sets."""
        return sum(order.num_samples for order in self.orders)

    @property
    def arrangement(self) -> Arrangement | None:
        """Of the first set; the others have one of the same kind."""
        return self.orders[0].arrangement

    @property
    def steps_per_epoch(self) -> int:
        """Of the first set, whose epochs are those of the run."""
        return self.orders[0].steps_per_epoch

    def epoch(self, samples_seen: int) -> int:
        """Return the number of the batch that follows ``samples_seen`` images."""
        if samples_seen < 0:
            raise ValueError(f"samples_seen must be >= 0, got {samples_seen}.")
        return samples_seen // self.global_batch

    def sample_ids(
        self, samples_seen: int, rank: int = 0, world_size: int = 1
    ) -> NDArray[np.int64]:
        """Return the image indices [b] of a rank's next batch, as :meth:`Order.sample_ids`."""
        positions = self.positions(samples_seen, rank, world_size)
        return self.at(self.epoch(samples_seen), positions).sample_id_B

    def positions(self, samples_seen: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Return the places [b] of a rank in the next batch, as :meth:`Order.positions`."""
        own = own_places(self.global_batch, rank, world_size, self.uneven_by)
        return np.arange(own.start, own.stop)

    def following(self, position: int, ahead: int) -> int:
        """Return what :meth:`at` takes for the image so far behind a place in its set's order."""
        return position + ahead * self.global_batch

    def at(self, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at places [B] of a batch, or behind them in the orders of their sets.

        Args:
            epoch: Number of the batch.
            position_B: int64; a place, and B for each image that another is behind it.
        """
        ahead_B, place_B = np.divmod(position_B, self.global_batch)
        part_B = parts_of_batch(self.images, self.together)[place_B]
        sample_B, repeat_B = np.empty_like(place_B), np.empty_like(place_B)
        for number, order in enumerate(self.orders):
            chosen_B = part_B == number
            seen = epoch * order.global_batch
            within = self._place_in_set[place_B[chosen_B]]
            positions = order.positions(seen)[within] + ahead_B[chosen_B]
            found = order.at(order.epoch(seen), positions)
            sample_B[chosen_B] = found.sample_id_B + self._start[number]
            repeat_B[chosen_B] = found.repeat_B
        return Samples(sample_B, repeat_B)

    @cached_property
    def _start(self) -> list[int]:
        """The first sample of each set."""
        return [0, *accumulate(order.num_samples for order in self.orders)]

    @cached_property
    def _place_in_set(self) -> NDArray[np.int64]:
        """Which image of its set's part of a batch is at each place of the batch."""
        part_B = parts_of_batch(self.images, self.together)
        place_B = np.empty_like(part_B)
        for number, count in enumerate(self.images):
            place_B[part_B == number] = np.arange(count)
        return place_B


AnyOrder: TypeAlias = Order | OrderOfSets
"""In which a run sees its images."""
