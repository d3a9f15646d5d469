"""The identity of every image of a pack, read once and kept beside the index of a large one.

Shape suffix: N = images of the pack.
"""

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from partialfc.cores import usable_cores
from partialfc.data.packs.index_cache import KEPT_FROM, keep_column, kept_column
from partialfc.data.packs.pack import Pack
from partialfc.data.packs.recordio import RecordError

BAD = -1
"""The label of an image whose record breaks a rule."""

_CHUNK = 1 << 16
_WARNED_FROM = 1 << 22
_SAMPLED = 1 << 12


def labels(pack: Pack) -> NDArray[np.int32]:
    """Return the identities [N] of all images, ``BAD`` where the record breaks a rule.

    The header of every image is read, by all cores; with a warning where that takes long. Those of
    a pack with ``KEPT_FROM`` images are kept in a file that processes share, 4 bytes for each.
    """
    kept = kept_column(pack.file, "labels", len(pack))
    if kept is not None:
        return kept
    if len(pack) >= _WARNED_FROM:
        warnings.warn(
            f"{pack.path}: the headers of {len(pack):,} images are read, once: about "
            f"{len(pack) * 4096 / 2**30:.0f} GiB.",
            stacklevel=2,
        )
    places, count = pack.index.by_offset(), len(pack.index)
    found = np.empty(len(pack), np.int32)

    def read(start: int) -> None:
        at_N = places(start, min(start + _CHUNK, count))
        image_N = at_N[(at_N >= pack.images.start) & (at_N < pack.images.stop)]
        image_N -= pack.images.start
        found[image_N] = _labels(pack, image_N)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(read, range(0, count, _CHUNK)):
            pass
    if len(pack) >= KEPT_FROM:
        keep_column(pack.file, "labels", found)
    return found


def labels_fingerprint(pack: Pack) -> str:
    """Return 16 hexadecimal digits, a function of the identities of the images of a pack.

    Of all of them where the pack has fewer than ``KEPT_FROM``, which are read in a moment; of a
    larger pack of 4,096, evenly from the first to the last.
    """
    if len(pack) < KEPT_FROM:
        label_N = labels(pack)
    else:
        label_N = _labels(pack, np.linspace(0, len(pack) - 1, _SAMPLED).astype(np.int64))
    return hashlib.blake2b(label_N.astype("<i4").tobytes(), digest_size=8).hexdigest()


def _labels(pack: Pack, image_N: NDArray[np.int64]) -> NDArray[np.int32]:
    try:
        return pack.identities(image_N).astype(np.int32)
    except RecordError:
        return np.array([_label(pack, int(image)) for image in image_N], np.int32)


def _label(pack: Pack, image: int) -> int:
    try:
        return pack.identity(image)
    except RecordError:
        return BAD
