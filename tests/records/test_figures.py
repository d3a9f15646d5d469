import numpy as np
import pytest
from PIL import Image

from partialfc.protocols.verification import roc
from partialfc.records import figures
from partialfc.records.figures import training_figure

STEPS = np.arange(1, 201)
LOSSES = 20 * np.exp(-STEPS / 60) + 2
SAME = np.arange(400) % 2 == 0
SCORES = np.where(SAME, 0.7, 0.05) + np.random.default_rng(0).normal(0, 0.12, 400)
BLUE, GREEN, CORAL = (0x25, 0x63, 0xEB), (0x0D, 0x93, 0x73), (0xE0, 0x58, 0x3B)


def pixels_of(path, colour):
    with Image.open(path) as picture:
        assert picture.size in ((1440, 1280), (1440, 680))
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


def drawn(monkeypatch, accuracies=(0.6, 0.9, 0.97), **more):
    """The axes of the picture by title; its layout is done."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    training_figure("a.png", STEPS, LOSSES, [0, 100, 200], accuracies, SCORES, SAME, **more)
    kept[0].draw_without_rendering()
    return {axes.get_title(loc="left") or axes.get_ylabel(): axes for axes in kept[0].axes}


def test_no_number_beside_an_axis_is_rounded(monkeypatch):
    """A tick at 72.5 % was called 73 %, and the ticks stood unevenly: 80, 78, 75, 73."""
    for accuracies in ((0.627, 0.784, 0.796), (0.9712, 0.9735, 0.9741)):
        axes = drawn(monkeypatch, accuracies)["verification accuracy"]
        ticks = dict(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True))
        shown = [float(text.get_text().removesuffix(" %")) for text in ticks.values()]
        np.testing.assert_allclose(shown, [100 * tick for tick in ticks], rtol=1e-9)
        assert len(shown) >= 3


def test_every_line_is_named_and_no_name_hides_what_is_drawn(monkeypatch):
    random = np.random.default_rng(1).normal(0, 0.1, 400)
    panels = drawn(monkeypatch, untrained=roc(random, SAME)[:2])
    scores, curve = panels["Verification pairs"], panels["ROC"]
    words = {
        axes: [t.get_text() for t in axes.get_legend().get_texts()] for axes in (scores, curve)
    }
    (threshold,) = (line.get_xdata()[0] for line in scores.lines)
    assert words[scores] == ["same", "different", f"threshold {threshold:.2f}"]
    assert words[curve] == ["trained", "at step 0"]
    assert curve.get_xlabel() == "false accept rate (log scale)"
    for axes in (scores, curve):
        legend, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y0 > inside.y1 - 1, axes.get_title(loc="left")
        assert legend.x1 < axes.figure.bbox.x1
    assert scores.get_legend().get_window_extent().x1 < curve.get_window_extent().x0


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
