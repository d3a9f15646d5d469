"""Photos of rendered faces that a detector finds, with the points that it should find."""

import numpy as np

from tools._faces.face_code import FACE, SHOT, draw_codes
from tools._faces.painter import paint

STRAIGHT = {
    **dict.fromkeys(("yaw", "pitch", "roll", "shift_x", "shift_y", "noise"), 0.0),
    **dict.fromkeys(("scale", "eye_open"), 1.0),
    "occluder": -1.0,
    "blur": 0.3,
}
"""A shot from the front with nothing before the face."""


def photo(
    person: int,
    image: int = 0,
    *,
    side: int = 160,
    at: tuple[int, int] = (70, 60),
    size: tuple[int, int] = (300, 260),
) -> tuple[np.ndarray, np.ndarray]:
    """Return a grey photo [height, width, 3] with one face, and where its eyes are: [2, 2].

    Args:
        person: Which face, >= 0.
        image: Which photo of it; light and expression are others.
        side: Of the square that is painted with it.
        at: Left and upper edge of the square.
        size: Width and height of the photo.
    """
    number = np.array([person])
    face = {**draw_codes(FACE, number, 2048, "face")[0], "glasses": -1.0}
    shot = {**draw_codes(SHOT, (number << 32) + image, 2048, "shot")[0], **STRAIGHT}
    pixels = np.full((size[1], size[0], 3), 120, np.uint8)
    pixels[at[1] : at[1] + side, at[0] : at[0] + side] = paint(face, shot, size=side, seed=1)
    eyes = [[1 + sign * face["eye_gap"], 1 + face["eye_v"]] for sign in (-1, 1)]
    return pixels, np.array(eyes) * side / 2 - 0.5 + np.array(at)
