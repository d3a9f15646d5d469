"""IJB-B and IJB-C: templates of several images and video frames, 1:1 and 1:N.

1:1 is :func:`partialfc.protocols.verification.tar_at_far` of :func:`pair_scores`. Every mode that
changes the numbers is named by :class:`Modes`.

Shape suffixes: N = images, M = images and the frames of a video as one, T = templates, P = pairs or
probes, G = gallery, D = embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from partialfc.protocols import unit_rows
from partialfc.protocols.identification import TIE, TILE_COSINES, rank_k
from partialfc.protocols.open_set import open_set

_PAIRS = 1 << 16

FPIR_TARGETS = (0.1, 0.01)
KS = (1, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modes:
    """How images become a template; the defaults are those that papers report.

    Attributes:
        keep_norms: An image counts by the length of its embedding (N1), or all alike (N0).
        detector: An image counts by its detector's score too (D1), or not (D0).
    """

    keep_norms: bool = True
    detector: bool = True

    def name(self, flip: bool) -> str:
        """Return the name of the test mode, e.g. ``F2 N1 D1``; F2 adds the mirrored image."""
        return f"F{2 if flip else 0} N{int(self.keep_norms)} D{int(self.detector)}"


@dataclass(frozen=True, slots=True, eq=False)
class Templates:
    """Templates in the order of their ids.

    Attributes:
        id_T: Rising.
        unit_TD: fp64, of unit length.
    """

    id_T: np.ndarray
    unit_TD: np.ndarray

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id.

        Raises:
            ValueError: If one is not there.
        """
        wanted = np.asarray(ids)
        row = np.searchsorted(self.id_T, wanted).clip(max=len(self.id_T) - 1)
        missing = np.flatnonzero(self.id_T[row] != wanted)
        if missing.size:
            raise ValueError(f"template {wanted[missing[0]]} has no image.")
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The numbers of 1:N over one gallery, or over all as one with ``compat``.

    Attributes:
        rate: By k, the part of mated probes whose rank is at most k.
        tpir_at_fpir: By target FPIR, the part of mated probes that find their subject at rank 1
            above the threshold; as insightface has it, whose own score exceeds its threshold.
        num_gallery, num_mated, num_nonmated: Templates.
    """

    rate: Mapping[int, float]
    tpir_at_fpir: Mapping[float, float]
    num_gallery: int
    num_mated: int
    num_nonmated: int


def templates(
    embeddings: np.ndarray,
    template: np.ndarray,
    media: np.ndarray,
    detector_score: np.ndarray,
    modes: Modes | None = None,
) -> Templates:
    """Return templates: the mean of the images of a medium, summed over media, of unit length.

    Args:
        embeddings: [N, D] with their lengths, usually image plus mirrored image.
        template: Integers [N].
        media: Integers [N]; frames of one video share theirs.
        detector_score: [N].
        modes: How images are weighed.

    Raises:
        ValueError: If shapes do not match, or a norm is zero or not finite.
    """
    modes = modes or Modes()
    row_ND = np.asarray(embeddings, dtype=np.float64)
    unit_ND = unit_rows(row_ND, "embeddings")
    if not len(row_ND) or any(len(x) != len(row_ND) for x in (template, media, detector_score)):
        raise ValueError(
            f"{len(row_ND)} embeddings, {len(template)} templates, {len(media)} media and "
            f"{len(detector_score)} detector scores: must be one of each for an image."
        )
    row_ND = row_ND if modes.keep_norms else unit_ND
    if modes.detector:
        row_ND = row_ND * np.asarray(detector_score, dtype=np.float64)[:, None]
    pairs = np.stack([np.asarray(template), np.asarray(media)], axis=1)
    medium, of_medium, count = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    mean_MD = _sums(row_ND, of_medium.reshape(-1), len(medium)) / count[:, None]
    id_T, of_template = np.unique(medium[:, 0], return_inverse=True)
    return Templates(id_T, unit_rows(_sums(mean_MD, of_template, len(id_T)), "templates"))


def pair_scores(found: Templates, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of template ids; [P]."""
    left, right = found.rows(first), found.rows(second)
    scores = np.empty(len(left))
    for start in range(0, len(left), _PAIRS):
        part = slice(start, start + _PAIRS)
        a, b = found.unit_TD[left[part]], found.unit_TD[right[part]]
        scores[part] = np.einsum("pd,pd->p", a, b)
    return scores


def search_templates(
    found: Templates,
    gallery: np.ndarray,
    gallery_subject: np.ndarray,
    probe: np.ndarray,
    probe_subject: np.ndarray,
) -> Search:
    """Return the numbers of 1:N over one gallery; ties count against the probe.

    Probes of subjects outside the gallery are the non-mated searches that set the threshold: at
    most the target part of them has any score above it.

    Args:
        found: All templates.
        gallery: Template ids [G], and the subject of each.
        gallery_subject: Integers [G].
        probe: Template ids [P], and the subject of each.
        probe_subject: Integers [P].

    Raises:
        ValueError: If a template has no image, or there is no mated probe.
    """
    gallery_GD, probe_PD = found.unit_TD[found.rows(gallery)], found.unit_TD[found.rows(probe)]
    mated_P = np.isin(probe_subject, gallery_subject)
    if not mated_P.any():
        raise ValueError("no probe's subject is in the gallery.")
    mated_PD, subject_P = probe_PD[mated_P], np.asarray(probe_subject)[mated_P]
    ranked = rank_k(gallery_GD, gallery_subject, mated_PD, subject_P, KS)
    tpir: Mapping[float, float] = dict.fromkeys(FPIR_TARGETS, math.nan)
    if not mated_P.all():
        tpir = open_set(
            gallery_GD, gallery_subject, mated_PD, subject_P, probe_PD[~mated_P], FPIR_TARGETS
        ).rate_at_fpir
    return Search(
        rate=ranked.rate,
        tpir_at_fpir=tpir,
        num_gallery=len(gallery_GD),
        num_mated=int(mated_P.sum()),
        num_nonmated=int((~mated_P).sum()),
    )


def search_insightface(
    found: Templates,
    gallery: np.ndarray,
    gallery_subject: np.ndarray,
    probe: np.ndarray,
    probe_subject: np.ndarray,
) -> Search:
    """Return 1:N as insightface's script has it: both galleries merged by the caller.

    Every probe is mated then. The threshold at a target is the largest score but
    ``ceil(target * P)`` of all pairs of a probe with another subject, which is no FPIR: it counts
    pairs, not searches.

    Raises:
        ValueError: If a probe's subject has not exactly one template in the gallery.
    """
    subject_G, subject_P = np.asarray(gallery_subject), np.asarray(probe_subject)
    order = np.argsort(subject_G, kind="stable")
    own_P = order[np.searchsorted(subject_G[order], subject_P).clip(max=len(order) - 1)]
    wrong = np.flatnonzero(subject_G[own_P] != subject_P)
    if wrong.size or len(np.unique(subject_G)) != len(subject_G):
        raise ValueError("compat='insightface' wants every probe's subject once in the gallery.")
    gallery_GD, probe_PD = found.unit_TD[found.rows(gallery)], found.unit_TD[found.rows(probe)]
    wanted = [math.ceil(len(probe_PD) * target) for target in FPIR_TARGETS]
    own, largest = [], np.empty(0)
    tile = max(1, TILE_COSINES // len(gallery_GD))
    for start in range(0, len(probe_PD), tile):
        cosine_PG = probe_PD[start : start + tile] @ gallery_GD.T
        rows = np.arange(len(cosine_PG))
        own.append(cosine_PG[rows, own_P[start : start + tile]].copy())
        cosine_PG[rows, own_P[start : start + tile]] = -2.0
        others = np.concatenate([largest, cosine_PG[cosine_PG > -2.0]])
        keep = min(max(wanted), len(others))
        largest = np.partition(others, len(others) - keep)[len(others) - keep :]
    own_score_P, falling = np.concatenate(own), np.sort(largest)[::-1]
    ranked = rank_k(gallery_GD, subject_G, probe_PD, subject_P, KS)
    return Search(
        rate=ranked.rate,
        tpir_at_fpir={
            target: float((own_score_P > falling[min(count, len(falling)) - 1] + TIE).mean())
            for target, count in zip(FPIR_TARGETS, wanted, strict=True)
        },
        num_gallery=len(gallery_GD),
        num_mated=len(probe_PD),
        num_nonmated=0,
    )


def _sums(row_ND: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """Sum of the rows of each group, in their order; [groups, D]."""
    order = np.argsort(group_N, kind="stable")
    start = np.searchsorted(group_N[order], np.arange(groups))
    return np.asarray(np.add.reduceat(row_ND[order], start, axis=0))
