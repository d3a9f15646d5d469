"""Evaluation protocols of face recognition: arrays in, numbers out.

Embeddings come in raw, [N, D] in any float type, and are normalised here in float64.

Shape suffixes: N = embeddings, D = embedding.
"""

import numpy as np

__all__ = ["unit_rows"]


def unit_rows(embeddings_ND: np.ndarray, name: str) -> np.ndarray:
    """Return the rows divided by their L2 norms; float64 [N, D].

    Args:
        embeddings_ND: Any float type.
        name: What the rows are, for errors.

    Raises:
        ValueError: If the array is not [N, D], or a row's norm is zero or not finite.
    """
    rows_ND = np.asarray(embeddings_ND, dtype=np.float64)
    if rows_ND.ndim != 2:
        raise ValueError(f"{name} must be [N, D], got an array of shape {rows_ND.shape}.")
    norm_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    bad = np.flatnonzero(~((norm_N1 > 0) & np.isfinite(norm_N1)))
    if bad.size:
        raise ValueError(
            f"{name}: row {bad[0]} has norm {norm_N1[bad[0], 0]}, which must be finite and above 0 "
            f"({bad.size} such rows); look at the images that the backbone cannot embed."
        )
    return np.asarray(rows_ND / norm_N1)
