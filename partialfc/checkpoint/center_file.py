"""Class centers in a file of one's own: .npy or .safetensors, any precision, read by global row.

Shape suffixes: C = identities, D = embedding, n = rows that are read.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from partialfc.data.vectors import mapped
from partialfc.writing import opened

_NAME = "centers"
"""Of the tensor, in a file that has several."""
_FORMATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
PIECE_BYTES = 64 << 20
"""Of rows in fp64 that are read at once."""


@dataclass(frozen=True, slots=True)
class CenterFile:
    """Rows of a file; none is in memory before it is read.

    Attributes:
        path: Of the file.
        shape: (C, D).
        read: Returns rows [start, stop) as they are stored.
    """

    path: Path
    shape: tuple[int, int]
    read: Callable[[int, int], NDArray[Any]]

    @property
    def piece(self) -> int:
        """Rows to read at once, so that memory is bounded."""
        return max(1, PIECE_BYTES // (8 * self.shape[1]))

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return rows [start, stop) in fp64, [n, D].

        Raises:
            ValueError, OSError: If they cannot be read.
        """
        return self.read(start, stop).astype(np.float64)


def open_centers(path: Path, num_identities: int, dim: int) -> CenterFile:
    """Open a file of directions [C, D]; one of safetensors has one tensor, or one named centers.

    Args:
        path: A .npy of fp16, fp32 or fp64, or a .safetensors of these or bf16.
        num_identities: C that it must have.
        dim: D likewise.

    Raises:
        ValueError: If it is none, damaged or shorter than it says, or of another shape or dtype.
        OSError: If it cannot be read.
    """
    try:
        file = _of_tensors(path) if path.suffix == ".safetensors" else _of_array(path)
    except (EOFError, SafetensorError) as error:
        raise ValueError(f"it is damaged: {error}.") from None
    if file.shape != (num_identities, dim):
        raise ValueError(
            f"it has rows [{file.shape[0]:,}, {file.shape[1]:,}], and must have one of "
            f"backbone.embedding_dim = {dim} for each of the {num_identities:,} identities. A row "
            "of zeros leaves a center random."
        )
    return file


def _of_array(path: Path) -> CenterFile:
    row_CD = mapped(path, ("fp16", "fp32", "fp64"))
    return CenterFile(path, row_CD.shape, lambda start, stop: row_CD[start:stop])


def _of_tensors(path: Path) -> CenterFile:
    os.close(opened(path, os.O_RDONLY))
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        name = names[0] if len(names) == 1 else _NAME
        if name not in names:
            raise ValueError(f"{len(names)} tensors, none of them named {_NAME}.")
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
    if len(shape) != 2 or not all(shape) or dtype not in _FORMATS:
        raise ValueError(
            f"{name} is {dtype} {shape}, must be {', '.join(_FORMATS.values())} [identities, "
            "embedding]."
        )

    def read(start: int, stop: int) -> NDArray[Any]:
        with safe_open(path, framework="pt", device="cpu") as file:
            row_nD: NDArray[Any] = file.get_slice(name)[start:stop].double().numpy()
            return row_nD

    return CenterFile(path, (shape[0], shape[1]), read)
