"""All-to-all verification against the whole matrix."""

import math

import numpy as np
import pytest

from partialfc.protocols import all_to_all
from partialfc.protocols.all_to_all import combine, count_pairs, search
from tests.support.embeddings import clustered


def brute_force(embeddings, identity, targets):
    """The protocol from the whole fp64 matrix."""
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    upper = np.triu_indices(len(unit), 1)
    scores = (unit @ unit.T)[upper]
    same = (identity[:, None] == identity)[upper]
    falling = np.sort(scores[~same])[::-1]
    found = {}
    for target in targets:
        allowed = math.floor(target * len(falling) + 1e-9)
        found[target] = (scores[same] > falling[allowed]).mean() if allowed else math.nan
    return found, int(same.sum()), len(falling)


def measure(embeddings, identity, targets, ranks=1):
    parts = [search(embeddings, identity, targets, rank=r, ranks=ranks) for r in range(ranks)]
    return combine(parts, identity, targets)


def test_five_thousand_images_equal_the_whole_matrix():
    """12.5 million pairs; a lost tile, a wrong bound or a pair counted twice would change it."""
    targets = (1e-2, 1e-4, 1e-6)
    embeddings, identity = clustered(5000, 400)
    wanted, genuine, impostor = brute_force(embeddings, identity, targets)
    for ranks in (1, 3):
        found = measure(embeddings, identity, targets, ranks)
        assert found.tar_at_far == pytest.approx(wanted, abs=1e-12)
        assert (found.num_genuine, found.num_impostor) == (genuine, impostor)
    assert 0.01 < wanted[1e-6] < wanted[1e-2] < 1


def test_small_tiles_change_nothing(monkeypatch):
    embeddings, identity = clustered(700, 40, seed=1)
    whole = measure(embeddings, identity, (1e-3,))
    monkeypatch.setattr(all_to_all, "ROWS", 37)
    monkeypatch.setattr(all_to_all, "COLUMNS", 53)
    monkeypatch.setattr(all_to_all, "_CHUNK", 100)
    assert measure(embeddings, identity, (1e-3,), ranks=4) == whole


def test_by_hand_with_ties():
    """Impostor cosines 0.5, 0.5, 0, 0, 0, 0...: a tie with the threshold is not accepted."""
    angles = np.radians([0, 60, 60, 90, 180])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], 1)
    identity = np.array([7, 7, 8, 9, 9])
    # genuine: 0-60 (0.5), 90-180 (0). impostor: 0-60 0.5, 0-90 0, 0-180 -1, 60-60 1, 60-90 .866,
    # 60-180 -.5, 60-90 .866, 60-180 -.5; in order 1, .866, .866, .5, 0, -.5, -.5, -1
    assert count_pairs(identity) == (2, 8)
    found = measure(embeddings, identity, (0.1, 0.375, 0.5, 0.625))
    assert math.isnan(found.tar_at_far[0.1]), "8 impostor pairs cannot measure it"
    assert found.tar_at_far[0.375] == 0.0, "three accepted; the fourth ties with the genuine 0.5"
    assert found.tar_at_far[0.5] == 0.5
    assert found.threshold_at_far[0.375] == pytest.approx(0.5)
    assert found.tar_at_far[0.625] == 1.0


def test_a_backbone_that_maps_all_to_one_point_accepts_nobody():
    found = measure(np.ones((50, 8)), np.arange(50) // 2, (1e-1, 1e-2))
    assert found.tar_at_far == {1e-1: 0.0, 1e-2: 0.0}


def test_the_bound_of_the_rough_product_holds():
    """The worst directions: all products positive, every element rounded away."""
    import torch

    generator = np.random.default_rng(0)
    for scale in (0.0, 0.3, 3.0):
        rows = np.abs(generator.normal(size=(200, 512))) + scale
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        rough = torch.from_numpy(unit).to(torch.bfloat16)
        error = np.abs((rough @ rough.T).double().numpy() - unit @ unit.T).max()
        assert error < all_to_all._SLACK


@pytest.mark.parametrize(
    ("embeddings", "identity", "targets", "message"),
    [
        (np.ones((3, 2)), [0, 1], (1e-3,), r"identities must be \[N\] with N = 3"),
        (np.ones((3, 2)), [0, 1, 1], (0.0,), r"targets must be in \(0, 1\)"),
        (np.zeros((3, 2)), [0, 1, 1], (0.1,), "row 0 has norm 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(embeddings, identity, targets, message):
    with pytest.raises(ValueError, match=message):
        search(embeddings, np.array(identity), targets)
