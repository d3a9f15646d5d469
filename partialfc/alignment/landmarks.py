"""Five points of each photo in a text file: name, then x and y of five points, in pixels."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.writing import read_text, write_text

Points = NDArray[np.float64]
"""[F, 5, 2]: left eye, right eye, nose, left and right corner of the mouth of each face."""

_MOST_BYTES = 1 << 32


def read_landmarks(path: Path) -> dict[str, Points]:
    """Return the points of the faces of each photo, by the photo's name.

    A line is a name, which may have spaces, and ten numbers; a photo with several faces has several
    lines.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line is not so; the message names it.
    """
    found: dict[str, list[Points]] = {}
    for line, text in enumerate(read_text(path, most=_MOST_BYTES).splitlines(), 1):
        words = text.rsplit(maxsplit=10)
        if not words:
            continue
        try:
            points = np.array(words[1:], dtype=np.float64).reshape(5, 2)
            if not np.isfinite(points).all():
                raise ValueError
        except ValueError:
            raise ValueError(f"{path}, line {line}: must be a name and ten numbers.") from None
        found.setdefault(words[0], []).append(points)
    return {name: np.stack(points) for name, points in found.items()}


def write_landmarks(path: Path, rows: Iterable[tuple[str, Points]]) -> None:
    """Write a line for each face; the points of one, [5, 2], follow its photo's name."""
    lines = (
        f"{name} {' '.join(f'{value:.2f}' for value in points.ravel().tolist())}\n"
        for name, points in rows
    )
    write_text(path, "".join(lines))


def points_of(landmarks: Mapping[str, Points], name: str) -> Points:
    """Return the points [F, 5, 2] of the faces of a photo; none if it has no line."""
    return landmarks.get(name, np.empty((0, 5, 2)))
