"""The nearest clusters of every image, written in pieces: a stopped run goes on behind the last.

Shape suffixes: N = images, K = clusters of an image, n = images of a piece, C = clusters,
D = embedding.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from partialfc.commands._cluster.kmeans import Centers, nearest_to
from partialfc.commands._cluster.rows import PIECE, Rows
from partialfc.writing import opened, read_text, write_json

LABELS, DISTANCES = "labels.npy", "distances.npy"
_DTYPES: dict[str, np.dtype[Any]] = {LABELS: np.dtype("<i8"), DISTANCES: np.dtype("<f4")}


class Journal:
    """How far a folder is, in a file of its own.

    Args:
        path: ``cluster.json`` of the folder.
        made: What it is made of and how.

    Raises:
        ValueError: If the folder was made otherwise, or of something that is not known.
    """

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        self._path, self._made = path, made
        self.images, self.results = 0, None
        folder = path.parent
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(
                    f"{folder} is not empty, and {path.name} is not in it: choose a new folder."
                )
            self._write()
            return
        try:
            found = json.loads(read_text(path))
            before, self.images, self.results = found["made"], found["images"], found["results"]
            other = [
                f"{name} {before.get(name)!r}, not {value!r}"
                for name, value in made.items()
                if before.get(name) != value
            ]
            if type(self.images) is not int or self.images < 0:
                raise ValueError(f"images = {self.images!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: it is damaged: {error}. Choose a new folder.") from None
        if other:
            raise ValueError(
                f"{folder} was made with {'; '.join(other)}. Remove it, or choose a new folder."
            )

    def reached(self, images: int, results: dict[str, Any] | None = None) -> None:
        """Note that so many images are written, and at the end what came out."""
        self.images, self.results = images, results
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"made": self._made, "images": self.images, "results": self.results})


def assign(
    rows: Rows,
    center_CD: Centers,
    top: int,
    folder: Path,
    journal: Journal,
    progress: Callable[[int], object],
) -> None:
    """Write ``labels.npy`` int64 [N, K] and ``distances.npy`` fp32 [N, K], the nearest first.

    A distance is 1 - cosine, in [0, 2]. An image without a row has the labels -1 and the distances
    NaN.

    Args:
        rows: The embeddings.
        center_CD: Unit rows.
        top: K, at most C.
        folder: Where.
        journal: Says how far it is already.
        progress: Called with a number of images that are done.
    """
    search = nearest_to(center_CD, top)
    done = journal.images - journal.images % PIECE
    with (
        _open_at(folder / LABELS, (rows.images, top), done) as labels,
        _open_at(folder / DISTANCES, (rows.images, top), done) as distances,
    ):
        progress(done)
        for start in range(done, rows.images, PIECE):
            stop = min(start + PIECE, rows.images)
            label_nK = np.full((stop - start, top), -1, np.int64)
            distance_nK = np.full((stop - start, top), np.nan, np.float32)
            has_n, places = rows.of_images(start, stop)
            if len(has_n):
                cosine_nK, nearest_nK = search(rows.unit(places.start, places.stop))
                label_nK[has_n] = nearest_nK
                distance_nK[has_n] = np.clip(1 - cosine_nK, 0, 2)
            _append(labels, label_nK)
            _append(distances, distance_nK)
            journal.reached(stop)
            progress(stop - start)


def _open_at(path: Path, shape: tuple[int, int], done: int) -> BinaryIO:
    """Open an .npy behind its first rows; what was written behind them is forgotten."""
    dtype = _DTYPES[path.name]
    file = os.fdopen(opened(path, os.O_RDWR | os.O_CREAT), "r+b")
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    place = file.tell() + done * shape[1] * dtype.itemsize
    if file.seek(0, os.SEEK_END) < place:
        file.close()
        raise ValueError(f"{path}: it is shorter than {path.parent} says. Choose a new folder.")
    file.truncate(place)
    file.seek(place)
    return file


def _append(file: BinaryIO, value: NDArray[Any]) -> None:
    """Write and wait for the disk: the journal says nothing that is not there."""
    file.write(value.data)
    file.flush()
    os.fsync(file.fileno())
