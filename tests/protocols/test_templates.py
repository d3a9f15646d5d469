"""IJB and MegaFace protocols by hand, and against slow or other people's implementations."""

import heapq
import math

import numpy as np
import pytest

from partialfc.protocols.distractors import with_distractors
from partialfc.protocols.templates import (
    Modes,
    Templates,
    pair_scores,
    search_insightface,
    search_templates,
    templates,
)
from partialfc.protocols.verification import tar_at_far


def unit(*degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_a_template_by_hand():
    """Mean of the frames of a video, sum over media: two frames count as one photo."""
    rows = np.array([[4.0, 0], [0, 2], [0, 4], [1, 1]])
    found = templates(rows, [9, 9, 9, 5], [1, 2, 2, 1], [1, 1, 1, 1])
    assert found.id_T.tolist() == [5, 9]
    np.testing.assert_allclose(found.unit_TD, [[0.5**0.5, 0.5**0.5], [0.8, 0.6]], atol=1e-15)


@pytest.mark.parametrize(
    ("modes", "name", "expected"),
    [
        (Modes(), "F2 N1 D1", (0.25 * 8, 0.5 * 2)),
        (Modes(detector=False), "F2 N1 D0", (8, 2)),
        (Modes(keep_norms=False), "F2 N0 D1", (0.25, 0.5)),
        (Modes(keep_norms=False, detector=False), "F2 N0 D0", (1, 1)),
    ],
)
def test_the_modes_weigh_an_image_as_they_are_named(modes, name, expected):
    found = templates(np.array([[8.0, 0], [0, 2]]), [1, 1], [1, 2], [0.25, 0.5], modes)
    np.testing.assert_allclose(found.unit_TD[0], np.array(expected) / np.linalg.norm(expected))
    assert modes.name(flip=True) == name


def test_templates_equal_a_slow_reference():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(300, 16))
    template, media = generator.integers(0, 20, 300), generator.integers(0, 5, 300)
    score = generator.uniform(0.5, 1, 300)
    found = templates(rows, template, media, score)
    for place, number in enumerate(found.id_T):
        total = np.zeros(16)
        for medium in np.unique(media[template == number]):
            chosen = (template == number) & (media == medium)
            total += (rows[chosen] * score[chosen, None]).mean(axis=0)
        np.testing.assert_allclose(found.unit_TD[place], total / np.linalg.norm(total))
    first, second = generator.choice(found.id_T, 50), generator.choice(found.id_T, 50)
    by_id = dict(zip(found.id_T.tolist(), found.unit_TD, strict=True))
    slow = [by_id[a] @ by_id[b] for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    np.testing.assert_allclose(pair_scores(found, first, second), slow)
    with pytest.raises(ValueError, match="template 77 has no image"):
        pair_scores(found, [77], [0])


def test_compat_takes_the_nearest_far_of_scikit_learns_curve():
    """Its own steps, with its own library: flipped, nearest, first of two."""
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    targets = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    for digits in (1, 2, 6):  # many ties, some, none
        same = generator.random(3000) < 0.3
        scores = np.round(np.where(same, 0.5, 0.2) + generator.normal(0, 0.15, 3000), digits)
        far, tar, _ = metrics.roc_curve(same, scores)
        far, tar = np.flipud(far), np.flipud(tar)
        expected = {}
        for target in targets:
            nearest = min(zip(abs(far - target), range(len(far)), strict=True))
            expected[target] = tar[nearest[1]]
        assert tar_at_far(scores, same, targets, compat="insightface") == pytest.approx(expected)


def test_where_compat_and_the_exact_threshold_differ():
    """Ten impostors, target 0.04: none may be accepted, and the nearest vertex accepts none too;
    at 0.06 the nearest accepts one, which is FAR 0.1."""
    scores = np.array([0.9, 0.7, 0.8, *np.linspace(0.1, 0.5, 9)])
    same = np.array([True, True, *[False] * 10])
    assert tar_at_far(scores, same, [0.1], compat=None) == {0.1: 1.0}
    assert math.isnan(tar_at_far(scores, same, [0.06], compat=None)[0.06])
    assert tar_at_far(scores, same, [0.06], compat="insightface") == {0.06: 1.0}
    assert tar_at_far(scores, same, [0.04], compat="insightface") == {0.04: 0.5}


def at(*degrees):
    """Templates with these directions, ids 0, 1, ..."""
    return Templates(np.arange(len(degrees)), unit(*degrees))


def test_one_to_many_by_hand():
    """Gallery A 0, B 90; probes A 10, A 60 (nearer to B), B 80; strangers at 20 and 45 degrees."""
    found = at(0, 90, 10, 60, 80, 20, 45)
    result = search_templates(found, [0, 1], [100, 200], [2, 3, 4, 5, 6], [100, 100, 200, 7, 8])
    assert result.rate == {1: pytest.approx(2 / 3), 5: 1.0, 10: 1.0}
    assert (result.num_mated, result.num_nonmated, result.num_gallery) == (3, 2, 2)
    assert math.isnan(result.tpir_at_fpir[0.01]), "two non-mated searches cannot measure it"
    with pytest.raises(ValueError, match="no probe's subject is in the gallery"):
        search_templates(found, [0], [100], [2], [300])


def test_non_mated_searches_set_the_threshold_and_a_tie_is_a_miss():
    strangers = [30, *range(40, 49)]  # the nearest at 30 degrees; FPIR 0.1 allows it, not the next
    found = at(0, 10, 35, 40, *strangers)
    subjects = [1, 1, 1, *[9 + i for i in range(10)]]
    result = search_templates(found, [0], [1], np.arange(1, 14), subjects)
    assert result.tpir_at_fpir[0.1] == pytest.approx(2 / 3), "35 beats the stranger at 40, 40 ties"


def test_one_to_many_as_insightface_has_it():
    """Its loop, over a similarity matrix: both galleries merged, thresholds from negative pairs."""
    generator = np.random.default_rng(5)
    subjects, probes, dim = 40, 150, 16
    centers = generator.normal(size=(subjects, dim))
    subject = generator.integers(0, subjects, probes)
    rows = np.concatenate([centers, centers[subject] + generator.normal(0, 0.9, (probes, dim))])
    found = Templates(np.arange(len(rows)), rows / np.linalg.norm(rows, axis=1, keepdims=True))
    result = search_insightface(
        found, np.arange(subjects), np.arange(subjects), np.arange(subjects, len(rows)), subject
    )
    similarity = found.unit_TD[subjects:] @ found.unit_TD[:subjects].T
    top = np.argsort(-similarity)
    for k in (1, 5, 10):
        correct = sum(subject[i] in top[i, :k] for i in range(probes))
        assert result.rate[k] == correct / probes
    own = similarity[np.arange(probes), subject].copy()
    similarity[np.arange(probes), subject] = -2
    negatives = similarity[similarity > -2]
    for target in (0.1, 0.01):
        count = math.ceil(probes * target)
        threshold = heapq.nlargest(count, negatives)[count - 1]
        assert result.tpir_at_fpir[target] == np.mean(own > threshold)


def test_megaface_by_hand():
    """Person A at 0, 10, 50, B at 100, 103; distractors at 30 and 180 degrees.

    Distances of A's pairs: 10, 50, 40; the distractor at 30 is 30, 20, 20 from them. So from 0 the
    mate at 10 wins and the one at 50 loses; from 10 the same; from 50 both lose. B's pair wins.
    """
    result = with_distractors(
        unit(0, 10, 50, 100, 103), [1, 1, 1, 2, 2], unit(30, 180), ks=(1, 2), targets=(0.3, 0.01)
    )
    assert result.rate == {1: 4 / 8, 2: 1.0}
    assert (result.num_searches, result.num_probes, result.num_distractors) == (8, 5, 2)
    # 10 pairs with distractors: degrees 20, 20, 30, then 70, ...; three are allowed
    assert result.tar_at_far[0.3] == 1.0
    assert math.isnan(result.tar_at_far[0.01])
    # one allowed: the next is at 20 degrees too, so a mate must be nearer than 20
    strict = with_distractors(unit(0, 10, 50), [1, 1, 1], unit(30, 180), ks=(1,), targets=(0.17,))
    assert strict.tar_at_far[0.17] == pytest.approx(2 / 6)


def test_a_distractor_as_near_as_the_mate_wins():
    result = with_distractors(unit(0, 20), [1, 1], unit(-20), ks=(1,), targets=())
    assert result.rate[1] == 0.5, "from 0 both are 20 away; from 20 the distractor is 40 away"


def test_tiles_of_distractors_change_nothing(monkeypatch):
    generator = np.random.default_rng(2)
    probes, others = generator.normal(size=(60, 8)), generator.normal(size=(500, 8))
    identity = np.arange(60) // 3
    whole = with_distractors(probes, identity, others, ks=(1, 10), targets=(1e-2, 1e-3))
    monkeypatch.setattr("partialfc.protocols.distractors._TILE", 44)
    assert with_distractors(probes, identity, others, ks=(1, 10), targets=(1e-2, 1e-3)) == whole
    with pytest.raises(ValueError, match="no person of the probe set has two images"):
        with_distractors(probes, np.arange(60), others)
    with pytest.raises(ValueError, match=r"ks must be in \[1, 500\]"):
        with_distractors(probes, identity, others, ks=(501,))
