"""Draws of the augmentation: functions of (seed, epoch, sample id), and of the right frequency."""

import numpy as np
import pytest

from partialfc.data.augment import CHANGES, Augmentation, draw

IDS = np.arange(20_000)


def test_a_draw_belongs_to_the_image_not_to_its_place_or_rank():
    augmentation = Augmentation(shift=4, flip=0.5, **dict.fromkeys(CHANGES, 0.3))
    everything = draw(augmentation, 3, 1, IDS, 112)
    some = np.random.default_rng(0).permutation(IDS)[:100]
    part = draw(augmentation, 3, 1, some, 112)
    for whole, own in zip(everything[:3], part[:3], strict=True):
        np.testing.assert_array_equal(whole[some], own)
    assert list(part.changes) == list(CHANGES)
    for name, own in part.changes.items():
        np.testing.assert_array_equal(everything.changes[name].chosen_B[some], own.chosen_B)
        np.testing.assert_array_equal(everything.changes[name].value_Bn[some], own.value_Bn)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_images_are_mirrored_as_often_as_asked(probability):
    flips = draw(Augmentation(flip=probability), 3, 1, IDS, 112).flip_B
    deviation = (probability * (1 - probability) / len(IDS)) ** 0.5
    assert abs(flips.mean() - probability) <= 4 * deviation


def test_shifts_are_uniform_on_both_axes():
    draws = draw(Augmentation(shift=2), 3, 1, IDS, 112)
    for shift_B in (draws.shift_x_B, draws.shift_y_B):
        values, counts = np.unique(shift_B, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        np.testing.assert_allclose(counts / len(IDS), 0.2, atol=4 * (0.2 * 0.8 / len(IDS)) ** 0.5)


def test_no_shift_means_none():
    draws = draw(Augmentation(shift=0), 3, 1, IDS, 112)
    assert not draws.shift_x_B.any()
    assert not draws.shift_y_B.any()


def test_draws_of_axes_epochs_and_seeds_are_independent():
    augmentation = Augmentation(shift=16)
    columns = [
        column.astype(float)
        for seed, epoch in [(3, 1), (3, 2), (4, 1)]
        for column in draw(augmentation, seed, epoch, IDS, 112)[:3]
    ]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / len(IDS) ** 0.5


@pytest.mark.parametrize("name", CHANGES)
def test_changes_happen_as_often_as_asked_and_independently(name):
    """Else an image would be blurred whenever it is grey, or in every epoch."""
    settings = Augmentation(**dict.fromkeys(CHANGES, 0.5))
    first, second = (draw(settings, 3, epoch, IDS, 112).changes for epoch in (1, 2))
    chosen = first[name].chosen_B
    assert abs(chosen.mean() - 0.5) < 0.02
    others = [c.chosen_B for other, c in first.items() if other != name] + [second[name].chosen_B]
    for other in others:
        assert abs(np.corrcoef(chosen, other)[0, 1]) < 0.04


def test_the_numbers_of_changes_keep_their_range():
    settings = Augmentation(
        **dict.fromkeys(CHANGES, 1.0), crop_side=0.5, cutout_side=0.3, downscale_side=0.1
    )
    changes = {name: c.value_Bn for name, c in draw(settings, 3, 1, IDS, 112).changes.items()}
    for name, low, high in (("crop", 56, 112), ("cutout", 1, 34)):
        top, left, bottom, right = changes[name].T
        assert (bottom - top).min() == low
        assert (bottom - top).max() == high
        np.testing.assert_array_equal(bottom - top, right - left)
        assert min(top.min(), left.min()) == 0
        assert max(bottom.max(), right.max()) == 112
    ranges = {"rotate": (-15, 15), "blur": (0.1, 2), "downscale": (11, 112), "jpeg": (20, 95)}
    for name, (low, high) in ranges.items():
        values = changes[name]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)
    np.testing.assert_allclose(changes["colour"].min(0), [0.7, 0.7, 0.7, -13.5], rtol=0.01)
    np.testing.assert_allclose(changes["colour"].max(0), [1.3, 1.3, 1.3, 13.5], rtol=0.01)
