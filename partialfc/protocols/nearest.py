"""The nearest of one set for each of another, exact, with a tile of the matrix in memory.

Shape suffixes: Q = queries, G = gallery, q and g = those of a tile, D = embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ROWS, COLUMNS = 2048, 8192


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The nearest of the gallery to each query.

    Attributes:
        place_Q: int64 row of the gallery.
        cosine_Q: fp64, in [-1, 1].
    """

    place_Q: NDArray[np.int64]
    cosine_Q: NDArray[np.float64]


def nearest(
    unit_QD: NDArray[np.float32],
    unit_GD: NDArray[np.float32],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda queries: None,
) -> Nearest:
    """Return the nearest by cosine, among those that fp32 products cannot tell apart the first.

    Both may be files that are mapped: a tile of each is read at a time.

    Args:
        unit_QD: Rows of unit length.
        unit_GD: The same, at least one.
        device: Where the products are made.
        progress: Called with the number of queries that are done.

    Raises:
        ValueError: If the gallery is empty, or the two are not equally wide.
    """
    if not len(unit_GD) or unit_GD.shape[1] != unit_QD.shape[1]:
        raise ValueError(
            f"gallery must be [at least 1, {unit_QD.shape[1]}] for queries of this width, got "
            f"{list(unit_GD.shape)}."
        )
    place_Q = np.empty(len(unit_QD), np.int64)
    cosine_Q = np.empty(len(unit_QD))
    for start in range(0, len(unit_QD), ROWS):
        rows = slice(start, start + ROWS)
        query_qD = torch.from_numpy(np.array(unit_QD[rows])).to(device)
        best_q = torch.full_like(query_qD[:, 0], -torch.inf)
        best_place_q = torch.zeros_like(best_q, dtype=torch.int64)
        for left in range(0, len(unit_GD), COLUMNS):
            gallery_gD = torch.from_numpy(np.array(unit_GD[left : left + COLUMNS])).to(device)
            cosine_q, column_q = (query_qD @ gallery_gD.T).max(1)
            nearer_q = cosine_q > best_q
            best_q = torch.where(nearer_q, cosine_q, best_q)
            best_place_q = torch.where(nearer_q, column_q + left, best_place_q)
        place_Q[rows] = best_place_q.cpu().numpy()
        found_qD = unit_GD[place_Q[rows]]
        cosine_Q[rows] = np.einsum("qd,qd->q", unit_QD[rows], found_qD, dtype=np.float64)
        progress(len(query_qD))
    return Nearest(place_Q, cosine_Q.clip(-1, 1))
