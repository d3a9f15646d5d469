"""The stream of batches without DALI: threads that decode, for macOS, arm64 and any other machine.

Threads, not the processes of torch's DataLoader: the decoders release Python's lock, and threads
share the mapped pack and its index, start at once and copy no batch. Processes were slower on two
cores, and one that is forked beside DALI's threads aborts when it ends.

Shape suffixes: B = images of one rank's batch, n = numbers of one change.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.data.augment import Draw
from partialfc.data.images.formats import decode_plain, resize
from partialfc.data.loaders.ahead import batches_ahead
from partialfc.data.loaders.stream import Batch, Batches, Stream


def torch_batches(
    stream: Stream, samples_seen: int, *, device: torch.device, threads: int, prefetch: int
) -> Batches:
    """Return the batches of ``stream`` that follow ``samples_seen`` images.

    Args:
        stream: What to decode. Of the changes of its augmentation, a crop is made and no other.
        samples_seen: Images that all ranks together have seen.
        device: Where the batches go.
        threads: Threads that decode, a batch each; >= 1.
        prefetch: Batches that are kept ready beyond those being decoded; >= 1.

    Raises:
        ValueError: If a batch cannot be filled; see
        :meth:`~partialfc.data.loaders.stream.Stream.batch`.
    """
    return batches_ahead(
        lambda start: decoded_batch(stream, start),
        samples_seen,
        stream.order.global_batch,
        device=device,
        threads=threads,
        prefetch=prefetch,
    )


def decoded_batch(stream: Stream, samples_seen: int) -> Batch:
    """Return one batch of ``stream``, on the CPU."""
    size = stream.image_size
    images = np.empty((stream.batch_per_rank, 3, size, size), np.float32)
    while True:
        batch, complete = stream.batch(samples_seen), True
        for i, jpeg in enumerate(batch.jpegs):
            try:
                pixels = decode_plain(jpeg)
            except ValueError as error:
                stream.cannot_decode(int(batch.sample_id_B[i]), str(error))
                complete = False
                continue
            crop = batch.draw.changes.get("crop")
            if cropped := crop is not None and crop.chosen_B[i]:
                pixels = _part(pixels, crop.value_Bn[i] / np.float32(size))
            if cropped or batch.resize_B[i]:
                pixels = resize(pixels, size)
            normalise(_moved(pixels, batch.draw, i), images[i])
        if complete:
            weights = None if batch.weight_B is None else torch.from_numpy(batch.weight_B)
            return Batch(
                torch.from_numpy(images),
                torch.from_numpy(batch.identity_B),
                batch.replaced,
                batch.sample_id_B,
                weights,
            )


def normalise(pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Write the values (pixel - 127.5) / 127.5 of an image [S, S, 3] to ``out`` [3, S, S]."""
    np.subtract(pixels.transpose(2, 0, 1), np.float32(127.5), out=out)
    out /= np.float32(127.5)


def _part(pixels: NDArray[np.uint8], box_4: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The pixels from top and left to bottom and right, in shares of the image's sides."""
    sides = np.array([*pixels.shape[:2]] * 2, np.float32)
    top, left, bottom, right = np.rint(box_4 * sides).astype(int).tolist()
    return pixels[top:bottom, left:right]


def _moved(pixels: NDArray[np.uint8], draw: Draw, i: int) -> NDArray[np.uint8]:
    """The i-th image [S, S, 3] of a batch, shifted and flipped as its draw says."""
    shift_x, shift_y = draw.shift_x_B[i], draw.shift_y_B[i]
    if shift_x or shift_y:
        at = np.arange(len(pixels))
        pixels = pixels.take(at - shift_y, 0, mode="clip").take(at - shift_x, 1, mode="clip")
    return pixels[:, ::-1] if draw.flip_B[i] else pixels
