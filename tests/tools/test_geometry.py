"""tools/geometry.py: the pictures are there, and a margin does to real digits what it promises."""

import json

import pytest

from partialfc.margins import CosFace, NormalizedSoftmax
from tools import geometry


@pytest.mark.slow
def test_a_growing_margin_gathers_real_digits():
    """Held-out digits in three dimensions: the spread falls with the margin."""
    images, digits = geometry.load_digits()
    margins = [NormalizedSoftmax(scale=16), *(CosFace(scale=16, additive=m) for m in (0.2, 0.4))]
    found = [
        geometry.train(margin, 3, images, digits, steps=250, seed=0).numbers for margin in margins
    ]
    spreads = [numbers["spread"] for numbers in found]
    assert spreads[0] > 1.05 * spreads[1] > 1.1 * spreads[2]
    assert all(numbers["accuracy"] > 0.85 for numbers in found)


@pytest.mark.slow
def test_pictures_and_numbers_are_written(tmp_path, monkeypatch, capsys):
    assert geometry.main([str(tmp_path / "out"), "--steps", "2"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "circles.png",
        "spheres.png",
        "angles.png",
        "boundaries.png",
        "geometry.json",
    }
    numbers = json.loads((tmp_path / "out" / "geometry.json").read_text())
    assert set(numbers["3 dimensions"]) == set(geometry.MARGINS)
    assert "nearest class" in capsys.readouterr().out
