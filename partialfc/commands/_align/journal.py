"""What became of each photo, a line for each: a stopped run goes on behind the last one.

The first line says how the faces were made. A line follows when the files of its photo are whole,
so after a kill at most the photos in hand are done again.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from partialfc.alignment.landmarks import Points
from partialfc.writing import opened, write_text

FORMAT = "partialfc align 1"


class Entry(NamedTuple):
    """One photo.

    Attributes:
        photo: Its path below the folder.
        stamp: Size and time of its file, and the landmarks that were given, hashed.
        points: Ten numbers of each face that was cut out.
        rejected: Why others were not.
    """

    photo: str
    stamp: list[int]
    points: list[list[float]]
    rejected: list[str]

    @property
    def files(self) -> list[str]:
        """Paths of its faces below the folder of the aligned ones."""
        return [face_file(self.photo, number) for number in range(len(self.points))]

    @property
    def landmarks(self) -> list[Points]:
        """The points of each face, [5, 2]."""
        return [np.array(ten).reshape(5, 2) for ten in self.points]


def face_file(photo: str, number: int) -> str:
    """Return where a face of a photo is written: ``a.jpg``, of the second face ``a.face2.jpg``.

    All are JPEG; a photo of another format keeps its ending before it, ``a.png.jpg``, because it
    may stand beside an ``a.jpg``.
    """
    path = Path(photo)
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        path = path.with_name(f"{path.name}.jpg")
    if number:
        path = path.with_name(f"{path.stem}.face{number + 1}{path.suffix}")
    return path.as_posix()


def read_journal(path: Path, made: dict[str, Any], out: Path) -> dict[str, Entry]:
    """Return the entries of photos by name; of one that was done twice the later.

    Args:
        path: The file; none is no entries.
        made: How the faces are to be made.
        out: Their folder.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the folder has faces that were made otherwise.
    """
    try:
        descriptor = opened(path, os.O_RDONLY)
    except FileNotFoundError:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"{out} is not empty, and {path} does not say what is in it: choose a new folder."
            ) from None
        return {}
    entries: dict[str, Entry] = {}
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
        first = _read(lines.readline())
        if first != made:
            other = [
                f"{name} {first.get(name)!r}, not {value!r}"
                for name, value in made.items()
                if first.get(name) != value
            ]
            raise ValueError(
                f"{out} was made with {'; '.join(other) or 'other options'}: remove it and {path}, "
                "or choose a new folder."
            )
        for line in lines:
            # A torn line is what a kill left of one.
            with suppress(KeyError, TypeError, ValueError):
                entry = _entry(_read(line))
                entries[entry.photo] = entry
    return entries


def begin(path: Path, made: dict[str, Any]) -> None:
    """Write the first line of a new journal; end the torn last line of one that is there."""
    if not path.exists():
        write_text(path, json.dumps(made) + "\n")
        return
    with path.open("rb+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def append(path: Path, entries: Iterable[Entry]) -> None:
    """Add entries, in one write."""
    text = "".join(json.dumps(entry._asdict()) + "\n" for entry in entries)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _read(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _entry(value: dict[str, Any]) -> Entry:
    points = np.array(value["points"], np.float64).reshape(-1, 10)
    entry = Entry(
        str(value["photo"]),
        [int(number) for number in value["stamp"]],
        points.tolist(),
        [str(reason) for reason in value["rejected"]],
    )
    if not np.isfinite(points).all():
        raise ValueError("no points")
    return entry
