"""Mean embeddings of identities, streamed: of a data set, or of anything with numbered images.

Shape suffixes: N = images, n = those of a piece, C = identities, M = those with a usable image,
D = embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.data.dataset import DataSet
from partialfc.data.images.formats import decode_image
from partialfc.data.sets.pairs import Image, Pairs
from partialfc.data.tars.store import ShardError
from partialfc.distributed.ranks import sum_over_ranks
from partialfc.runtime.process import Runtime

_PIECE = 4096
"""Images embedded at once; a constant, so that sums are the same on any number of ranks."""
_ROWS = 1 << 14
UNKNOWN = -1
"""In the place of the identity of an image whose record is damaged."""

Embed = Callable[[str, int, Callable[[int], Image]], NDArray[np.float64]]
"""Name, count and images to embeddings [count, D], the same on all ranks; collective."""


@dataclass(frozen=True, slots=True)
class People:
    """Images by number, and whom they show.

    Attributes:
        name: For messages.
        images: N.
        identities: C.
        image: Returns image i; called from several threads.
        identities_of: int64 identities [n] of images [n], ``UNKNOWN`` where a record is damaged.
    """

    name: str
    images: int
    identities: int
    image: Callable[[int], Image]
    identities_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """Mean embeddings of those who have a usable image.

    Attributes:
        identity_M: int64, ascending.
        unit_MD: fp32, of unit length; in a file without a name, which is mapped.
        unusable: Images that could not be read, or have no direction.
    """

    identity_M: NDArray[np.int64]
    unit_MD: NDArray[np.float32]
    unusable: int


def people_of(dataset: DataSet) -> People:
    """Return the samples of a data set, with its identities."""

    def identities_of(sample_n: NDArray[np.int64]) -> NDArray[np.int64]:
        try:
            return dataset.identities(sample_n)
        except ValueError:
            every = [_identity(dataset, sample) for sample in sample_n.tolist()]
            return np.array(every, np.int64)

    return People(
        dataset.name, len(dataset), dataset.num_identities, dataset.jpeg_view, identities_of
    )


def single_images(name: str, pairs: Pairs) -> People:
    """Return the images of a verification set, each as an identity of its own."""
    count = len(pairs.images)
    return People(name, count, count, pairs.images.__getitem__, lambda image_n: image_n)


def mean_embeddings(
    people: People,
    embed: Embed,
    runtime: Runtime,
    *,
    size: int,
    folder: Path,
    progress: Callable[[int], object] = lambda images: None,
) -> Means | None:
    """Return the mean of the unit embeddings of each identity, on the leading rank; else ``None``.

    Collective: two for every 4,096 images. Memory: a piece, and the sums [C, D] in a mapped file.

    Args:
        people: Images and identities.
        embed: Images to embeddings.
        runtime: This rank.
        size: Side of the images that ``embed`` takes, in pixels.
        folder: Where the file of the sums is, without a name.
        progress: Called with the number of images that are done.

    Raises:
        OSError: If the file cannot be written.
    """
    sum_CD: NDArray[np.float32] | None = None
    unusable = 0
    for start in range(0, people.images, _PIECE):
        image_n = np.arange(start, min(start + _PIECE, people.images))
        reading = Reading(people.image, image_n, size)
        row_nD = embed(people.name, len(image_n), reading)
        bad_n = torch.from_numpy(reading.bad_n).to(runtime.device, torch.int32)
        usable_n = sum_over_ranks(bad_n, runtime.ranks).cpu().numpy() == 0
        if runtime.leads:
            if sum_CD is None:
                sum_CD = _mapped(folder, (people.identities, row_nD.shape[1]))
            identity_n, length_n = people.identities_of(image_n), np.linalg.norm(row_nD, axis=1)
            usable_n &= (identity_n != UNKNOWN) & (length_n > 0) & np.isfinite(length_n)
            unit_nD = row_nD[usable_n] / length_n[usable_n, None]
            at_n = torch.from_numpy(identity_n[usable_n])
            torch.from_numpy(sum_CD).index_add_(0, at_n, torch.from_numpy(unit_nD).float())
            unusable += len(image_n) - int(usable_n.sum())
        progress(len(image_n))
    return None if sum_CD is None else _directions(sum_CD, unusable)


def _directions(sum_CD: NDArray[np.float32], unusable: int) -> Means:
    """Divide sums by their lengths in place; without those that have none."""
    has_C = np.zeros(len(sum_CD), np.bool_)
    for start in range(0, len(sum_CD), _ROWS):
        rows = slice(start, start + _ROWS)
        length_n1 = np.linalg.norm(sum_CD[rows], axis=1, keepdims=True)
        has_C[rows] = length_n1[:, 0] > 0
        np.divide(sum_CD[rows], length_n1, out=sum_CD[rows], where=length_n1 > 0)
    identity_M = np.flatnonzero(has_C)
    for start in range(0, len(identity_M), _ROWS):  # to the front: a place is read before written
        some_n = identity_M[start : start + _ROWS]
        sum_CD[start : start + len(some_n)] = sum_CD[some_n]
    return Means(identity_M, sum_CD[: len(identity_M)], unusable)


def _mapped(folder: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    with TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _identity(dataset: DataSet, sample: int) -> int:
    try:
        return int(dataset.identities([sample])[0])
    except ValueError:
        return UNKNOWN


class Reading:
    """Reads some images; one that cannot be used is black, and noted.

    Args:
        image: Returns an image by its number, pixels or a file's bytes.
        image_n: Numbers of the images, which are asked for by their places here.
        size: In pixels.
    """

    def __init__(
        self, image: Callable[[int], Image], image_n: NDArray[np.int64], size: int
    ) -> None:
        self._image, self._image_n, self._size = image, image_n, size
        self.bad_n = np.zeros(len(image_n), np.bool_)

    def __call__(self, place: int) -> NDArray[np.uint8]:
        """Return the image at a place as RGB uint8 [H, W, 3].

        Raises:
            ShardError: If where it lies cannot be reached: that is no fault of the image.
        """
        try:
            image = self._image(int(self._image_n[place]))
            if isinstance(image, np.ndarray) and image.ndim == 3:
                return image
            return decode_image(np.frombuffer(image, np.uint8), self._size)
        except ShardError:
            raise
        except (OSError, ValueError):
            self.bad_n[place] = True
            return np.zeros((self._size, self._size, 3), np.uint8)
