"""Lists of records that training leaves out: JSON Lines, one object for each record.

``{"pack": "train.rec", "fingerprint": "0f3c…", "image": 6, "key": 7, "offset": 1234, "problem":
"the JPEG is truncated"}``: ``fingerprint`` and ``image`` say which record of which pack it is, the
rest is for people. ``image`` is null of a record that is no image; an image in a file of its own,
or in a tar shard, has its ``file`` too. ``partialfc validate``,
``partialfc clean`` and training write such lists, and ``data.skip`` reads them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.data.packs.pack import Pack
from partialfc.data.source import Source
from partialfc.writing import atomic_write

_LONGEST_LINE = 1 << 16


class BadRecord(NamedTuple):
    """A record that cannot be used: its image index, if it has one, key, offset, and why.

    ``file`` is the name of the file that an image is in, its own or a shard; "" in a pack.
    """

    image: int | None
    key: int
    offset: int
    problem: str
    file: str = ""

    @classmethod
    def of(cls, pack: Source, image: int, problem: str) -> "BadRecord":
        """Return that one image of a pack has a problem."""
        file = "" if isinstance(pack, Pack) else pack.file_name(image)
        return cls(image, pack.key(image), pack.offset(image), problem, file)

    def line(self, pack: Source) -> str:
        """Return the line of a list that says so of a record of ``pack``."""
        entry = {"pack": pack.path.name, "fingerprint": pack.fingerprint, **self._asdict()}
        if not self.file:
            del entry["file"]
        return json.dumps(entry, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        if self.file:
            at = f", byte {self.offset}" if self.offset else ""
            return f"image {self.image}, {self.file}{at}: {self.problem}"
        image = "no image" if self.image is None else f"image {self.image}"
        return f"{image}, key {self.key}, offset {self.offset}: {self.problem}"


def write_skip_list(path: Path, records: Iterable[tuple[Source, BadRecord]]) -> None:
    """Write a list of records of packs, whole or not at all."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(record.line(pack) for pack, record in records)


def read_skip_lists(paths: Sequence[Path], packs: Sequence[Source]) -> list[NDArray[np.int64]]:
    """Return the listed images of each pack, sorted and unique.

    Raises:
        ValueError: If a line is no such object, is of none of the packs, or names an image that
            the pack does not have.
        OSError: If a list cannot be read.
    """
    number_of = {pack.fingerprint: number for number, pack in enumerate(packs)}
    images: list[list[int]] = [[] for _ in packs]
    for path in paths:
        for line, (fingerprint, image) in enumerate(_entries(path), 1):
            number = number_of.get(fingerprint)
            if number is None:
                raise ValueError(
                    f"{path}: line {line}: fingerprint {fingerprint!r} is of none of the packs, "
                    f"which have {', '.join(number_of)}: the list was made of another pack, or "
                    f"the pack has changed. Run partialfc validate on it again."
                )
            if image is None:
                continue
            if not 0 <= image < len(packs[number]):
                raise ValueError(
                    f"{path}: line {line}: image {image} must be in [0, {len(packs[number])}), "
                    f"the images of {packs[number].path}."
                )
            images[number].append(image)
    return [np.unique(np.asarray(listed, np.int64)) for listed in images]


def _entries(path: Path) -> Iterator[tuple[str, int | None]]:
    with path.open(errors="replace", encoding="utf-8") as file:
        for line, text in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
            try:
                entry = json.loads(text)
                fingerprint, image = entry["fingerprint"], entry["image"]
            except (ValueError, KeyError, TypeError, RecursionError):
                fingerprint = image = False
            if not isinstance(fingerprint, str) or not (image is None or type(image) is int):
                raise ValueError(
                    f"{path}: line {line}: {text[:60]!r} must be a JSON object with the "
                    f'"fingerprint" of a pack and the "image" to leave out, as partialfc validate '
                    f"writes it."
                )
            yield fingerprint, image
