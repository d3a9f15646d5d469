"""Closed-set identification: which identity of the gallery does a probe show?

Shape suffixes: N = images, G = gallery entries, P = probes (of one tile), D = embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partialfc.protocols import unit_rows

TIE = 1e-12
"""Cosines this close are equal: a matrix product rounds by position, some 1e-15 apart."""

TILE_COSINES = 1 << 22
"""Cosines held at a time, 32 MiB of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identification:
    """The numbers of one closed-set identification.

    Attributes:
        rate: By k, the part of the probes whose rank is at most k, in [0, 1].
        num_probes: Probes searched.
        num_gallery: Entries in the gallery.
    """

    rate: Mapping[int, float]
    num_probes: int
    num_gallery: int


def rank_k(
    gallery_embeddings: np.ndarray,
    gallery_identities: np.ndarray,
    probe_embeddings: np.ndarray,
    probe_identities: np.ndarray,
    ks: Sequence[int] = (1, 5),
) -> Identification:
    """Return the rank-k rates by cosine.

    The rank of a probe is 1 + the number of gallery entries of other identities whose cosine is
    at least that of the best entry of its own: a tie counts against the probe, so a backbone
    that maps everything to one point scores 0 and not 1.

    Args:
        gallery_embeddings: [G, D] of any float type and norm.
        gallery_identities: Integers [G]; several entries may share one.
        probe_embeddings: [P, D].
        probe_identities: Integers [P]; all in the gallery.
        ks: Each >= 1.

    Raises:
        ValueError: If shapes do not match, a probe's identity is not in the gallery, there is no
            probe, an embedding's norm is zero or not finite, or a k is below 1.
    """
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks must be >= 1, got {tuple(ks)}.")
    rank_P, _ = ranks(gallery_embeddings, gallery_identities, probe_embeddings, probe_identities)
    return rates(rank_P, len(gallery_embeddings), ks)


def rates(rank_P: np.ndarray, num_gallery: int, ks: Sequence[int]) -> Identification:
    """Return the part of the probes whose rank is at most k."""
    rate = {k: float((rank_P <= k).mean()) for k in ks}
    return Identification(rate=rate, num_probes=len(rank_P), num_gallery=num_gallery)


def ranks(
    gallery_embeddings: np.ndarray,
    gallery_identities: np.ndarray,
    probe_embeddings: np.ndarray,
    probe_identities: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of every probe, int64 [P], and the gallery entry next to it, [P].

    Arguments, rule and errors are those of :func:`rank_k`.
    """
    identity_G, identity_P = np.asarray(gallery_identities), np.asarray(probe_identities)
    unit_GD = unit_rows(gallery_embeddings, "gallery_embeddings")
    unit_PD = unit_rows(probe_embeddings, "probe_embeddings")
    check_sets(unit_GD, identity_G, unit_PD, identity_P)
    tile = max(1, TILE_COSINES // len(unit_GD))
    tiles = [slice(start, start + tile) for start in range(0, len(unit_PD), tile)]
    found = [_ranks(unit_GD, identity_G, unit_PD[rows], identity_P[rows]) for rows in tiles]
    rank_P, nearest_P = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rank_P, nearest_P


def first_of_each(identities: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split images into a gallery with the first of each identity, and probes.

    Returns:
        (gallery indices, probe indices), int64, each rising; together every image once.
    """
    identity_N = np.asarray(identities)
    is_gallery_N = np.zeros(len(identity_N), dtype=np.bool_)
    is_gallery_N[np.unique(identity_N, return_index=True)[1]] = True
    return np.flatnonzero(is_gallery_N), np.flatnonzero(~is_gallery_N)


def _ranks(
    unit_GD: np.ndarray, identity_G: np.ndarray, unit_PD: np.ndarray, identity_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    cosine_PG = unit_PD @ unit_GD.T
    own_PG = identity_P[:, None] == identity_G
    best_P1 = np.max(cosine_PG, axis=1, keepdims=True, where=own_PG, initial=-np.inf)
    rank_P = 1 + ((cosine_PG >= best_P1 - TIE) & ~own_PG).sum(axis=1)
    return np.asarray(rank_P), cosine_PG.argmax(axis=1)


def check_sets(
    unit_GD: np.ndarray, identity_G: np.ndarray, unit_PD: np.ndarray, identity_P: np.ndarray
) -> None:
    """Refuse a gallery and probes that do not go together.

    Raises:
        ValueError: If a set is empty, shapes differ, or a probe's identity is not in the gallery.
    """
    for name, unit_ND, identity_N in (
        ("gallery", unit_GD, identity_G),
        ("probe", unit_PD, identity_P),
    ):
        if identity_N.shape != (len(unit_ND),) or not len(unit_ND):
            raise ValueError(
                f"{name}_identities must be [N] with N = {len(unit_ND)} {name}_embeddings, "
                f"at least one; got {list(identity_N.shape)}."
            )
    if unit_GD.shape[1] != unit_PD.shape[1]:
        raise ValueError(
            f"gallery and probe embeddings must be equally wide, got {unit_GD.shape[1]} and "
            f"{unit_PD.shape[1]}."
        )
    missing = np.flatnonzero(~np.isin(identity_P, identity_G))
    if missing.size:
        raise ValueError(
            f"probe_identities[{missing[0]}] = {identity_P[missing[0]]} is not in the gallery, and "
            f"{missing.size - 1} others are not; in a closed set leave such probes out."
        )
