"""Draws of the augmentation: functions of (seed, epoch, sample id), and of the right frequency."""

import numpy as np
import pytest

from partialfc.data.augment import Augmentation, draw

IDS = np.arange(20_000)


def test_a_draw_belongs_to_the_image_not_to_its_place_or_rank():
    augmentation = Augmentation(shift=4, flip=0.5)
    everything = draw(augmentation, seed=3, epoch=1, sample_id_B=IDS)
    some = np.random.default_rng(0).permutation(IDS)[:100]
    for whole, part in zip(everything, draw(augmentation, 3, 1, some), strict=True):
        np.testing.assert_array_equal(whole[some], part)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_images_are_mirrored_as_often_as_asked(probability):
    flips = draw(Augmentation(flip=probability), 3, 1, IDS).flip_B
    deviation = (probability * (1 - probability) / len(IDS)) ** 0.5
    assert abs(flips.mean() - probability) <= 4 * deviation


def test_shifts_are_uniform_on_both_axes():
    draws = draw(Augmentation(shift=2), 3, 1, IDS)
    for shift_B in (draws.shift_x_B, draws.shift_y_B):
        values, counts = np.unique(shift_B, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        np.testing.assert_allclose(counts / len(IDS), 0.2, atol=4 * (0.2 * 0.8 / len(IDS)) ** 0.5)


def test_no_shift_means_none():
    draws = draw(Augmentation(shift=0), 3, 1, IDS)
    assert not draws.shift_x_B.any()
    assert not draws.shift_y_B.any()


def test_draws_of_axes_epochs_and_seeds_are_independent():
    augmentation = Augmentation(shift=50)
    columns = [
        column.astype(float)
        for seed, epoch in [(3, 1), (3, 2), (4, 1)]
        for column in draw(augmentation, seed, epoch, IDS)
    ]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / len(IDS) ** 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shift": -1}, "data.shift must be >= 0 pixels, got -1"),
        ({"flip": 1.5}, r"data.flip is a probability, must be in \[0, 1\], got 1.5"),
        ({"flip": float("nan")}, "data.flip .* got nan"),
    ],
)
def test_impossible_augmentations_are_refused_by_key(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)
