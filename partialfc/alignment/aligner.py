"""From a photo to its aligned faces: find them, choose among them, cut them out.

Shape suffixes: F = faces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.alignment.boxes import Faces
from partialfc.alignment.crop import align, crop_side
from partialfc.alignment.landmarks import Points
from partialfc.alignment.mtcnn import open_mtcnn
from partialfc.alignment.one_shot import open_one_shot

Detector = Callable[[NDArray[np.uint8]], Faces]

CHOICES = ("largest", "central", "only", "all")
"""Which face of a photo is taken; ``only`` takes none where there are several."""
SMALLEST = 32
"""Least side of the square that a face is cut from, in pixels of the photo."""
BLURRED = 5.0
"""Least sharpness of an aligned face; see :func:`sharpness`."""


class Aligned(NamedTuple):
    """One aligned face: pixels [size, size, 3], and its points [5, 2] in the photo."""

    pixels: NDArray[np.uint8]
    points: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligner:
    """How photos are aligned. Another process can be given it: each opens its own detector.

    Attributes:
        detector: An ONNX file of SCRFD or YuNet; ``None`` is MTCNN.
        face: Of ``CHOICES``.
        size: Side of an aligned face, in pixels.
        smallest: A face cut from a square of fewer pixels of the photo is refused.
        blurred: A face that is less sharp is refused.
    """

    detector: Path | None = None
    face: str = "largest"
    size: int = 112
    smallest: float = SMALLEST
    blurred: float = BLURRED

    def __call__(
        self, pixels: NDArray[np.uint8], points: Points | None = None
    ) -> tuple[list[Aligned], list[str]]:
        """Return the faces that are taken of an upright RGB photo [H, W, 3], and why not others.

        Args:
            pixels: The photo.
            points: Of its faces, [F, 5, 2], from elsewhere; then nothing is detected.

        Raises:
            ValueError: If the detector cannot be used.
            ModuleNotFoundError: Without the extra ``align``, if faces are to be found.
        """
        faces = open_detector(self.detector)(pixels) if points is None else _of_points(points)
        if not len(faces):
            return [], ["no face found" if points is None else "no landmarks given"]
        if self.face == "only" and len(faces) > 1:
            return [], [f"{len(faces)} faces, and only one is allowed"]
        taken, reasons = [], []
        for number in chosen(faces, self.face, pixels.shape[1], pixels.shape[0]):
            try:
                taken.append(self._cut(pixels, faces.point_F52[number]))
            except ValueError as error:
                reasons.append(str(error))
        return taken, reasons

    def one(self, pixels: NDArray[np.uint8], points: Points | None = None) -> NDArray[np.uint8]:
        """Return the aligned face of a photo, or of several the first.

        Raises:
            ValueError: If none is taken; the message is the reason. And as a call.
            ModuleNotFoundError: As a call.
        """
        taken, reasons = self(pixels, points)
        if not taken:
            raise ValueError("; ".join(reasons))
        return taken[0].pixels

    def _cut(self, pixels: NDArray[np.uint8], points: NDArray[np.float64]) -> Aligned:
        side = crop_side(points)
        if not side >= self.smallest:
            raise ValueError(f"too small: {side:.0f} pixels across, at least {self.smallest:g}")
        aligned = align(pixels, points, size=self.size)
        sharp = sharpness(aligned)
        if sharp < self.blurred:
            raise ValueError(f"blurred: sharpness {sharp:.1f}, at least {self.blurred:g}")
        return Aligned(aligned, points)


def chosen(faces: Faces, choice: str, width: int, height: int) -> list[int]:
    """Return the numbers of the faces that a choice takes, of at least one."""
    if choice == "all":
        return list(range(len(faces)))
    if choice == "central":
        middle_F2 = (faces.box_F4[:, :2] + faces.box_F4[:, 2:]) / 2
        away_F = np.hypot(*(middle_F2 - np.array([width, height]) / 2).T)
        return [int(away_F.argmin())]
    return [int((faces.box_F4[:, 2:] - faces.box_F4[:, :2]).prod(1).argmax())]


def sharpness(pixels: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of an image's brightness, in squared levels.

    J. L. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000.
    """
    grey = pixels.astype(np.float32).mean(2)
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * middle).var())


@lru_cache(maxsize=4)
def open_detector(path: Path | None) -> Detector:
    """Return the detector of an ONNX file, or MTCNN; in a process it is opened once.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no detector that is known.
        ModuleNotFoundError: Without the extra ``align``.
    """
    return open_mtcnn() if path is None else open_one_shot(path)


def _of_points(point_F52: Points) -> Faces:
    """Faces whose boxes are those around their points."""
    box_F4 = np.hstack([point_F52.min(1), point_F52.max(1)])
    return Faces(box_F4, np.ones(len(point_F52)), point_F52)
