"""What images that an index numbers have in common, whether in files of their own or in shards.

Shape suffixes: N = images of the source, B = images asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from partialfc.definitions.urls import shown


class Index(Protocol):
    """The images of a source by number, 0...N-1, and their identities."""

    @property
    def identity_N(self) -> NDArray[np.int32]:
        """Of each image, in [0, C)."""

    def __len__(self) -> int: ...

    @property
    def num_identities(self) -> int:
        """C."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of where the images are, not of what they show."""


class IndexedImages(ABC):
    """Images by image index, 0...N-1; a subclass reads them.

    Methods raise IndexError if an index is not in [0, N).

    Args:
        path: As it was opened.
        index: Its images.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self._by_number = path, index

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def declared_identities(self) -> int:
        """Number of identities C; labels are in [0, C)."""
        return self._by_number.num_identities

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of names or places, identities and sizes of images."""
        return self._by_number.fingerprint

    @abstractmethod
    def jpeg_view(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of one image as uint8 [bytes]."""

    def record(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the identity and the bytes of one image."""
        return int(self._by_number.identity_N[self.key(index)]), self.jpeg_view(index)

    def identities(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the identities [B] of images ``indices`` [B]."""
        index_B = np.asarray(indices, np.int64)
        if len(index_B):
            self.key(int(index_B.min())), self.key(int(index_B.max()))
        return self._by_number.identity_N[index_B].astype(np.int64)

    def key(self, index: int) -> int:
        """Return the number of one image, which is its index."""
        if not 0 <= index < len(self):
            raise IndexError(f"{shown(self.path)}: image {index} must be in [0, {len(self)}).")
        return index
