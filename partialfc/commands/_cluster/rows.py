"""The embeddings that are clustered: mapped, and read as unit rows in pieces.

Shape suffixes: N = rows, D = embedding, n = rows at hand, S = images without a row.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.vectors import mapped, origin_path, read_origin, spread_over
from partialfc.errors import in_words

PIECE = 1 << 14
"""Rows at hand at once: a constant, so that who goes on rounds as who was not stopped."""


class Rows:
    """Embeddings that ``partialfc embed`` wrote, and the images that they are of.

    Args:
        path: A .npy; the .origin.json beside it, if there is one, says which images have no row.

    Raises:
        ValueError: If it is none, or damaged; the message names it.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".npy":
            raise ValueError(
                f"{path}: must end in .npy, which is read without loading it. Write one with "
                "partialfc embed MODEL IMAGES --out FILE.npy."
            )
        self.path = path
        try:
            self._row_ND = mapped(path)
            origin = read_origin(path) if origin_path(path).exists() else None
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {in_words(error)}") from None
        left_out = origin.left_out if origin else ()
        self._left_out_S = np.asarray(left_out, np.int64)
        self.count, self.dim = self._row_ND.shape
        self.images = self.count + len(left_out)
        if origin is not None and origin.images != self.images:
            raise ValueError(
                f"{path}: it has {self.count:,} rows, and {origin_path(path).name} beside it says "
                f"{origin.images:,} images, {len(left_out):,} of them without one. Embed again."
            )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the shape, of rows spread over the file, and of the images."""
        digest = hashlib.blake2b(repr(self._row_ND.shape).encode(), digest_size=8)
        digest.update(self._left_out_S.tobytes())
        digest.update(spread_over(self._row_ND))
        return digest.hexdigest()

    def unit(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows [start, stop) divided by their lengths, [n, D]."""
        return self.unit_at(np.arange(start, stop))

    def unit_at(self, place_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows at places, divided by their lengths, [n, D].

        Raises:
            ValueError: If a length is zero or not finite; the message names the row.
        """
        row_nD = self._row_ND[place_n].astype(np.float64)
        length_n1 = np.linalg.norm(row_nD, axis=1, keepdims=True)
        wrong_n = np.flatnonzero(~((length_n1 > 0) & np.isfinite(length_n1)))
        if len(wrong_n):
            at = wrong_n[0]
            raise ValueError(
                f"{self.path}: row {place_n[at]:,} has the length {length_n1[at, 0]}, and so no "
                "direction. Look at the image that the model cannot embed."
            )
        return np.asarray(row_nD / length_n1, np.float32)

    def of_images(self, start: int, stop: int) -> tuple[NDArray[np.int64], range]:
        """Return which of the images [start, stop) have rows, counted from start, and the rows."""
        first, last = np.searchsorted(self._left_out_S, (start, stop)).tolist()
        has_n = np.delete(np.arange(stop - start), self._left_out_S[first:last] - start)
        return has_n, range(start - first, stop - last)
