"""Arrays of one's own to train on: spectrograms, embeddings, whatever a network takes.

A file is an ``.npy`` [N, ...] of fp16, fp32 or uint8, mapped and read by row; its identities lie
in another, see :mod:`partialfc.data.label_file`.

Shape suffixes: N = samples, B = samples asked for.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from partialfc.data.dataset import DataSet
from partialfc.data.label_file import LabelFile
from partialfc.data.npy import mapped_array
from partialfc.data.source import Source

_DTYPES = ("<f2", "<f4", "|u1")
_LOOKED_AT = 1024
"""Samples of a file that its fingerprint has: all of them would take minutes at every start."""


class ArrayFile:
    """The samples of one file.

    Args:
        path: Of the ``.npy``.
        shape: Of a sample.

    Raises:
        ValueError: If it is none, or of another shape or type; the message names it.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path = path
        try:
            self._rows = mapped_array(path)
            if self._rows.shape[1:] != tuple(shape) or self._rows.dtype.str not in _DTYPES:
                raise ValueError(
                    f"holds {self._rows.dtype} {list(self._rows.shape)}, must be fp16, fp32 or "
                    f"uint8 {['samples', *shape]}: data.shape is that of one sample."
                )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the size and of samples spread over the file."""
        digest = hashlib.blake2b(f"{self._rows.shape} {self._rows.dtype}".encode(), digest_size=8)
        chosen = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).astype(np.int64))
        digest.update(self._rows[chosen].tobytes())
        return digest.hexdigest()

    def rows(self, index_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return samples [B, ...] in fp32, as they are stored.

        Raises:
            ValueError: If a number is not finite; the message names file and sample.
        """
        found = self._rows[index_B].astype(np.float32)
        if not np.isfinite(found).all():
            sound_B = np.isfinite(found).reshape(len(found), -1).all(1)
            raise ValueError(
                f"{self.path}: sample {index_B[int(sound_B.argmin())]} has a number that is not "
                "finite."
            )
        return found


class ArrayData(DataSet):
    """The samples 0...N-1 of several files, one after the other.

    Args:
        files: At least one.
        shape: Of a sample.
        labels: Of all of them.
    """

    def __init__(self, files: Sequence[ArrayFile], shape: Sequence[int], labels: LabelFile) -> None:
        # Of a pack, a data set with labels of its own asks for length, name and fingerprint.
        super().__init__(cast(Sequence[Source], files), None, labels)
        self.files, self.shape = tuple(files), tuple(shape)

    def rows(self, sample_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return samples [B, ...] in fp32; raises as :meth:`ArrayFile.rows`."""
        file_B, index_B = self.places(sample_B)
        found: NDArray[Any] = np.empty((len(sample_B), *self.shape), np.float32)
        for number in np.unique(file_B).tolist():
            found[file_B == number] = self.files[number].rows(index_B[file_B == number])
        return found

    @property
    def sample_bytes(self) -> int:
        """Of a sample on the device."""
        return 4 * math.prod(self.shape)


def open_arrays(
    paths: Sequence[Path],
    shape: Sequence[int],
    labels: Path,
    *,
    weights: Path | None = None,
    num_identities: int | None = None,
) -> ArrayData:
    """Open files as one data set.

    Args:
        paths: ``.npy`` files.
        shape: Of a sample.
        labels: Of all samples in turn, with ``weights`` and ``num_identities`` as
            :class:`LabelFile` takes them.
        weights: Of the labels.
        num_identities: Of the labels.

    Raises:
        ValueError: If a file is none or does not fit; the message names it.
        OSError: If it cannot be read.
    """
    files = [ArrayFile(path, shape) for path in paths]
    count = sum(map(len, files))
    own = LabelFile(labels, count, weights=weights, num_identities=num_identities)
    return ArrayData(files, shape, own)
