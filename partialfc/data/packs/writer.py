"""Write packs, byte for byte as mxnet 1.9.1 does.

Shape suffix: C = identities.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from partialfc.data.packs.recordio import (
    LABEL_LIMIT,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    PART_HEADER,
    RECORD_HEADER,
)


class PackWriter:
    """Writes ``path`` (a ``.rec``) and the ``.idx`` beside it; a context manager.

    Both are written under temporary names and get their own when the ``with`` block ends, so an
    interrupted write leaves no pack, or the one that was there before. An error in the block
    removes them.

    Raises:
        ValueError: If the path does not end with ``.rec``; from :meth:`write` if keys do not grow,
            a record is too large, or an image's identity is not exact in float32.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != ".rec":
            raise ValueError(f"{self.path}: the name of a pack must end with .rec.")
        self._index_path = self.path.with_suffix(".idx")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._record_file = _temporary(self.path).open("w+b")
        self._index_file = _temporary(self._index_path).open("w", newline="\n", encoding="utf-8")
        self._last_key = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in (self._record_file, self._index_file):
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if kind is not None:
            _temporary(self.path).unlink()
            _temporary(self._index_path).unlink()
            return
        # Stopped between any two of these, the .rec has its own index or none, never another's.
        self._index_path.unlink(missing_ok=True)
        _temporary(self.path).replace(self.path)
        _temporary(self._index_path).replace(self._index_path)

    def write(self, key: int, label: float | Sequence[float], image: bytes = b"") -> None:
        """Append a record.

        Args:
            key: Its number, in [0, 2^63) and larger than the one before.
            label: The identity of the image; or several labels, the identity first.
            image: The JPEG bytes; the header and identity records have none.
        """
        if key <= self._last_key:
            raise ValueError(
                f"{self.path}: key {key} must be larger than the key before it, {self._last_key}."
            )
        offset = self._record_file.tell()
        for part in _parts(self._content(key, label, image)):
            self._record_file.write(part)
        self._index_file.write(f"{key}\t{offset}\n")
        self._last_key = key

    def rewrite_header(self, label: Sequence[float]) -> None:
        """Replace the record of key 0, written first with as many labels, by one with ``label``."""
        self._record_file.seek(0)
        for part in _parts(self._content(0, label, b"")):
            self._record_file.write(part)
        self._record_file.seek(0, os.SEEK_END)

    def _content(self, key: int, label: float | Sequence[float], image: bytes) -> bytes:
        labels = np.asarray(label, "<f4")
        if labels.ndim == 0:
            header = RECORD_HEADER.pack(0, labels, key, 0)
        else:
            header = RECORD_HEADER.pack(labels.size, 0.0, key, 0) + labels.tobytes()
        size = len(header) + len(image)
        if size > MAX_LENGTH:
            raise ValueError(
                f"{self.path}: the record of key {key} is {size} bytes, at most {MAX_LENGTH} fit: "
                f"leave the image out or store it smaller."
            )
        if image and not (0 <= labels.flat[0] < LABEL_LIMIT and labels.flat[0].is_integer()):
            raise ValueError(
                f"{self.path}: label {label} of key {key} must begin with a whole number in "
                f"[0, {LABEL_LIMIT}), where float32 is exact."
            )
        return header + image


def write_insightface_pack(
    path: str | Path, samples: Iterable[tuple[int, bytes]], num_identities: int
) -> None:
    """Write a pack as InsightFace distributes them.

    Key 0 is the header with the labels N + 1 and N + 1 + C; keys 1...N are the images; key
    N + 1 + i is the record of identity i, with its first key and the one after its last as labels.

    Args:
        path: The ``.rec`` to write; the ``.idx`` goes beside it.
        samples: N pairs of identity and JPEG bytes; identities must not decrease.
        num_identities: C, in [1, 2^24]; an identity may have no images.

    Raises:
        ValueError: If an identity is outside [0, C) or smaller than the one before it, there is no
            image or an empty one, or C is out of range.
    """
    if not 0 < num_identities <= LABEL_LIMIT:
        raise ValueError(
            f"{path}: num_identities must be in [1, {LABEL_LIMIT}], where float32 labels are "
            f"exact, got {num_identities}."
        )
    images_C = np.zeros(num_identities, np.int64)
    with PackWriter(path) as writer:
        writer.write(0, (0, 0))
        key, last = 0, 0
        for key, (identity, image) in enumerate(samples, start=1):
            if not last <= identity < num_identities:
                raise ValueError(
                    f"{path}: identity {identity} of image {key - 1} must be in [{last}, "
                    f"{num_identities}): sort the images by identity."
                )
            if not image:
                raise ValueError(f"{path}: image {key - 1} has 0 bytes, must have some.")
            writer.write(key, identity, image)
            images_C[identity] += 1
            last = identity
        if key == 0:
            raise ValueError(f"{path}: no images, must be at least one.")
        end_C = 1 + np.cumsum(images_C)
        for identity in range(num_identities):
            end = int(end_C[identity])
            first = end - int(images_C[identity])
            writer.write(key + 1 + identity, (first, end))
        writer.rewrite_header((key + 1, key + 1 + num_identities))


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _parts(content: bytes) -> Iterator[bytes]:
    """The record's bytes in the file: cut at every magic at an aligned place, without it."""
    start, kind = 0, 0
    at = content.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            kind = 2 if kind else 1
            yield _part(kind, content[start:at])
            start = at + 4
        at = content.find(MAGIC_BYTES, at + 1)
    yield _part(3 if kind else 0, content[start:])


def _part(kind: int, content: bytes) -> bytes:
    return PART_HEADER.pack(MAGIC, kind << 29 | len(content)) + content + bytes(-len(content) % 4)
