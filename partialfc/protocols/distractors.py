"""MegaFace's identification: a probe, one image of the same person, and a million of others.

Every ordered pair of probe-set images of one person is a search of its own: the first is the probe,
the second the only mate, and it competes with the distractors, not with other persons of the probe
set.

Shape suffixes: P = images of the probe set, M = distractors, D = embedding, K = largest scores that
are kept, S = searches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partialfc.protocols import unit_rows
from partialfc.protocols.identification import TIE

_TILE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Distracted:
    """The numbers of one MegaFace-style identification.

    Attributes:
        rate: By k, the part of searches whose mate has rank at most k among the distractors; a tie
            counts against it.
        tar_at_far: By target FAR, the part of genuine pairs above the threshold that so many
            pairs of a probe with a distractor exceed; NaN where these are too few to tell.
        num_searches: Ordered pairs of images of one person.
        num_probes: Images of the probe set.
        num_distractors: M.
    """

    rate: Mapping[int, float]
    tar_at_far: Mapping[float, float]
    num_searches: int
    num_probes: int
    num_distractors: int


def with_distractors(
    probe_embeddings: np.ndarray,
    probe_identities: np.ndarray,
    distractor_embeddings: np.ndarray,
    ks: Sequence[int] = (1, 10),
    targets: Sequence[float] = (1e-4, 1e-5, 1e-6),
) -> Distracted:
    """Return rank-k rates and TAR at FAR, with exact thresholds.

    Args:
        probe_embeddings: [P, D] of any float type and norm.
        probe_identities: Integers [P]; persons with one image make no search.
        distractor_embeddings: [M, D] of other persons.
        ks: Each in [1, M].
        targets: Each in (0, 1).

    Raises:
        ValueError: If shapes do not match, a norm is zero or not finite, no person has two images,
            or a k is out of range.
    """
    unit_PD = unit_rows(probe_embeddings, "probe_embeddings")
    unit_MD = unit_rows(distractor_embeddings, "distractor_embeddings")
    identity_P = np.asarray(probe_identities)
    if identity_P.shape != (len(unit_PD),) or not len(unit_MD):
        raise ValueError(
            f"probe_identities must be [{len(unit_PD)}] and distractors at least one; got "
            f"{list(identity_P.shape)} and {len(unit_MD)}."
        )
    if not all(1 <= k <= len(unit_MD) for k in ks):
        raise ValueError(f"ks must be in [1, {len(unit_MD)}], the distractors; got {tuple(ks)}.")
    pairs = len(unit_PD) * len(unit_MD)
    allowed = {target: math.floor(target * pairs + 1e-9) for target in targets}
    top_PK, largest = _largest(unit_PD, unit_MD, max(ks), max(allowed.values(), default=0) + 1)
    scores, worse = [], []
    for identity in np.unique(identity_P):
        rows = np.flatnonzero(identity_P == identity)
        cosine = unit_PD[rows] @ unit_PD[rows].T
        for place, row in enumerate(rows):
            mates = np.delete(cosine[place], place)
            scores.append(mates)
            worse.append((top_PK[row] >= mates[:, None] - TIE).sum(axis=1))
    score_S, worse_S = np.concatenate(scores), np.concatenate(worse)
    if not len(score_S):
        raise ValueError("no person of the probe set has two images, so nothing can be searched.")
    falling = np.sort(largest)[::-1]
    return Distracted(
        rate={k: float((worse_S < k).mean()) for k in ks},
        tar_at_far={
            target: math.nan
            if not count
            else float((score_S > (falling[count] if count < len(falling) else -2) + TIE).mean())
            for target, count in allowed.items()
        },
        num_searches=len(score_S),
        num_probes=len(unit_PD),
        num_distractors=len(unit_MD),
    )


def _largest(
    unit_PD: np.ndarray, unit_MD: np.ndarray, k: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest cosines of each probe to distractors, and the ``count`` largest of all."""
    top_PK, largest = np.full((len(unit_PD), k), -2.0), np.empty(0)
    floor = -math.inf
    for first in range(0, len(unit_PD), _TILE // 4):
        rows = slice(first, first + _TILE // 4)
        for start in range(0, len(unit_MD), _TILE):
            cosine_PM = unit_PD[rows] @ unit_MD[start : start + _TILE].T
            best = np.concatenate([top_PK[rows], cosine_PM], axis=1)
            top_PK[rows] = np.partition(best, best.shape[1] - k, axis=1)[:, best.shape[1] - k :]
            largest = np.concatenate([largest, cosine_PM[cosine_PM >= floor]])
            if len(largest) > count:
                largest = np.partition(largest, len(largest) - count)[len(largest) - count :]
                floor = float(largest.min())
    return top_PK, largest
