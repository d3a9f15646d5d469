import math

import numpy as np
import pytest

from partialfc.protocols.curves import curves
from partialfc.protocols.identification import first_of_each, rank_k
from partialfc.protocols.verification import best_threshold, roc, tar_at_far, validate, verify


def pairs_at(cosines):
    """Embeddings of pairs with these cosines, of any lengths."""
    angles = np.arccos(np.asarray(cosines, float))
    one = np.stack([np.full(len(angles), 3.0), np.zeros(len(angles))], axis=1)
    other = 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.stack([one, other], axis=1).reshape(-1, 2)


def slow_ten_fold(embeddings, same, folds):
    """The protocol again, a loop for every fold, threshold and pair."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = ((unit[0::2] - unit[1::2]) ** 2).sum(1)
    count, thresholds = len(same), [step * 0.01 for step in range(400)]
    accuracies, start = [], 0
    for fold in range(folds):
        size = count // folds + (fold < count % folds)
        test = set(range(start, start + size))
        start += size
        best, chosen = -1, 0.0
        for threshold in thresholds:
            right = sum((distance[i] < threshold) == same[i] for i in range(count) if i not in test)
            if right > best:
                best, chosen = right, threshold
        accuracies.append(sum((distance[i] < chosen) == same[i] for i in test) / size)
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize(("count", "folds"), [(40, 10), (37, 10), (23, 5)])
def test_ten_fold_equals_a_slow_reference(count, folds):
    generator = np.random.default_rng(count)
    same = generator.random(count) < 0.5
    noise = generator.normal(0, 0.35, count)
    embeddings = pairs_at(np.clip(np.where(same, 0.55, 0.15) + noise, -1, 1))
    result = verify(embeddings, same, folds)
    mean, deviation = slow_ten_fold(embeddings, same, folds)
    assert result.accuracy == pytest.approx(mean, abs=1e-12)
    assert result.accuracy_std == pytest.approx(deviation, abs=1e-12)
    assert 0.5 < result.accuracy < 1


def test_separable_pairs_are_perfect_and_the_first_best_threshold_counts():
    same = np.array([True, False] * 10)
    result = verify(pairs_at(np.where(same, 0.893, 0.1)), same)
    assert (result.accuracy, result.accuracy_std) == (1.0, 0.0)
    # Squared distance 0.214 must be below one of the grid, 0.22.
    assert result.threshold == pytest.approx(1 - 0.22 / 2)
    assert (result.eer, result.auc) == (0.0, 1.0)
    assert result.num_pairs == 20


def test_roc_by_hand_with_ties():
    """Scores equal to each other are accepted together: no vertex lies inside a tie."""
    scores = np.array([0.9, 0.8, 0.8, 0.8, 0.5, 0.1])
    same = np.array([True, True, False, True, False, True])
    far, tar, threshold = roc(scores, same)
    assert far.tolist() == [0, 0, 0.5, 1, 1]
    assert tar.tolist() == [0, 0.25, 0.75, 0.75, 1]
    assert threshold.tolist() == [math.inf, 0.9, 0.8, 0.5, 0.1]


def test_tar_is_the_largest_whose_far_does_not_exceed_the_target():
    """insightface takes the nearest FAR, which may exceed the target."""
    impostors = [0.95, *np.linspace(0.0, 0.4, 9)]
    genuine = [0.99, 0.96, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.45]
    same = np.array([True] * 10 + [False] * 10)
    result = verify(pairs_at([*genuine, *impostors]), same)
    assert result.tar_at_far[0.1] == pytest.approx(1.0)  # the one impostor above is FAR 0.1
    assert math.isnan(result.tar_at_far[0.01]), "ten impostors cannot measure it"
    more = np.array([True] * 10 + [False] * 20)
    twice = verify(pairs_at([*genuine, *impostors, *impostors]), more)
    assert twice.tar_at_far[0.1] == pytest.approx(1.0)
    tied = verify(pairs_at([*genuine, *([0.94] * 2), *([0.1] * 18)]), more)
    assert tied.tar_at_far[0.1] == pytest.approx(1.0)
    assert tied.threshold_at_far[0.1] == pytest.approx(0.1), "the score below the last accepted"
    above = verify(pairs_at([*genuine, *([0.94] * 3), *([0.1] * 17)]), more)
    assert above.tar_at_far[0.1] == pytest.approx(0.2), "the tie at 0.94 is FAR 0.15"
    assert above.threshold_at_far[0.1] == pytest.approx(0.94)
    assert math.isnan(above.threshold_at_far[0.01])


def test_the_threshold_is_one_cosine_wherever_it_is_said():
    """Accepted are the pairs that exceed it, as many as the accuracy and the rates count."""
    generator = np.random.default_rng(0)
    rows, same = generator.normal(size=(800, 8)), generator.random(400) < 0.5
    rows[1::2][same] += rows[::2][same]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = (unit[::2] * unit[1::2]).sum(1)
    result = verify(rows, same)
    assert result.threshold == best_threshold(cosine, same)
    best = max(((cosine > 1 - step / 200) == same).mean() for step in range(400))
    assert ((cosine > result.threshold) == same).mean() == best
    for target in (0.1, 0.01):
        accepted = cosine > result.threshold_at_far[target] + 1e-12
        assert accepted[~same].mean() <= target
        assert accepted[same].mean() == result.tar_at_far[target]


def test_eer_and_auc_by_hand():
    same = np.array([True] * 4 + [False] * 4)
    scores = [0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.05]
    result = verify(pairs_at(scores), same, folds=2)
    assert result.auc == pytest.approx(15 / 16)  # one of 16 comparisons is lost
    assert result.eer == pytest.approx(0.25)


def at_distances(*distances):
    """Embeddings of pairs with these squared distances."""
    return pairs_at(1 - np.asarray(distances) / 2)


@pytest.mark.parametrize(
    ("target", "second", "first"),
    [
        # FAR of the first fold: 0 up to 0.500, 1/4 from 0.501, so 0.1 is at 0.5004, which takes the
        # pairs at 0.5003 where a threshold of the grid would not; and 0.05 at 0.5002.
        (0.1, (1 / 3, 1 / 2), (1, 0)),
        (0.05, (0, 0), (1, 0)),
        # A level of that height ends at 1.000: before the pair at 1.0002, which 1.0003 takes.
        (0.25, (1 / 3, 1 / 2), (1, 0)),
        (0.325, (2 / 3, 1 / 2), (1, 0)),
        # The second fold's level of 1/2 goes from 0.501 to 3.000; the first's ends at 1.500.
        (0.5, (2 / 3, 1 / 2), (1, 1)),
        # An impostor at 4 is below no threshold: the second fold's FAR ends at 1/2, too low.
        (0.75, (2 / 3, 1 / 2), (0, 0)),
    ],
)
def test_val_by_hand(target, second, first):
    """Two folds: the threshold of one is interpolated in the other's false accept rates."""
    folds = at_distances(*(0.5007, 1.0005, 1.5005, 2.0005, 0.2), *(0.5003, 1.0002, 2.9, 0.5003, 4))
    same = np.array([False] * 4 + [True] * 4 + [False] * 2)
    result = validate(folds, same, target, folds=2)
    assert result.val == pytest.approx((first[0] + second[0]) / 2)
    assert result.val_std == pytest.approx(abs(first[0] - second[0]) / 2)
    assert result.far == pytest.approx((first[1] + second[1]) / 2)


def test_val_with_ties_by_hand():
    """Right angles are a squared distance of 2, a threshold itself, below which they are not."""
    right, near = [[1.0, 0], [0, 1]], [[1.0, 0], [1, 0.01]]
    kinds = [(right, False), (right, False), (right, True), (near, True)]
    embeddings = np.array([pair for pair, _ in 2 * kinds]).reshape(-1, 2)
    same = np.array([kind for _, kind in 2 * kinds])
    # The FAR is 0 up to 2.000 and 1 from 2.001: both impostors at once, for any target below 1 at
    # a threshold above 2, so that the genuine pair there is accepted, and the impostors with it.
    result = validate(embeddings, same, 1e-3, folds=2)
    assert (result.val, result.val_std, result.far) == (1.0, 0.0, 1.0)
    exact = tar_at_far(-np.array([2.0, 2, 2, 0] * 2), same, [0.3])
    assert exact == {0.3: 0.5}, "no threshold has a FAR between 0 and 1: the exact rate is 0"


def test_val_is_the_spline_of_an_old_scipy():
    """arcface_torch's loop; its interp1d(kind="slinear") up to scipy 1.8 made this very spline."""
    spline = pytest.importorskip("scipy.interpolate").BSpline.construct_fast
    generator = np.random.default_rng(4)
    for digits, target in ((2, 1e-1), (4, 1e-2), (16, 1e-3)):  # many ties, some, none
        same = generator.random(3000) < 0.5
        cosine = np.where(same, 0.5, 0.1) + generator.normal(0, 0.15, 3000)
        embeddings = pairs_at(np.round(cosine, digits).clip(-1, 1))
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        distance = ((unit[0::2] - unit[1::2]) ** 2).sum(1)
        grid, vals, fars = np.arange(0, 4, 0.001), [], []
        for test in np.split(np.arange(3000), 10):
            train = np.delete(np.arange(3000), test)
            impostors = distance[train][~same[train]]
            far = np.array([(impostors < threshold).mean() for threshold in grid])
            threshold = spline(np.r_[far[0], far, far[-1]], grid, 1)(target)
            accepted = distance[test] < threshold
            vals.append(accepted[same[test]].mean())
            fars.append(accepted[~same[test]].mean())
        result = validate(embeddings, same, target)
        assert result.val == pytest.approx(np.mean(vals), abs=1e-12)
        assert result.val_std == pytest.approx(np.std(vals), abs=1e-12)
        assert result.far == pytest.approx(np.mean(fars), abs=1e-12)
        assert 0.1 < result.val < 1


def test_val_of_a_fold_without_a_kind_is_unknown():
    same = np.array([True, True, False, False])
    result = validate(at_distances(0.1, 0.1, 3, 3), same, folds=2)
    assert math.isnan(result.val)
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        validate(at_distances(0.1, 0.1, 3, 3), same, 0.0, folds=2)


@pytest.mark.parametrize(
    ("embeddings", "same", "folds", "message"),
    [
        (np.ones((3, 2)), np.array([True, False]), 2, "two rows per pair"),
        (np.ones((4, 2)), np.array([True, True]), 2, "both kinds"),
        (np.ones((4, 2)), np.array([1, 0]), 2, "must be bool"),
        (np.ones((4, 2)), np.array([True, False]), 3, r"folds must be in \[2, 2\]"),
        (np.array([[1.0], [0.0], [1.0], [1.0]]), np.array([True, False]), 2, "row 1 has norm 0"),
        (np.array([[1], [1], [np.nan], [1]]), np.array([True, False]), 2, "row 2 has norm nan"),
    ],
)
def test_what_cannot_be_verified_is_refused(embeddings, same, folds, message):
    with pytest.raises(ValueError, match=message):
        verify(embeddings, same, folds)


def unit(*degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_ranks_by_hand():
    gallery = unit(0, 40, 100)
    probes = unit(10, 25, 90, 30)
    result = rank_k(gallery, [0, 1, 2], 7 * probes, [0, 0, 2, 0], ks=(1, 2, 3))
    assert result.rate == {1: 0.5, 2: 1.0, 3: 1.0}
    assert (result.num_probes, result.num_gallery) == (4, 3)


def test_ties_count_against_the_probe():
    """A backbone that maps everything to one point recognises nobody."""
    same_point = np.ones((5, 3))
    result = rank_k(same_point, range(5), same_point, range(5), ks=(1, 4, 5))
    assert result.rate == {1: 0.0, 4: 0.0, 5: 1.0}


def test_the_best_of_several_gallery_images_counts():
    result = rank_k(unit(0, 80, 45), [0, 0, 1], unit(70), [0], ks=(1,))
    assert result.rate == {1: 1.0}


def test_tiles_do_not_change_the_ranks(monkeypatch):
    generator = np.random.default_rng(0)
    gallery, probes = generator.normal(size=(50, 8)), generator.normal(size=(200, 8))
    identities = generator.integers(0, 50, 200)
    whole = rank_k(gallery, range(50), probes, identities, ks=(1, 5, 20))
    monkeypatch.setattr("partialfc.protocols.identification.TILE_COSINES", 64)
    assert rank_k(gallery, range(50), probes, identities, ks=(1, 5, 20)) == whole
    similarity = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)) @ probes.T
    own = similarity[identities, np.arange(200)]
    rank = (similarity >= own - 1e-12).sum(axis=0)
    assert whole.rate == {k: (rank <= k).mean() for k in (1, 5, 20)}


def test_a_probe_that_nobody_in_the_gallery_matches_is_an_error():
    with pytest.raises(ValueError, match=r"probe_identities\[1\] = 7 is not in the gallery"):
        rank_k(unit(0, 1), [0, 1], unit(0, 1), [0, 7])


def test_gallery_is_the_first_image_of_each():
    gallery, probes = first_of_each([4, 2, 4, 2, 9])
    assert gallery.tolist() == [0, 1, 4]
    assert probes.tolist() == [2, 3]


def test_curves_by_hand():
    """Vertices of the ROC from the first false accept on, and shares of a histogram."""
    scores, same = np.array([0.9, 0.7, 0.7, 0.5, 0.3]), np.array([True, True, False, True, False])
    found = curves(scores, same)
    vertices = list(zip(found.far, found.tar, strict=True))
    assert set(vertices) == {(0, 0), (0, 0.33333), (0.5, 0.66667), (0.5, 1), (1, 1)}
    assert vertices == sorted(vertices)
    assert (found.edges[0], found.edges[-1], len(found.edges)) == (-0.2, 0.9, 61)
    assert sum(found.same) == pytest.approx(1, abs=1e-4)
    width = 1.1 / 60
    for score, kind, part in ((0.9, found.same, 1 / 3), (0.3, found.different, 1 / 2)):
        at = min(int((score + 0.2) / width), 59)
        assert kind[at] == pytest.approx(part, abs=1e-4)


def test_curves_of_many_pairs_stay_short_and_keep_the_low_rates():
    """A million pairs would be megabytes in a page; the first false accepts are what is read."""
    generator = np.random.default_rng(1)
    same = generator.random(200_000) < 0.5
    scores = np.where(same, 0.5, 0.1) + generator.normal(0, 0.1, len(same))
    found = curves(scores, same)
    assert len(found.far) <= 403
    whole = {
        (float(f"{x:.5g}"), float(f"{y:.5g}")) for x, y, _ in zip(*roc(scores, same), strict=True)
    }
    assert set(zip(found.far, found.tar, strict=True)) <= whole
    lowest = [value for value in found.far if value > 0]
    assert lowest[0] == pytest.approx(1 / (~same).sum(), rel=1e-4)
