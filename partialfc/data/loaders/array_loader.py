"""The stream of batches of arrays: threads that read rows ahead.

Shape suffix: B = samples of one rank's batch.
"""

import torch

from partialfc.data.arrays import ArrayData
from partialfc.data.loaders.ahead import batches_ahead
from partialfc.data.loaders.stream import Batch, Batches
from partialfc.data.order_of_sets import AnyOrder


def array_batches(
    dataset: ArrayData,
    order: AnyOrder,
    samples_seen: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Batches:
    """Return the batches of one rank that follow ``samples_seen`` samples of all ranks.

    Args:
        dataset: What is read.
        order: Which samples are in which batch.
        samples_seen: By all ranks together.
        rank: In [0, world_size).
        world_size: Ranks that share a batch.
        device: Where the batches go.
        threads: Threads that read, a batch each; >= 1.
        prefetch: Batches that are kept ready beyond those being read; >= 1.

    Raises:
        ValueError: If a sample has a number that is not finite; see
            :meth:`~partialfc.data.arrays.ArrayFile.rows`.
    """

    def read(start: int) -> Batch:
        positions = order.positions(start, rank, world_size)
        sample_id_B = order.at(order.epoch(start), positions).sample_id_B
        weight_B = dataset.weights(sample_id_B)
        return Batch(
            torch.from_numpy(dataset.rows(sample_id_B)),
            torch.from_numpy(dataset.identities(sample_id_B)),
            (),
            sample_id_B,
            None if weight_B is None else torch.from_numpy(weight_B),
        )

    return batches_ahead(
        read,
        samples_seen,
        order.global_batch,
        device=device,
        threads=threads,
        prefetch=prefetch,
    )
