"""Boxes around faces: left, top, right, bottom in pixels, from edge to edge.

Shape suffixes: N = boxes, F = faces.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Faces:
    """What a detector found in one photo, best first.

    Attributes:
        box_F4: Left, top, right, bottom, in pixels of the photo; may reach beyond it.
        score_F: How sure the detector is, in [0, 1].
        point_F52: Left eye, right eye, nose, left and right corner of the mouth: x and y in
            pixels; left is left in the photo.
    """

    box_F4: Array
    score_F: Array
    point_F52: Array

    def __len__(self) -> int:
        return len(self.box_F4)

    def take(self, chosen: NDArray[np.int64]) -> "Faces":
        """Return some of them, in the order of their numbers."""
        return Faces(self.box_F4[chosen], self.score_F[chosen], self.point_F52[chosen])

    def scaled(self, x: float, y: float) -> "Faces":
        """Return them in a photo that is so many times as wide and as high."""
        return Faces(
            self.box_F4 * np.array([x, y, x, y]), self.score_F, self.point_F52 * np.array([x, y])
        )


def apart(
    box_N4: Array, score_N: Array, most: float, *, of_smaller: bool = False, limit: int = 1024
) -> NDArray[np.int64]:
    """Return the boxes that stay when of any two that overlap the better one does; best first.

    Non-maximum suppression: from the best on, a box goes if it overlaps one that stays by more
    than ``most``.

    Args:
        box_N4: Boxes.
        score_N: The higher, the better.
        most: Overlap that two may have, in [0, 1]: intersection over union.
        of_smaller: Intersection over the smaller of the two instead.
        limit: Boxes that may stay; the best ones do.
    """
    order_N = np.argsort(-score_N, kind="stable")
    box_N4 = box_N4[order_N]
    area_N = (box_N4[:, 2:] - box_N4[:, :2]).clip(min=0).prod(1)
    stays_N = np.ones(len(order_N), np.bool_)
    kept: list[int] = []
    for i in range(len(order_N)):
        if not stays_N[i]:
            continue
        kept.append(int(order_N[i]))
        if len(kept) == limit:
            break
        corner, others = box_N4[i], box_N4[i + 1 :]
        shared = np.minimum(corner[2:], others[:, 2:]) - np.maximum(corner[:2], others[:, :2])
        common = shared.clip(min=0).prod(1)
        if of_smaller:
            whole = np.minimum(area_N[i], area_N[i + 1 :])
        else:
            whole = area_N[i] + area_N[i + 1 :] - common
        stays_N[i + 1 :] &= common <= most * whole
    return np.array(kept, np.int64)


def squares(box_N4: Array) -> Array:
    """Return boxes with the same centers whose sides are the longer of each."""
    center_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2
    half_N1 = (box_N4[:, 2:] - box_N4[:, :2]).max(1, keepdims=True) / 2
    return np.hstack([center_N2 - half_N1, center_N2 + half_N1])


def moved(box_N4: Array, offset_N4: NDArray[np.floating]) -> Array:
    """Return boxes whose four edges have moved by so many of their widths and heights."""
    size_N2 = box_N4[:, 2:] - box_N4[:, :2]
    return box_N4 + offset_N4 * np.hstack([size_N2, size_N2])
