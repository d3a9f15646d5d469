"""Labels of one's own: whom each image shows, in an array beside the packs.

``labels.npy`` is int32 or int64 [N] or [N, K], a row for each image of all packs in their order,
the skipped ones included; -1 is none. ``weights.npy``, float [N, K], says what each counts for.
Both are mapped: they are read once when they are opened, and then by row.

Shape suffixes: N = images, K = identities of an image, B = images asked for.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.data.npy import mapped_array
from partialfc.errors import in_words

NONE = -1
"""In the place of an identity: none."""

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class _Survey:
    """What all rows say together."""

    largest: int
    has_none: bool
    digest: str


class LabelFileError(ValueError):
    """Labels of one's own that cannot be used; the message names the file.

    Attributes:
        key: The setting that is at fault: labels, label_weights or identities.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class LabelFile:
    """The identities of images; memory is that of the pages looked at.

    Args:
        path: ``.npy`` of the labels.
        images: N, that the packs have.
        weights: ``.npy`` of the weights, if they have any.
        num_identities: Left out, it is the largest label + 1.

    Raises:
        LabelFileError: If a file cannot be read or is none, of another type or shape, or a value is
            outside its range.
    """

    def __init__(
        self,
        path: Path,
        images: int,
        *,
        weights: Path | None = None,
        num_identities: int | None = None,
    ) -> None:
        self.path, self.weights_path = path, weights
        self._label_NK, self._weight_NK = _labels(path), None
        if len(self._label_NK) != images:
            raise LabelFileError(
                "labels",
                f"{path}: it has labels of {len(self._label_NK):,} images, and the data has "
                f"{images:,}, the skipped ones included. There must be one row for each.",
            )
        if weights is not None:
            floats = ("<f2", "<f4", "<f8")
            self._weight_NK = _two_dimensional("label_weights", weights, floats, "floating point")
            if self._weight_NK.shape != self._label_NK.shape:
                raise LabelFileError(
                    "label_weights",
                    f"{weights}: it is {list(self._weight_NK.shape)}, must be "
                    f"{list(self._label_NK.shape)} as {path}: a weight for each label.",
                )
        largest = self._survey.largest
        if largest == NONE:
            raise LabelFileError(
                "labels", f"{path}: all its labels are {NONE}: no image has an identity."
            )
        if num_identities is not None and largest >= num_identities:
            raise LabelFileError(
                "identities",
                f"it is {num_identities}, and {path} has the label {largest:,}. Set it to "
                f"{largest + 1} or more, or leave it out.",
            )
        self.num_identities = largest + 1 if num_identities is None else num_identities

    @property
    def most(self) -> int:
        """K."""
        return int(self._label_NK.shape[1])

    @property
    def several(self) -> bool:
        """Whether an image may have several identities, none, or weights."""
        return self.most > 1 or self._survey.has_none or self.weighted

    @property
    def weighted(self) -> bool:
        """Whether there are weights."""
        return self._weight_NK is not None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all labels and weights."""
        return self._survey.digest

    def identities(self, image_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the identities of images: int64 [B, K], or [B] where K is 1.

        They are ``NONE`` where the weight is 0.
        """
        label_BK = self._label_NK[image_B].astype(np.int64)
        if self._weight_NK is not None:
            label_BK[self._weight_NK[image_B].astype(np.float32) == 0] = NONE
        return label_BK[:, 0] if self.most == 1 else label_BK

    def weights(self, image_B: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return the weights of :meth:`identities`, fp32 of their shape; ``None`` without any."""
        if self._weight_NK is None:
            return None
        weight_BK = self._weight_NK[image_B].astype(np.float32)
        return weight_BK[:, 0] if self.most == 1 else weight_BK

    @cached_property
    def _survey(self) -> _Survey:
        """Of one pass over the files."""
        digest = hashlib.blake2b(f"{self.most}".encode(), digest_size=8)
        largest, has_none, has_weight = NONE, False, self._weight_NK is None
        for start, label_NK in _chunks(self._label_NK):
            smallest = int(label_NK.min())
            if smallest < NONE:
                row = start + int((label_NK < NONE).any(1).argmax())
                raise LabelFileError(
                    "labels",
                    f"{self.path}: image {row} has the label {smallest}. Labels are >= 0, and "
                    f"{NONE} is none.",
                )
            has_none |= smallest == NONE
            largest = max(largest, int(label_NK.max()))
            digest.update(label_NK.astype("<i8").tobytes())
        for start, raw_NK in () if self._weight_NK is None else _chunks(self._weight_NK):
            with np.errstate(over="ignore"):  # it is not finite then
                weight_NK = raw_NK.astype("<f4")
            if not (sound_N := (np.isfinite(weight_NK) & (weight_NK >= 0)).all(1)).all():
                raise LabelFileError(
                    "label_weights",
                    f"{self.weights_path}: image {start + int(sound_N.argmin())} has a weight that "
                    "is negative or not finite.",
                )
            has_weight |= bool((weight_NK > 0).any())
            digest.update(weight_NK.tobytes())
        if not has_weight:
            raise LabelFileError(
                "label_weights", f"{self.weights_path}: all its weights are 0: no label counts."
            )
        return _Survey(largest, has_none, digest.hexdigest())


def shape_of(path: Path) -> tuple[int, int]:
    """Return N and K of a file of labels; nothing else of it is read. Raises as
    :class:`LabelFile`."""
    images, most = _labels(path).shape
    return images, most


def _labels(path: Path) -> NDArray[np.integer[Any]]:
    return _two_dimensional("labels", path, ("<i4", "<i8"), "int32 or int64")


def _two_dimensional(key: str, path: Path, dtypes: tuple[str, ...], words: str) -> NDArray[Any]:
    """The array of a file as [N, K]."""
    try:
        array = mapped_array(path)
        if array.ndim not in (1, 2) or array.dtype.str not in dtypes:
            raise ValueError(
                f"holds {array.dtype} {list(array.shape)}, must be {words} [images] or "
                "[images, identities of each]."
            )
    except OSError as error:
        raise LabelFileError(key, in_words(error)) from None
    except ValueError as error:
        raise LabelFileError(key, f"{path}: {error}") from None
    return array.reshape(len(array), -1)


def _chunks(array_NK: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    rows = max(1, _CHUNK_BYTES // (8 * array_NK.shape[1]))
    for start in range(0, len(array_NK), rows):
        yield start, array_NK[start : start + rows]
