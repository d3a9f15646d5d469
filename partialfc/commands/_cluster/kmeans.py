"""Spherical k-means: centers are directions, and the nearest is that of the largest cosine.

faiss searches for the nearest center of each row, exactly; the rest is here, so that the rows stay
in their file and a stopped run goes on from its last iteration with the same bits.

Shape suffixes: C = clusters, D = embedding, n = rows at hand, M = rows looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from partialfc.commands._cluster.rows import PIECE, Rows
from partialfc.keyed import key, permute
from partialfc.writing import atomic_write

LOOKED_AT = 256
"""Rows for each cluster that k-means looks at, as faiss does: more change its centers little."""
_APART = 1 / 1024
"""How far two halves of a cluster that is split are turned from each other, as in faiss."""

Centers = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Where k-means is.

    Attributes:
        center_CD: Unit rows.
        iteration: How many are behind it.
        cosine: Mean of the rows to their nearest center, by the centers before these; NaN at first.
    """

    center_CD: Centers
    iteration: int = 0
    cosine: float = float("nan")


def begin(rows: Rows, clusters: int, seed: int) -> tuple[NDArray[np.int64], Clusters]:
    """Return the places [M] of the rows to look at, ascending, and centers at some of them.

    Args:
        rows: The embeddings.
        clusters: C, at most the number of rows.
        seed: Both are functions of it and of the number of rows.
    """
    looked_at = min(rows.count, LOOKED_AT * clusters)
    place_M = np.arange(looked_at)
    if looked_at < rows.count:
        place_M = np.sort(permute(place_M, rows.count, key(seed, "k-means rows")))
    chosen_C = permute(np.arange(clusters), looked_at, key(seed, "k-means centers"))
    return place_M, Clusters(rows.unit_at(place_M[chosen_C]))


def improve(
    rows: Rows, place_M: NDArray[np.int64], now: Clusters, progress: Callable[[int], object]
) -> Clusters:
    """Return the clusters after one iteration more: each center is the mean of its rows, as a unit.

    A cluster without a row gets half of a large one: the first of them of the largest, and so on.
    Memory: five times the centers in fp32, with those that are there, and one piece of rows.
    """
    sum_CD = np.zeros(now.center_CD.shape)
    count_C = np.zeros(len(sum_CD), np.int64)
    search, cosine = nearest_to(now.center_CD, 1), 0.0
    for start in range(0, len(place_M), PIECE):
        unit_nD = rows.unit_at(place_M[start : start + PIECE])
        cosine_n1, own_n1 = search(unit_nD)
        cosine += float(cosine_n1.sum(dtype=np.float64))
        _add(sum_CD, count_C, unit_nD, own_n1[:, 0])
        progress(len(unit_nD))
    still_C = (count_C > 0) & ~sum_CD.any(1)  # rows that cancel have no mean
    sum_CD[still_C] = now.center_CD[still_C]
    _split(sum_CD, count_C)
    sum_CD /= np.sqrt(np.einsum("cd,cd->c", sum_CD, sum_CD))[:, None]
    return Clusters(sum_CD.astype(np.float32), now.iteration + 1, cosine / len(place_M))


def nearest_to(
    center_CD: Centers, top: int
) -> Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return what finds the nearest centers of unit rows: cosines and numbers, the nearest first.

    Args:
        center_CD: Unit rows.
        top: How many are found, at most C.
    """
    import faiss

    index = faiss.IndexFlatIP(center_CD.shape[1])
    index.add(center_CD)
    return lambda unit_nD: index.search(unit_nD, top)


def write(path: Path, found: Clusters, made: str) -> None:
    """Write where k-means is, whole or not at all; ``made`` says of what.

    Raises:
        ValueError, OSError: If it cannot be written.
    """
    about = {"iteration": str(found.iteration), "cosine": repr(found.cosine), "made": made}
    try:
        with atomic_write(path) as partial:
            save_file({"centers": found.center_CD}, partial, metadata=about)
    except SafetensorError as error:
        raise ValueError(f"{path}: it cannot be written: {error}.") from None


def read(path: Path, shape: tuple[int, int], made: str) -> Clusters | None:
    """Return what :func:`write` wrote; ``None`` where there is nothing.

    Raises:
        ValueError: If it is damaged, or of something else; the message names it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about, center_CD = file.metadata() or {}, file.get_tensor("centers")
        if about["made"] == made and center_CD.shape == shape and center_CD.dtype == np.float32:
            return Clusters(center_CD, int(about["iteration"]), float(about["cosine"]))
        problem = "it is of something else"
    except (SafetensorError, KeyError, ValueError) as error:
        problem = f"it is damaged: {error}"
    raise ValueError(f"{path}: {problem}. Remove its folder, or choose a new one.")


def _add(
    sum_CD: NDArray[np.float64],
    count_C: NDArray[np.int64],
    unit_nD: NDArray[np.float32],
    own_n: NDArray[np.int64],
) -> None:
    """Add rows to the sums of their clusters, in their order."""
    order_n = np.argsort(own_n, kind="stable")
    which, start, count = np.unique(own_n[order_n], return_index=True, return_counts=True)
    sum_CD[which] += np.add.reduceat(unit_nD[order_n], start, axis=0, dtype=np.float64)
    count_C[which] += count


def _split(sum_CD: NDArray[np.float64], count_C: NDArray[np.int64]) -> None:
    """Give each cluster without a row half of a large one."""
    large = np.argsort(-count_C, kind="stable")[: np.count_nonzero(count_C)]
    apart_D = np.where(np.arange(sum_CD.shape[1]) % 2, -_APART, _APART)
    for place, empty in enumerate(np.flatnonzero(count_C == 0).tolist()):
        whole = large[place % len(large)]
        sum_CD[empty] = sum_CD[whole] * (1 + apart_D)
        sum_CD[whole] *= 1 - apart_D
