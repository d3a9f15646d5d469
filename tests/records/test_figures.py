import numpy as np
import pytest
from PIL import Image

from partialfc.records.figures import training_figure

STEPS = np.arange(1, 201)
LOSSES = 20 * np.exp(-STEPS / 60) + 2
SAME = np.arange(400) % 2 == 0
SCORES = np.where(SAME, 0.7, 0.05) + np.random.default_rng(0).normal(0, 0.12, 400)
BLUE, GREEN, CORAL = (0x25, 0x63, 0xEB), (0x0D, 0x93, 0x73), (0xE0, 0x58, 0x3B)


def pixels_of(path, colour):
    with Image.open(path) as picture:
        assert picture.size == (2400, 820)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=2) < 12).sum())


def test_the_picture_shows_loss_accuracy_scores_and_roc(tmp_path):
    path = tmp_path / "training.png"
    training_figure(path, STEPS, LOSSES, [0, 100, 200], [0.6, 0.9, 0.97], SCORES, SAME)
    for colour in (BLUE, GREEN, CORAL):
        assert pixels_of(path, colour) > 500
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]


def test_without_pairs_the_loss_is_drawn_alone(tmp_path):
    path = tmp_path / "training.png"
    training_figure(path, STEPS, LOSSES, [], [])
    assert pixels_of(path, BLUE) > 500
    assert pixels_of(path, CORAL) == 0


@pytest.mark.parametrize(
    ("steps", "losses", "message"),
    [
        ([], [], "at least one value"),
        ([1, 2], [1.0], "losses must be one per steps"),
        ([1, 2], [1.0, np.nan], r"losses\[1\] is nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_left(steps, losses, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_figure(tmp_path / "a.png", steps, losses, [], [])
    assert not list(tmp_path.iterdir())
