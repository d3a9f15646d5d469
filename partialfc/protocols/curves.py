"""Curves and histograms of scores, short enough for a page or a JSON file.

Shape suffixes: N = pairs, V = vertices of the ROC.
"""

from dataclasses import dataclass

import numpy as np

from partialfc.protocols.verification import roc

_POINTS = 200
_BINS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What a picture of one set of pairs needs.

    Attributes:
        far, tar: Vertices of the ROC, from FAR of the first impostor on, at most some 400.
        edges: Of the histogram's bins; one more than counts.
        same, different: Share of the genuine and of the impostor pairs in each bin.
    """

    far: list[float]
    tar: list[float]
    edges: list[float]
    same: list[float]
    different: list[float]


def curves(scores: np.ndarray, same: np.ndarray) -> Curves:
    """Return the curves of cosines of pairs.

    Args:
        scores: Finite, [N].
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds.

    Raises:
        ValueError: As :func:`partialfc.protocols.verification.roc`.
    """
    far_V, tar_V, _ = roc(scores, same)
    wanted = np.geomspace(far_V[far_V > 0][0], 1, _POINTS)
    by_far = np.searchsorted(far_V, wanted, side="right") - 1
    by_tar = np.searchsorted(tar_V, np.linspace(0, 1, _POINTS))
    chosen = np.unique(np.r_[0, by_far, by_tar, len(far_V) - 1])
    edges = np.linspace(min(-0.2, scores.min()), max(0.8, scores.max()), _BINS + 1)
    counts = [np.histogram(scores[kind], edges)[0] / kind.sum() for kind in (same, ~same)]
    return Curves(
        far=_short(far_V[chosen]),
        tar=_short(tar_V[chosen]),
        edges=_short(edges),
        same=_short(counts[0]),
        different=_short(counts[1]),
    )


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
