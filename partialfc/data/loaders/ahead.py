"""Batches that threads make before they are asked for."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import torch

from partialfc.data.loaders.stream import Batch, Batches
from partialfc.pinned import to_device


def batches_ahead(
    make: Callable[[int], Batch],
    samples_seen: int,
    global_batch: int,
    *,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Batches:
    """Yield, in order, the batches that follow ``samples_seen`` samples of all ranks.

    No host synchronisation: images go to a GPU from pinned memory.

    Args:
        make: Returns this rank's batch after so many samples, on the host; called from threads.
        samples_seen: By all ranks together.
        global_batch: Samples of a step over all ranks.
        device: Where the batches go.
        threads: That make a batch each; >= 1.
        prefetch: Batches that are kept ready beyond those being made; >= 1.
    """

    def made(start: int) -> Batch:
        batch = make(start)
        if device.type == "cuda":  # here, where no GPU waits for it
            batch = batch._replace(images=batch.images.pin_memory())
        return batch

    starts = count(samples_seen, global_batch)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batch")
    try:
        pending = deque(pool.submit(made, next(starts)) for _ in range(threads + prefetch))
        while True:
            batch = pending.popleft().result()
            pending.append(pool.submit(made, next(starts)))
            yield batch._replace(images=to_device(batch.images, device))
    finally:
        pool.shutdown(cancel_futures=True)
