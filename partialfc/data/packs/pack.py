"""Packs of face images: one mapped file of JPEG images, each with the identity it shows.

Two layouts are read. An InsightFace pack has a header, the record of key 0 whose flag is not 0 and
which has no image; its labels are N + 1 and N + 1 + C. Images 1...N and one record per identity
without an image have the keys that follow. In a plain pack every record is an image. The header's
numbers are float32 and so inexact above 2^24: the records themselves say where the images end.
Records may lie in the file in any order; their keys count.

Shape suffixes: M = records of the pack, N = its images, B = images asked for, L = labels of one
record, R = runs of images of one identity.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.packs.index import RecordIndex
from partialfc.data.packs.index_cache import open_index
from partialfc.data.packs.recordio import LABEL_LIMIT, Headers, Record, RecordError, RecordFile
from partialfc.data.tars.places import refuse_tars

_CHUNK = 1 << 20
_LOOKED_AT = 16


def open_pack(path: str | Path) -> "Pack":
    """Open ``path``, a ``.rec`` file with its ``.idx`` beside it.

    Raises:
        RecordError: If the index or the layout breaks a rule; images are checked when read.
        ValueError: If it is tar shards, or a URL.
        FileNotFoundError: If there is no such file.
    """
    refuse_tars(Path(path))
    file = RecordFile(Path(path))
    index = open_index(file)
    if index.key_M[0] == 0:
        header = file.read(int(index.offset_M[0]))
        if header.flag > 0 and not len(header.image):
            end = _check_layout(file, header, index)
            identities = _declared_identities(file, header, index, end)
            return Pack(file, index, range(1, end), identities)
    return Pack(file, index, range(len(index)), None)


class Pack:
    """The images of a pack by image index, 0...N-1 in the order of the keys; see :func:`open_pack`.

    It holds 8 bytes per record, 8 more if the keys are not consecutive, and 8 if the records lie in
    another order; those of a large pack are mapped from a file and shared with other processes. A
    copy for another process is opened again by path.

    Every method that takes an image index raises IndexError if it is not in [0, N) and RecordError
    if the record at that image breaks a rule.

    Attributes:
        file: The ``.rec``.
        index: All its records.
        images: Which of them are images.
        declared_identities: C as the pack says, or ``None`` of a plain pack and of one whose
            identity records are no people.
    """

    def __init__(
        self,
        file: RecordFile,
        index: RecordIndex,
        images: range,
        declared_identities: int | None,
    ) -> None:
        self.file, self.index, self.images = file, index, images
        self.declared_identities = declared_identities
        self._offset_N = index.offset_M[images.start : images.stop]

    def __len__(self) -> int:
        return len(self._offset_N)

    def __reduce__(self) -> tuple[Callable[[Path], "Pack"], tuple[Path]]:
        return open_pack, (self.path.absolute(),)

    @property
    def path(self) -> Path:
        """Path of the ``.rec`` file."""
        return self.file.path

    @cached_property
    def num_identities(self) -> int:
        """Number of identities C; labels are in [0, C).

        What the pack declares. Where it declares none, C is its largest label + 1, and the
        first use reads the header of every image.
        """
        if self.declared_identities is not None:
            return self.declared_identities
        chunks = (
            np.arange(start, min(start + _CHUNK, len(self)))
            for start in range(0, len(self), _CHUNK)
        )
        return 1 + max(int(self.identities(chunk).max()) for chunk in chunks)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of the file's size and its index, not of the images."""
        return self.index.fingerprint(self.file.size)

    def jpeg(self, index: int) -> bytes:
        """Return a copy of the JPEG bytes of one image."""
        return self.jpeg_view(index).tobytes()

    def jpeg_view(self, index: int) -> NDArray[np.uint8]:
        """Return the JPEG bytes of one image as uint8 [bytes], without a copy unless it was cut."""
        offset = self.offset(index)
        image = self.file.read(offset).image
        if not len(image):
            raise self.file.error(offset, f"image {index} has 0 bytes, must have some")
        return image

    def identity(self, index: int) -> int:
        """Return the identity of one image, in [0, num_identities)."""
        return self.record(index)[0]

    def record(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the identity and the JPEG bytes of one image, as the methods for either do."""
        offset = self.offset(index)
        _, label_L, image = self.file.read(offset)
        label = float(label_L[0])
        if not (0 <= label < self._label_limit and label.is_integer()):
            raise self._label_error(offset, label)
        if not len(image):
            raise self.file.error(offset, f"image {index} has 0 bytes, must have some")
        return int(label), image

    def identities(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the identities [B] of images ``indices`` [B]."""
        offset_B, headers = self._headers(indices)
        label_B = headers.label_N
        right_B = (label_B >= 0) & (label_B < self._label_limit) & (label_B == np.floor(label_B))
        if not right_B.all():
            wrong = int(np.argmin(right_B))
            raise self._label_error(int(offset_B[wrong]), float(label_B[wrong]))
        return label_B.astype(np.int64)

    def jpeg_bytes(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sizes [B] in bytes of images ``indices`` [B]; 0 for one that is missing."""
        return self._headers(indices)[1].image_bytes_N

    def will_need(self, indices: NDArray[np.int64], stretch: int = 1) -> None:
        """Begin to read images [B], or the whole stretches of neighbours that they are in."""
        first_R = np.unique(indices // stretch) * stretch
        if self.index.sorted_M is None:
            last_R = np.minimum(first_R + stretch, len(self)) - 1
        else:  # neighbours by key are none in the file
            first_R = (first_R[:, None] + np.arange(stretch)).ravel()
            first_R = last_R = first_R[first_R < len(self)]
        stop_R = self.index.stops(self.images.start + last_R, self.file.size)
        self.file.will_need(self._offset_N[first_R], stop_R)

    def offset(self, index: int) -> int:
        """Return where the record of one image begins in the file, in bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: image {index} must be in [0, {len(self)}).")
        return int(self._offset_N[index])

    def key(self, index: int) -> int:
        """Return the key of one image in the ``.idx``."""
        self.offset(index)
        return int(self.index.key_M[self.images[index]])

    def _headers(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Headers]:
        index_B = np.asarray(indices, np.int64)
        wrong = np.flatnonzero((index_B < 0) | (index_B >= len(self)))
        if len(wrong):
            self.offset(int(index_B[wrong[0]]))
        offset_B = self._offset_N[index_B]
        return offset_B, self.file.headers(offset_B)

    def _label_error(self, offset: int, label: float) -> RecordError:
        which = "the pack's identities" if self.declared_identities else "exact in float32"
        return self.file.error(
            offset, f"label {label:.9g} must be a whole number in [0, {self._label_limit}), {which}"
        )

    @property
    def _label_limit(self) -> int:
        return min(self.declared_identities or LABEL_LIMIT, LABEL_LIMIT)


def _check_layout(file: RecordFile, header: Record, index: RecordIndex) -> int:
    """Return where the images of an InsightFace pack end in [M]; the header must agree."""
    key_M, offset_M = index.key_M, index.offset_M
    start = int(offset_M[0])
    # Identity records come last, so the first of them is found in log2(M) steps.
    end = bisect_left(
        range(len(index)), True, lo=1, key=lambda i: not _has_image(file, offset_M[i : i + 1])[0]
    )
    if end == 1:
        raise file.error(start, "a header and no image, must be at least one")
    late = np.flatnonzero(_has_image(file, offset_M[end:]))
    if len(late):
        raise file.error(
            int(offset_M[end + late[0]]),
            f"key {key_M[end + late[0]]} has an image and key {key_M[end]} has none: all keys with "
            f"images must come first",
        )
    # An index may lack its last lines. Both sides are rounded to float32, so any count compares.
    ends = [("images", int(key_M[end - 1]) + 1), ("identities", int(key_M[-1]) + 1)]
    for (name, key), label in zip(ends[: 1 + (end < len(index))], header.label_L, strict=False):
        if np.float32(key) != label:
            raise file.error(
                start, f"the header says that {name} end before key {label:.9g}, the index {key}"
            )
    return end


def _has_image(file: RecordFile, offset_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which records are images; an identity record has labels and nothing else."""
    headers = file.headers(offset_N)
    return np.asarray((headers.flag_N == 0) | (headers.image_bytes_N > 0))


def _declared_identities(
    file: RecordFile, header: Record, index: RecordIndex, end: int
) -> int | None:
    """The number of identity records; without any, the header's, if float32 holds it exactly."""
    num_records = len(index) - end
    if num_records:
        label_B = _last_labels(file, index, end)
        if not len(label_B) or (label_B == num_records - 1).any():
            return num_records
        warnings.warn(
            f"{file.path}: it has {num_records:,} identity records, and the label of the last one "
            f"is {label_B[-1]:.0f}, must be {num_records - 1}: it was made of a list that is not "
            f"sorted by identity or leaves numbers out. The labels of its images count instead, "
            f"and the header of each is read. partialfc convert pack {file.path.name} NEW.rec "
            f"writes it sorted and numbered without gaps.",
            stacklevel=3,
        )
        return None
    if header.flag >= 2:
        first, after = header.label_L[:2].tolist()
        if first < after < LABEL_LIMIT and after == int(after):
            return int(after - first)
    return None


def _last_labels(file: RecordFile, index: RecordIndex, end: int) -> NDArray[np.float32]:
    """Labels [B] of a few images of the last run, none where they cannot be told.

    face2rec2 writes a record for each run of one label. Runs are people where the i-th is of label
    i, and only then is the last one of its number. Some of its images may be damaged.
    """
    with suppress(RecordError):
        run = file.read(int(index.offset_M[-1])).label_L
        if len(run) >= 2 and 0 < run[1] - run[0] < LABEL_LIMIT:
            some = min(int(run[1] - run[0]), end - 1, _LOOKED_AT)
            label_B = file.headers(index.offset_M[end - some : end]).label_N
            right_B = (label_B >= 0) & (label_B < LABEL_LIMIT) & (label_B == np.floor(label_B))
            return np.asarray(label_B[right_B])
    return np.empty(0, np.float32)
