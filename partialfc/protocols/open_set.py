"""Open-set identification: who is the probe, if it is anyone of the gallery at all?

A probe of somebody in the gallery must find its own identity with a score above a threshold; a
probe of somebody else, a distractor, must stay below. The threshold is the one at which no more
than a target part of the distractors is taken for somebody.

Shape suffixes: N = images, G = gallery entries, P = probes, M = distractors, D = embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partialfc.protocols import unit_rows
from partialfc.protocols.identification import TIE, TILE_COSINES, check_sets


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSet:
    """The numbers of one open-set identification.

    Attributes:
        rate_at_fpir: By target false-positive identification rate, the part of the probes that find
            their identity at rank 1 above the threshold; in [0, 1]. NaN where one distractor among
            so few exceeds the target already.
        num_probes: P.
        num_distractors: M.
        num_gallery: G.
    """

    rate_at_fpir: Mapping[float, float]
    num_probes: int
    num_distractors: int
    num_gallery: int


def open_set(
    gallery_embeddings: np.ndarray,
    gallery_identities: np.ndarray,
    probe_embeddings: np.ndarray,
    probe_identities: np.ndarray,
    distractor_embeddings: np.ndarray,
    targets: Sequence[float] = (0.1, 0.01),
) -> OpenSet:
    """Return the identification rates at false-positive rates, by cosine and exact thresholds.

    Ties count against the probe: another identity with the same score, and a distractor with it.

    Args:
        gallery_embeddings: [G, D] of any float type and norm.
        gallery_identities: Integers [G]; several entries may share one.
        probe_embeddings: [P, D].
        probe_identities: Integers [P]; all in the gallery.
        distractor_embeddings: [M, D] of identities that are not in the gallery.
        targets: Each in (0, 1).

    Raises:
        ValueError: If shapes do not match, a probe's identity is not in the gallery, a set is
            empty, an embedding's norm is zero or not finite, or a target is out of range.
    """
    identity_G, identity_P = np.asarray(gallery_identities), np.asarray(probe_identities)
    unit_GD = unit_rows(gallery_embeddings, "gallery_embeddings")
    unit_PD = unit_rows(probe_embeddings, "probe_embeddings")
    unit_MD = unit_rows(distractor_embeddings, "distractor_embeddings")
    check_sets(unit_GD, identity_G, unit_PD, identity_P)
    if not len(unit_MD) or unit_MD.shape[1] != unit_GD.shape[1]:
        raise ValueError(
            f"distractor_embeddings must be [M, {unit_GD.shape[1]}] with M >= 1, "
            f"got {list(unit_MD.shape)}."
        )
    if not all(0 < target < 1 for target in targets):
        raise ValueError(f"targets must be in (0, 1), got {tuple(targets)}.")
    own_P, other_P = _best(unit_GD, identity_G, unit_PD, identity_P)
    _, best_M = _best(unit_GD, identity_G, unit_MD, None)
    falling_M = np.sort(best_M)[::-1]
    rates = {}
    for target in targets:
        allowed = int(target * len(falling_M) + 1e-9)
        if allowed == 0:
            rates[target] = float("nan")
            continue
        threshold = falling_M[allowed] if allowed < len(falling_M) else -np.inf
        found_P = (own_P > other_P + TIE) & (own_P > threshold + TIE)
        rates[target] = float(found_P.mean())
    return OpenSet(
        rate_at_fpir=rates,
        num_probes=len(unit_PD),
        num_distractors=len(unit_MD),
        num_gallery=len(unit_GD),
    )


def _best(
    unit_GD: np.ndarray, identity_G: np.ndarray, unit_ND: np.ndarray, identity_N: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Largest cosine to the own identity and to another one, -inf where there is none."""
    tile = max(1, TILE_COSINES // len(unit_GD))
    own, other = [], []
    for start in range(0, len(unit_ND), tile):
        cosine_NG = unit_ND[start : start + tile] @ unit_GD.T
        own_NG = np.zeros(cosine_NG.shape, dtype=np.bool_)
        if identity_N is not None:
            own_NG = identity_N[start : start + tile, None] == identity_G
        own.append(np.max(cosine_NG, axis=1, where=own_NG, initial=-np.inf))
        other.append(np.max(cosine_NG, axis=1, where=~own_NG, initial=-np.inf))
    return np.concatenate(own), np.concatenate(other)
