"""Packs of face images: one mapped file of JPEG images, each with the identity it shows.

Two layouts are read. An InsightFace pack begins with a header, the record of key 0 whose flag is
not 0 and whose labels are N + 1 and N + 1 + C; images 1...N and one record per identity without an
image follow. In a plain pack every record is an image. The header's numbers are float32 and so
inexact above 2^24: the records themselves say where the images end.

Shape suffixes: M = records of the pack, N = its images, B = images asked for.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.record_index import read_index
from partialfc.data.recordio import LABEL_LIMIT, Headers, Record, RecordError, RecordFile

_CHUNK = 1 << 20


def open_pack(path: str | Path) -> "Pack":
    """Open ``path``, a ``.rec`` file with its ``.idx`` beside it.

    Raises:
        RecordError: If the index or the layout breaks a rule; images are checked when read.
        FileNotFoundError: If there is no such file.
    """
    file = RecordFile(Path(path))
    key_M, offset_M = read_index(file)
    if key_M[0] == 0:
        header = file.read(int(offset_M[0]))
        if header.flag > 0:
            end = _check_layout(file, header, key_M, offset_M)
            return Pack(
                file, offset_M, slice(1, end), _declared_identities(header, len(key_M) - end)
            )
    return Pack(file, offset_M, slice(0, len(offset_M)), None)


class Pack:
    """The images of a pack by image index, 0...N-1 in the order of the keys; see :func:`open_pack`.

    It holds 8 bytes per record. A copy for another process is opened again by path.

    Every method that takes an image index raises IndexError if it is not in [0, N) and RecordError
    if the record at that image breaks a rule.
    """

    def __init__(
        self,
        file: RecordFile,
        offset_M: NDArray[np.int64],
        images: slice,
        declared_identities: int | None,
    ) -> None:
        self._file = file
        self._offset_M = offset_M
        self._offset_N = offset_M[images]
        self._declared_identities = declared_identities

    def __len__(self) -> int:
        return len(self._offset_N)

    def __reduce__(self) -> tuple[Callable[[Path], "Pack"], tuple[Path]]:
        return open_pack, (self.path.absolute(),)

    @property
    def path(self) -> Path:
        """Path of the ``.rec`` file."""
        return self._file.path

    @cached_property
    def num_identities(self) -> int:
        """Number of identities C; labels are in [0, C).

        What the pack declares. A plain pack declares none: C is then its largest label + 1, and the
        first use reads the header of every image.
        """
        if self._declared_identities is not None:
            return self._declared_identities
        chunks = (
            np.arange(start, min(start + _CHUNK, len(self)))
            for start in range(0, len(self), _CHUNK)
        )
        return 1 + max(int(self.identities(chunk).max()) for chunk in chunks)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of the file's size and its index, not of the images."""
        digest = hashlib.blake2b(str(self._file.size).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self._offset_M, "<i8").data)
        return digest.hexdigest()

    def jpeg(self, index: int) -> bytes:
        """Return a copy of the JPEG bytes of one image."""
        return self.jpeg_view(index).tobytes()

    def jpeg_view(self, index: int) -> NDArray[np.uint8]:
        """Return the JPEG bytes of one image as uint8 [bytes], without a copy unless it was cut."""
        offset = self.offset(index)
        image = self._file.read(offset).image
        if not len(image):
            raise self._file.error(offset, f"image {index} has 0 bytes, must have some")
        return image

    def identity(self, index: int) -> int:
        """Return the identity of one image, in [0, num_identities)."""
        offset = self.offset(index)
        label = float(self._file.read(offset).label_L[0])
        if not (0 <= label < self._label_limit and label.is_integer()):
            raise self._label_error(offset, label)
        return int(label)

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

    def offset(self, index: int) -> int:
        """Return where the record of one image begins in the file, in bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: image {index} must be in [0, {len(self)}).")
        return int(self._offset_N[index])

    def _headers(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Headers]:
        index_B = np.asarray(indices, np.int64)
        wrong = np.flatnonzero((index_B < 0) | (index_B >= len(self)))
        if len(wrong):
            self.offset(int(index_B[wrong[0]]))
        offset_B = self._offset_N[index_B]
        return offset_B, self._file.headers(offset_B)

    def _label_error(self, offset: int, label: float) -> RecordError:
        which = "the pack's identities" if self._declared_identities else "exact in float32"
        return self._file.error(
            offset, f"label {label:.9g} must be a whole number in [0, {self._label_limit}), {which}"
        )

    @property
    def _label_limit(self) -> int:
        return min(self._declared_identities or LABEL_LIMIT, LABEL_LIMIT)


def _check_layout(
    file: RecordFile, header: Record, key_M: NDArray[np.int64], offset_M: NDArray[np.int64]
) -> int:
    """Return where the images of an InsightFace pack end in [M]; the header must agree."""
    start = int(offset_M[0])
    if len(header.image):
        raise file.error(
            start, f"key 0 has flag {header.flag}, so it is a header: no image allowed"
        )
    # Identity records come last, so the first of them is found in log2(M) steps.
    end = bisect_left(
        range(len(key_M)), True, lo=1, key=lambda i: not _has_image(file, offset_M[i : i + 1])[0]
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
    for (name, key), label in zip(ends[: 1 + (end < len(key_M))], header.label_L, strict=False):
        if np.float32(key) != label:
            raise file.error(
                start, f"the header says that {name} end before key {label:.9g}, the index {key}"
            )
    return end


def _has_image(file: RecordFile, offset_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which records are images; an identity record has labels and nothing else."""
    headers = file.headers(offset_N)
    return np.asarray((headers.flag_N == 0) | (headers.image_bytes_N > 0))


def _declared_identities(header: Record, num_identity_records: int) -> int | None:
    """The number of identity records; without any, the header's, if float32 holds it exactly."""
    if num_identity_records:
        return num_identity_records
    if header.flag >= 2:
        first, end = header.label_L[:2].tolist()
        if first < end < LABEL_LIMIT and end == int(end):
            return int(end - first)
    return None
