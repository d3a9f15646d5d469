"""MTCNN's arithmetic on networks made by hand, and its own networks on a face that is drawn.

The networks made by hand know where the faces are: they answer by the colour of a window.
"""

import numpy as np
import pytest
from PIL import Image

from partialfc.alignment import mtcnn
from partialfc.alignment.boxes import apart, moved, squares
from tests.support.photos import photo

FACE = (40, 24, 88, 72)
"""A white square of 48 pixels: left, top, right, bottom."""


def photo_of(box=FACE, height=110, width=140):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def likeness(batch):
    """How much windows [..., side, side] are a white square with a black frame of a sixth."""
    side = batch.shape[-1]
    square = np.zeros((side, side), np.float32)
    square[side // 6 : -side // 6, side // 6 : -side // 6] = 1
    return 1 - 2 * np.abs(batch - square).mean((-1, -2)).clip(0, 0.5)


def white(batch):
    return ((batch.mean(-1) * 128 + 127.5) / 255).astype(np.float32)


def answer(face, edge, *more):
    face = np.asarray(face, np.float32)
    offsets = np.broadcast_to(np.float32([edge, edge, -edge, -edge]), (*face.shape, 4))
    return [offsets, *more, np.stack([1 - face, face], -1)]


def propose(batch):
    windows = np.lib.stride_tricks.sliding_window_view(white(batch), (12, 12), (1, 2))
    return answer(likeness(windows[:, ::2, ::2]), 0)


def refine(batch):
    assert batch.shape[1:] == (24, 24, 3)
    return answer(likeness(white(batch)), 0)


PLACES = [[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]
"""The points of a window, as parts of its sides."""


def place(batch):
    """The last network takes the frame off."""
    assert batch.shape[1:] == (48, 48, 3)
    points = np.tile(np.float32(PLACES).T.ravel(), (len(batch), 1))
    return answer(likeness(white(batch)), 1 / 6, points)


def test_the_pyramid_is_the_papers():
    """The smallest face is a cell at the first level; areas halve; no level is below a cell."""
    levels = list(mtcnn.pyramid(150, 200))
    assert levels[0] == (90, 120)
    scales = [12 / 20 * 0.709**i for i in range(len(levels) + 1)]
    assert levels == [(int(np.ceil(150 * s)), int(np.ceil(200 * s))) for s in scales[:-1]]
    assert 150 * scales[-2] >= 12 > 150 * scales[-1]
    assert not list(mtcnn.pyramid(19, 400))


def test_a_cell_is_a_window_of_12_pixels_two_apart_column_first():
    face = np.zeros((5, 4))
    face[3, 1] = 0.9
    offsets = np.arange(5 * 4 * 4).reshape(5, 4, 4).astype(float)
    box, offset, score = mtcnn.windows(offsets, face, 0.6)
    assert box.tolist() == [[6, 2, 18, 14]]
    assert offset.tolist() == [offsets[3, 1].tolist()]
    assert score.tolist() == [0.9]


def test_edges_move_by_parts_of_the_sides_and_a_square_keeps_its_center():
    box = np.array([[10.0, 20, 30, 60]])
    assert moved(box, np.array([[0.1, -0.1, 0.5, 0.25]])).tolist() == [[12, 16, 40, 70]]
    assert squares(box).tolist() == [[0, 20, 40, 60]]


def test_of_two_that_overlap_the_better_stays():
    """By union 1/3 and 1/7, by the smaller 1/2 and 1; best first."""
    box = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 10, 70], [90, 90, 99, 99]])
    score = np.array([0.7, 0.9, 0.8, 0.6])
    assert apart(box, score, 0.4).tolist() == [1, 2, 0, 3]
    assert apart(box, score, 0.3).tolist() == [1, 2, 3]
    assert apart(box, score, 0.6, of_smaller=True).tolist() == [1, 2, 3]
    assert apart(box, score, 0.4, limit=2).tolist() == [1, 2]
    assert apart(np.empty((0, 4)), np.empty(0), 0.5).tolist() == []


def test_a_window_is_scaled_and_black_beyond_the_photo():
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (50, 60, 3), np.uint8)
    inside, beyond, far = mtcnn.cut(
        Image.fromarray(pixels),
        np.array([[10.0, 5, 34, 29], [-12, -12, 12, 12], [900, 0, 924, 24]]),
        24,
    )
    assert np.array_equal(inside, pixels[5:29, 10:34])
    assert not beyond[:12].any()
    assert not beyond[:, :12].any()
    assert np.array_equal(beyond[12:, 12:], pixels[:12, :12])
    assert not far.any()


@pytest.mark.parametrize(("scale", "longest"), [(1, 1024), (2, 140), (4, 140)])
def test_the_cascade_finds_the_square_and_its_points(scale, longest, monkeypatch):
    """Also in a photo that is made smaller first: places are those of the photo."""
    monkeypatch.setattr(mtcnn, "LONGEST", longest)
    detector = mtcnn.Mtcnn(propose, refine, place)
    faces = detector(photo_of().repeat(scale, 0).repeat(scale, 1))
    assert len(faces) == 1
    assert faces.score_F[0] > 0.7
    box = faces.box_F4[0]
    assert np.abs(box - np.array(FACE) * scale).max() < 6 * scale
    side = (box[2] - box[0]) * 6 / 4
    corner = box[:2] - side / 6
    np.testing.assert_allclose(faces.point_F52[0], corner + np.array(PLACES) * side, rtol=1e-6)


def test_width_and_height_are_exchanged_for_the_networks_alone():
    """A wide face in a tall photo: an answer that took one for the other would lie outside it."""
    faces = mtcnn.Mtcnn(propose, refine, place)(photo_of((10, 130, 60, 180), 220, 80))
    assert len(faces) == 1
    middle = (faces.box_F4[0, :2] + faces.box_F4[0, 2:]) / 2
    assert np.abs(middle - [35, 155]).max() < 8


def test_nothing_in_a_photo_without_a_face_or_smaller_than_one():
    detector = mtcnn.Mtcnn(propose, refine, place)
    for pixels in (np.zeros((100, 100, 3), np.uint8), np.full((10, 300, 3), 255, np.uint8)):
        faces = detector(pixels)
        assert len(faces) == 0
        assert faces.point_F52.shape == (0, 5, 2)


def test_its_networks_find_the_eyes_of_rendered_faces_where_they_were_painted():
    """Each in a place of its own; axes, colours or points that were exchanged would show."""
    pytest.importorskip("onnxruntime")
    detector = mtcnn.open_mtcnn()
    away, ordered = [], []
    for person in range(16):
        pixels, eyes = photo(person, at=(20 + 7 * person, 80 - 5 * person))
        faces = detector(pixels)
        if len(faces):
            left, right, nose, left_corner, right_corner = faces.point_F52[0]
            away.append(np.abs([left - eyes[0], right - eyes[1]]).max())
            ordered.append(
                left[0] < nose[0] < right[0]
                and left_corner[0] < right_corner[0]
                and max(left[1], right[1]) < nose[1] < min(left_corner[1], right_corner[1])
            )
    assert len(away) >= 13
    assert np.median(away) < 6, "of a face of 160 pixels"
    assert np.mean(ordered) > 0.9
