"""Verification: do two images show the same identity?

LFW's protocol (Huang et al., "Labeled Faces in the Wild", 2007) in the form the field reports it:
the accuracy of a threshold chosen on nine folds and tested on the tenth; and the ROC.

Shape suffixes: N = pairs, D = embedding, F = folds, T = thresholds, V = vertices of the ROC.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from partialfc.protocols import unit_rows

_THRESHOLD_T = np.arange(0, 4, 0.01)
"""Squared L2 distances of unit embeddings, as in arcface_torch; a pair is "same" below."""

_FINE_T = np.arange(0, 4, 0.001)
"""Those of its VAL, which are finer."""

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The numbers of one verification set.

    Attributes:
        accuracy: Mean accuracy over the folds, in [0, 1].
        accuracy_std: Its population standard deviation over the folds, which the field reports.
        accuracy_stderr: Standard error of the mean, as LFW asks for: the sample standard deviation
            over the root of the folds.
        threshold: Cosine that a pair of one identity exceeds, in (-1, 1]: of the protocol's, the
            highest that is best over all pairs. The folds choose their own. The squared L2 distance
            there is ``2 - 2 * threshold``.
        tar_at_far: TAR by target FAR, 1e-1 to 1e-6: the largest TAR of any threshold whose FAR is
            at most the target; NaN where one false accept among the impostor pairs already exceeds
            it.
        threshold_at_far: The cosine that must be exceeded for that TAR; NaN likewise.
        eer: Equal error rate, in [0, 1]: where FAR = 1 - TAR on the ROC, linear between vertices.
        auc: Area under the ROC: the chance that a genuine pair scores above an impostor pair, a
            tie counting one half.
        num_pairs: N.
    """

    accuracy: float
    accuracy_std: float
    accuracy_stderr: float
    threshold: float
    tar_at_far: Mapping[float, float]
    threshold_at_far: Mapping[float, float]
    eer: float
    auc: float
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """VAL at a FAR as arcface_torch has it; NaN where a fold has no pair of a kind.

    Attributes:
        val: Mean over the folds of the part of their genuine pairs that is accepted.
        val_std: Its population standard deviation over the folds.
        far: Mean over the folds of the part of their impostor pairs that is accepted, which may
            exceed the target: the threshold comes from the other folds.
    """

    val: float
    val_std: float
    far: float


def verify(embeddings: np.ndarray, same: np.ndarray, folds: int = 10) -> Verification:
    """Return the numbers of one verification set.

    Args:
        embeddings: [2N, D] of any float type and norm, pair i in rows 2i and 2i + 1; usually the
            sum of the embeddings of an image and of its mirror image.
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds.
        folds: Contiguous, not shuffled, the first N % folds one pair larger; in [2, N].

    Raises:
        ValueError: If a shape or ``folds`` is wrong, a kind of pairs is missing, or an
            embedding's norm is zero or not finite.
    """
    distance_N, same_N = _distances(embeddings, same, folds)
    correct_FT, size_F = _correct_by_fold(distance_N, same_N, folds)
    correct_T = correct_FT.sum(axis=0)
    best_F = (correct_T - correct_FT).argmax(axis=1)  # over the other folds, the first best
    accuracy_F = correct_FT[np.arange(folds), best_F] / size_F

    far_V, tar_V, falling_V = roc(-distance_N, same_N)
    return Verification(
        accuracy=float(accuracy_F.mean()),
        accuracy_std=float(accuracy_F.std()),
        accuracy_stderr=float(accuracy_F.std(ddof=1) / math.sqrt(folds)),
        threshold=float(1 - _THRESHOLD_T[correct_T.argmax()] / 2),
        tar_at_far=_exact(far_V, tar_V, int((~same_N).sum()), FAR_TARGETS),
        threshold_at_far=_exceeded(far_V, 1 + falling_V / 2, int((~same_N).sum()), FAR_TARGETS),
        eer=_equal_error_rate(far_V, tar_V),
        auc=float((np.diff(far_V) * (tar_V[1:] + tar_V[:-1]) / 2).sum()),
        num_pairs=len(same_N),
    )


def best_threshold(cosine: np.ndarray, same: np.ndarray) -> float:
    """Return the ``threshold`` of :func:`verify` from the cosines of pairs.

    Args:
        cosine: In [-1, 1], [N].
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds.
    """
    correct_FT, _ = _correct_by_fold(2 - 2 * np.asarray(cosine), _both_kinds(same), folds=1)
    return float(1 - _THRESHOLD_T[correct_FT[0].argmax()] / 2)


def validate(
    embeddings: np.ndarray, same: np.ndarray, target: float = 1e-3, folds: int = 10
) -> Validation:
    """Return VAL at a FAR, the number beside the accuracy in arcface_torch's verification.

    The threshold of a fold is where the FAR of the other folds, linear between thresholds 0.001
    apart, reaches the target: on a level of that height its last threshold, 0 where the FAR stays
    below the target. (There it is scipy's ``slinear``, which since 1.9 refuses levels.)

    Args:
        embeddings: As of :func:`verify`.
        same: Likewise.
        target: In (0, 1].
        folds: Likewise.

    Raises:
        ValueError: As :func:`verify`, or if the target is out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be in (0, 1], got {target}.")
    distance_N, same_N = _distances(embeddings, same, folds)
    fold_N = np.repeat(np.arange(folds), _sizes(len(same_N), folds))
    val_F, far_F = np.empty(folds), np.empty(folds)
    for fold in range(folds):
        test_N = fold_N == fold
        others = np.sort(distance_N[~test_N & ~same_N])
        far_T = np.searchsorted(others, _FINE_T) / (len(others) or math.nan)
        threshold = np.interp(target, far_T, _FINE_T) if far_T[-1] >= target else 0.0
        for part_F, kind_N in ((val_F, same_N), (far_F, ~same_N)):
            tested = distance_N[test_N & kind_N]
            part_F[fold] = (tested < threshold).sum() / (len(tested) or math.nan)
        if not len(others):
            val_F[fold] = far_F[fold] = math.nan
    return Validation(val=float(val_F.mean()), val_std=float(val_F.std()), far=float(far_F.mean()))


def tar_at_far(
    scores: np.ndarray,
    same: np.ndarray,
    targets: Sequence[float] = FAR_TARGETS,
    *,
    compat: Literal["insightface"] | None = None,
) -> dict[float, float]:
    """Return TAR by target FAR.

    Args:
        scores: Higher means more alike; finite, [N].
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds.
        targets: Each in (0, 1].
        compat: ``None``: the largest TAR of any threshold whose FAR is at most the target, NaN
            where the impostor pairs are too few. ``"insightface"``: the TAR at the vertex of
            scikit-learn's ROC whose FAR is nearest to the target, and so may exceed it.

    Raises:
        ValueError: As :func:`roc`.
    """
    far_V, tar_V, _ = roc(scores, same)
    if compat is None:
        return _exact(far_V, tar_V, int((~np.asarray(same)).sum()), targets)
    # scikit-learn leaves out vertices on a straight line; the first of two equally near counts,
    # from the end.
    bent_V = np.abs(np.diff(far_V, 2)) + np.abs(np.diff(tar_V, 2)) > 1e-15
    kept_V = np.r_[True, bent_V, True]
    far_V, tar_V = far_V[kept_V][::-1], tar_V[kept_V][::-1]
    return {target: float(tar_V[np.abs(far_V - target).argmin()]) for target in targets}


def roc(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (FAR [V], TAR [V], threshold [V]): one vertex per distinct score, and (0, 0) first.

    A pair is accepted when its score is at least the threshold, so pairs of equal score are
    accepted together. FAR and TAR rise from 0 to 1, the threshold falls from infinity.

    Args:
        scores: Higher means more alike; finite, [N].
        same: Whether pair i shows one identity; bool [N], with pairs of both kinds.

    Raises:
        ValueError: If the shapes differ, a kind of pairs is missing, or a score is not finite.
    """
    same_N = _both_kinds(same)
    score_N = np.asarray(scores, dtype=np.float64)
    if score_N.shape != same_N.shape:
        raise ValueError(
            f"scores must be {list(same_N.shape)} like same, got {list(score_N.shape)}."
        )
    if not np.isfinite(score_N).all():
        raise ValueError(f"scores[{np.flatnonzero(~np.isfinite(score_N))[0]}] is not finite.")
    order_N = np.argsort(-score_N, kind="stable")
    score_N, same_N = score_N[order_N], same_N[order_N]
    last_of_tie_V = np.flatnonzero(np.append(np.diff(score_N) != 0, True))
    accepted_V = np.cumsum(same_N)[last_of_tie_V]
    false_accepted_V = last_of_tie_V + 1 - accepted_V
    return (
        np.append(0.0, false_accepted_V / false_accepted_V[-1]),
        np.append(0.0, accepted_V / accepted_V[-1]),
        np.append(np.inf, score_N[last_of_tie_V]),
    )


def _both_kinds(same: np.ndarray) -> np.ndarray:
    same_N = np.asarray(same)
    if same_N.dtype != np.bool_ or same_N.ndim != 1:
        raise ValueError(f"same must be bool [N], got {same_N.dtype} {same_N.shape}.")
    if same_N.all() or not same_N.any():
        raise ValueError(
            f"same must have pairs of both kinds, got {same_N.sum()} of {len(same_N)}."
        )
    return same_N


def _distances(
    embeddings: np.ndarray, same: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared L2 distance of each pair and whether it is genuine; [N] both."""
    same_N = _both_kinds(same)
    unit = unit_rows(embeddings, "embeddings")
    if len(unit) != 2 * len(same_N):
        raise ValueError(
            f"embeddings must have two rows per pair, got {len(unit)} for {len(same_N)}."
        )
    if not 2 <= folds <= len(same_N):
        raise ValueError(f"folds must be in [2, {len(same_N)}], the number of pairs; got {folds}.")
    return ((unit[0::2] - unit[1::2]) ** 2).sum(axis=1), same_N


def _sizes(num_pairs: int, folds: int) -> np.ndarray:
    """Return the pairs of each contiguous fold, the first ones one larger; [F]."""
    size_F = np.full(folds, num_pairs // folds)
    size_F[: num_pairs % folds] += 1
    return size_F


def _correct_by_fold(
    distance_N: np.ndarray, same_N: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the right answers of each fold at each threshold, int [F, T], and its pairs [F]."""
    num_thresholds, size_F = len(_THRESHOLD_T), _sizes(len(same_N), folds)
    fold_N = np.repeat(np.arange(folds), size_F)
    # Pair n is accepted from threshold first_N[n] on: distance < threshold.
    first_N = np.searchsorted(_THRESHOLD_T, distance_N, side="right")
    correct_FT = np.zeros((folds, num_thresholds + 1), dtype=np.int64)
    # There a genuine pair becomes right, and an impostor pair, right until then, wrong.
    np.add.at(correct_FT, (fold_N, first_N), np.where(same_N, 1, -1))
    correct_FT[:, 0] += np.bincount(fold_N[~same_N], minlength=folds)
    return correct_FT.cumsum(axis=1)[:, :num_thresholds], size_F


def _exact(
    far_V: np.ndarray, tar_V: np.ndarray, num_impostors: int, targets: Sequence[float]
) -> dict[float, float]:
    return {target: _tar_at(far_V, tar_V, target, num_impostors) for target in targets}


def _exceeded(
    far_V: np.ndarray, cosine_V: np.ndarray, num_impostors: int, targets: Sequence[float]
) -> dict[float, float]:
    """The score below the last that may be accepted, by target FAR below 1."""
    last = {target: np.searchsorted(far_V, target, side="right") - 1 for target in targets}
    return {
        target: math.nan if 1 / num_impostors > target else float(cosine_V[place + 1])
        for target, place in last.items()
    }


def _tar_at(far_V: np.ndarray, tar_V: np.ndarray, target: float, num_impostors: int) -> float:
    if 1 / num_impostors > target:
        return math.nan
    return float(tar_V[np.searchsorted(far_V, target, side="right") - 1])


def _equal_error_rate(far_V: np.ndarray, tar_V: np.ndarray) -> float:
    """Where FAR + TAR = 1; the sum never falls along the ROC, from 0 to 2."""
    sum_V = far_V + tar_V
    end = int(np.searchsorted(sum_V, 1.0))
    part = (1.0 - sum_V[end - 1]) / (sum_V[end] - sum_V[end - 1])
    return float(far_V[end - 1] + part * (far_V[end] - far_V[end - 1]))
