"""All-to-all 1:1 verification, as MFR-ALL: every pair of images of a set, exact, in flat memory.

With 1.6 million images there are 1.28e12 impostor pairs. The threshold at FAR 1e-6 needs the
largest 1.28 million of their scores and no other, so tiles of the matrix are searched with fast,
rough products whose error is bounded, and only pairs that could be among the largest are scored
again in fp64. The result is that of the whole fp64 matrix.

Shape suffixes: N = images, D = embedding, R = rows of a tile, C = its columns, K = pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from partialfc.protocols import unit_rows

ROWS, COLUMNS = 2048, 8192
_CHUNK = 1 << 14
_MOST_ROWS = 256
_ROUGH = torch.bfloat16
_SLACK = 0.0065
"""Most that a bf16 product of two unit vectors is off: 2·2^-9 + 2^-18 of the rounded factors (the
sum of |x·y| is at most 1), 2^-9 of the rounded result, and less than 1e-4 of the fp32 sums."""

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAll:
    """The numbers of one all-to-all verification.

    Attributes:
        tar_at_far: By target FAR, the part of genuine pairs that score above the largest threshold
            set by impostors: as many of these are accepted as the target allows, a tie with the
            next one against; in [0, 1]. NaN where one impostor pair exceeds the target already.
        threshold_at_far: The cosine that must be exceeded; NaN likewise.
        num_genuine: Pairs of one identity.
        num_impostor: Pairs of two.
        num_images: N.
    """

    tar_at_far: Mapping[float, float]
    threshold_at_far: Mapping[float, float]
    num_genuine: int
    num_impostor: int
    num_images: int


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """What one rank found in its share of the tiles.

    Attributes:
        impostor_K: Its largest impostor scores, fp64, as many as could matter.
        genuine_K: All genuine scores of its share, fp64.
    """

    impostor_K: np.ndarray
    genuine_K: np.ndarray


def search(
    embeddings: np.ndarray,
    identities: np.ndarray,
    targets: Sequence[float] = (1e-6,),
    *,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = lambda rows: None,
) -> Tally:
    """Search one rank's share of the pairs. No collective: :func:`combine` takes all parts.

    Memory: embeddings in bf16 and fp64, one tile, and 16 bytes for each of the
    ``max(targets) * N² / 2`` scores that could matter.

    Args:
        embeddings: [N, D] of any float type and norm.
        identities: Integers [N].
        targets: False accept rates, each in (0, 1).
        rank: This one of ``ranks``; every rank calls with the same arrays.
        ranks: How many share the work.
        device: Where the rough products are made.
        progress: Called with the number of rows that are done.

    Raises:
        ValueError: If shapes do not match, a norm is zero or not finite, or a target is out of
            range.
    """
    if not targets or not all(0 < target < 1 for target in targets):
        raise ValueError(f"targets must be in (0, 1), got {tuple(targets)}.")
    unit = torch.from_numpy(unit_rows(embeddings, "embeddings"))
    identity_N = torch.from_numpy(np.unique(np.asarray(identities), return_inverse=True)[1])
    if identity_N.shape != (len(unit),) or len(unit) < 2:
        raise ValueError(
            f"identities must be [N] with N = {len(unit)} embeddings, at least two; "
            f"got {list(identity_N.shape)}."
        )
    # Images of an identity lie together, so that genuine pairs are blocks on the diagonal.
    order = torch.argsort(identity_N, stable=True)
    unit, identity_N = unit[order], identity_N[order].to(device)
    rough_ND = unit.to(device, _ROUGH)
    _, impostors = count_pairs(identity_N.cpu().numpy())
    largest = _Largest(unit, math.floor(max(targets) * impostors + 1e-9) + 1)
    genuine = []
    for number, start in enumerate(range(0, len(unit), ROWS)):
        stop = min(start + ROWS, len(unit))
        if number % ranks == rank:
            genuine.append(_genuine(unit, identity_N.cpu(), start, stop))
            for left in range(start, len(unit), COLUMNS):
                right = min(left + COLUMNS, len(unit))
                rough_RC = rough_ND[start:stop] @ rough_ND[left:right].T
                largest.add(rough_RC, identity_N, start, left)
        progress(stop - start)
    return Tally(largest.scores(), np.concatenate(genuine) if genuine else np.empty(0))


def combine(
    parts: Sequence[Tally], identities: np.ndarray, targets: Sequence[float] = (1e-6,)
) -> AllToAll:
    """Return the numbers from the parts of all ranks, the same for any number of them."""
    genuine, impostors = count_pairs(identities)
    falling_K = np.sort(np.concatenate([part.impostor_K for part in parts]))[::-1]
    genuine_K = np.concatenate([part.genuine_K for part in parts])
    thresholds = {}
    for target in targets:
        allowed = math.floor(target * impostors + 1e-9)
        known = allowed < len(falling_K)
        thresholds[target] = math.nan if not allowed else falling_K[allowed] if known else -math.inf
    return AllToAll(
        tar_at_far={
            target: math.nan
            if math.isnan(threshold) or not genuine
            else float((genuine_K > threshold).mean())
            for target, threshold in thresholds.items()
        },
        threshold_at_far={target: float(value) for target, value in thresholds.items()},
        num_genuine=genuine,
        num_impostor=impostors,
        num_images=len(identities),
    )


def count_pairs(identities: np.ndarray) -> tuple[int, int]:
    """Return how many pairs of images are of one identity, and how many of two."""
    count = np.unique(identities, return_counts=True)[1].astype(object)  # exact at any size
    total = len(identities) * (len(identities) - 1) // 2
    genuine = int((count * (count - 1) // 2).sum())
    return genuine, total - genuine


def _genuine(unit: Tensor, identity_N: Tensor, start: int, stop: int) -> np.ndarray:
    """fp64 scores of every genuine pair whose first image is one of these rows."""
    end = int(torch.searchsorted(identity_N, identity_N[stop - 1], right=True))
    scores = []
    for row in range(start, stop, 64):
        last = min(row + 64, stop)
        until = int(torch.searchsorted(identity_N, identity_N[last - 1], right=True))
        columns = torch.arange(row, min(until, end))
        same_RC = identity_N[row:last, None] == identity_N[columns]
        later_RC = columns > torch.arange(row, last)[:, None]
        pair_K2 = (same_RC & later_RC).nonzero()
        scores.append(_exact(unit, pair_K2[:, 0] + row, pair_K2[:, 1] + row))
    return torch.cat(scores).numpy()


class _Largest:
    """The largest ``count`` exact scores among all pairs that were added."""

    def __init__(self, unit: Tensor, count: int) -> None:
        self._unit, self._count = unit, count
        self._kept = torch.empty(0, dtype=torch.float64)
        self._floor = -math.inf

    def add(self, rough_RC: Tensor, identity_N: Tensor, start: int, left: int) -> None:
        """Add a tile's impostor pairs, those right of the matrix's diagonal."""
        rows_R = torch.arange(len(rough_RC), device=rough_RC.device)
        column_C = torch.arange(left, left + rough_RC.shape[1], device=rough_RC.device)
        step = _MOST_ROWS
        if self._floor > -math.inf:  # one pass over the tile finds the few rows that matter
            rows_R = (rough_RC.amax(1) >= self._floor - _SLACK).nonzero().squeeze(1)
        else:  # every pair is a candidate until the first floor is known
            step = max(1, _CHUNK // rough_RC.shape[1])
        at = 0
        while at < len(rows_R):
            some_R = rows_R[at : at + step]
            at, step = at + step, min(2 * step, _MOST_ROWS)
            row_R1 = (some_R + start).unsqueeze(1)
            wanted_RC = rough_RC[some_R] >= self._floor - _SLACK
            wanted_RC &= (column_C > row_R1) & (identity_N[column_C] != identity_N[row_R1])
            pair_K2 = wanted_RC.nonzero().cpu()
            some_R = some_R.cpu()
            self._keep(_exact(self._unit, some_R[pair_K2[:, 0]] + start, pair_K2[:, 1] + left))

    def scores(self) -> np.ndarray:
        """Return them, and some smaller ones; fewer where there are fewer."""
        return self._kept.numpy()

    def _keep(self, scores_K: Tensor) -> None:
        self._kept = torch.cat([self._kept, scores_K[scores_K >= self._floor]])
        if len(self._kept) > 2 * self._count:
            self._kept = self._kept.topk(self._count, sorted=False).values
            self._floor = float(self._kept.min())


def _exact(unit: Tensor, first_K: Tensor, second_K: Tensor) -> Tensor:
    """fp64 cosines of pairs: a sum for each, which does not depend on how they are grouped."""
    scores = torch.empty(len(first_K), dtype=torch.float64)
    for start in range(0, len(first_K), _CHUNK):
        part = slice(start, start + _CHUNK)
        torch.linalg.vecdot(unit[first_K[part]], unit[second_K[part]], out=scores[part])
    return scores
