"""Which face is taken, how it is cut out, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from partialfc.alignment import aligner as module
from partialfc.alignment.aligner import Aligner, chosen, sharpness
from partialfc.alignment.boxes import Faces
from partialfc.alignment.crop import TEMPLATE, align, crop_side, similarity
from partialfc.alignment.landmarks import read_landmarks, write_landmarks
from partialfc.alignment.mean_face import eye_contrast, unaligned
from tools._faces.packs import render


def turned(points, degrees, scale, shift):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T * scale + np.asarray(shift)


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1), (25, 1.7), (-140, 6.3), (10, 0.4)])
def test_the_points_of_a_face_go_to_their_places_at_any_size(degrees, scale):
    """Dots at the points, however large: in the crop they are at the template, to half a pixel."""
    points = turned(TEMPLATE, degrees, scale, (0, 0))
    points += 20 * scale - points.min(0)
    size = np.ceil(points.max(0) + 20 * scale).astype(int)
    y, x = np.mgrid[: size[1], : size[0]]
    for size_out in (112, 64):
        for number, (px, py) in enumerate(points):
            dot = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * max(2 * scale, 1) ** 2)) * 255
            cut = align(dot.astype(np.uint8)[:, :, None].repeat(3, 2), points, size=size_out)
            weight = cut[:, :, 0].astype(float)
            rows, columns = np.mgrid[:size_out, :size_out]
            middle = np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()
            wanted = (TEMPLATE[number] + 0.5) * size_out / 112 - 0.5
            assert np.abs(middle - wanted).max() < 0.5, (number, size_out)


def test_a_large_face_has_no_pattern_that_is_not_there():
    """Stripes finer than a pixel of the crop become grey; single pixels alone would be stripes."""
    scale = 8
    stripes = np.zeros((112 * scale, 112 * scale, 3), np.uint8)
    stripes[:, ::3] = 255
    points = (TEMPLATE + 0.5) * scale - 0.5
    middle = align(stripes, points)[8:-8, 8:-8].astype(float)
    assert middle.std() < 16
    assert align(stripes, points, smooth=False)[8:-8, 8:-8].std() > 50


def test_a_render_comes_back_from_any_pose():
    face = render(np.arange(1), np.zeros(1, np.int64), seed=3)[0]
    large = np.asarray(Image.fromarray(face).resize((336, 336), Image.Resampling.BICUBIC))
    photo = np.zeros((600, 700, 3), np.uint8)
    photo[100:436, 200:536] = large
    points = (TEMPLATE + 0.5) * 3 - 0.5 + [200, 100]
    turn = Image.fromarray(photo).rotate(-30, Image.Resampling.BICUBIC, center=(350.5, 300.5))
    moved = turned(points - [350, 300], 30, 1, (350, 300))
    back = align(np.asarray(turn), moved)
    assert np.abs(back[10:-10, 10:-10].astype(int) - face[10:-10, 10:-10]).mean() < 6
    assert crop_side(moved) == pytest.approx(336, rel=1e-6)
    assert np.hypot(*similarity(moved)[:, 0]) == pytest.approx(1 / 3)


FOUND = Faces(
    np.array([[0.0, 0, 40, 40], [45, 45, 65, 65], [70, 70, 100, 100]]),
    np.array([0.99, 0.98, 0.97]),
    np.stack([TEMPLATE * s / 112 + s for s in (40, 20, 30)]),
)


@pytest.mark.parametrize(
    ("choice", "taken"), [("largest", [0]), ("central", [1]), ("all", [0, 1, 2])]
)
def test_which_face_is_taken_is_a_rule(choice, taken):
    assert chosen(FOUND, choice, 110, 110) == taken


def test_what_is_refused_is_told(monkeypatch):
    photo = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    monkeypatch.setattr(module, "open_detector", lambda path: lambda pixels: FOUND)
    assert Aligner(face="only")(photo) == ([], ["3 faces, and only one is allowed"])
    taken, reasons = Aligner(face="all")(photo)
    assert len(taken) == 1
    assert taken[0].pixels.shape == (112, 112, 3)
    assert reasons == [f"too small: {n} pixels across, at least 32" for n in (20, 30)]
    assert Aligner(face="all", size=64, smallest=25).one(photo).shape == (64, 64, 3)
    none = Faces(np.empty((0, 4)), np.empty(0), np.empty((0, 5, 2)))
    monkeypatch.setattr(module, "open_detector", lambda path: lambda pixels: none)
    with pytest.raises(ValueError, match="no face found"):
        Aligner().one(photo)
    smooth = np.tile(np.arange(112, dtype=np.uint8)[:, None, None], (1, 112, 3))
    with pytest.raises(ValueError, match=r"blurred: sharpness 0\.\d, at least 5"):
        Aligner().one(smooth, TEMPLATE[None])
    with pytest.raises(ValueError, match="no landmarks given"):
        Aligner().one(photo, np.empty((0, 5, 2)))
    assert sharpness(photo) > 5


def test_landmarks_come_back_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "points.txt"
    write_landmarks(path, [("a b/1.jpg", TEMPLATE), ("2.jpg", TEMPLATE + 1), ("2.jpg", TEMPLATE)])
    found = read_landmarks(path)
    assert list(found) == ["a b/1.jpg", "2.jpg"]
    np.testing.assert_allclose(found["2.jpg"], [TEMPLATE + 1, TEMPLATE], atol=0.01)
    for line in ("a.jpg 1 2 3", "a.jpg 1 2 3 4 5 6 7 8 9 nan"):
        path.write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=r"points\.txt, line 2: must be a name and ten"):
            read_landmarks(path)


def test_the_mean_face_tells_aligned_images_from_others():
    """Rendered faces in their own frame, in a corner or at the edge of a wider one, and shaken."""
    faces = render(np.arange(32), np.zeros(32, np.int64), seed=5, size=56).astype(float)
    grey = np.stack([np.asarray(Image.fromarray(f.mean(2).astype(np.uint8)).resize((112, 112)))
                     for f in faces]).astype(float)  # fmt: skip
    assert eye_contrast(grey.mean(0)) > 0.5
    assert unaligned(grey.mean(0), 32) is None
    corner, low = (
        np.pad(faces.mean((0, 3)), pad, mode="mean")
        for pad in (((0, 56), (0, 56)), ((56, 0), (28, 28)))
    )
    shaken = np.mean([np.roll(f, (37 * i, 53 * i), (0, 1)) for i, f in enumerate(grey)], 0)
    for mean in (corner, low, shaken, np.full((112, 112), 9.0)):
        assert "partialfc align cuts faces out" in unaligned(mean, 32)
        assert unaligned(mean, 3) is None, "too few to say"
