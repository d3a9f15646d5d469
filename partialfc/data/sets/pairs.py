"""Verification sets: pairs of images, and whether both show the same identity.

The files are the LFW-style ``.bin`` of the field: a pickle of (bins, issame), where images 2i and
2i + 1 are pair i. A pickle can run any program, so they are read by the machine of
pickle_machine.py and never by an unpickler.
"""

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from partialfc.data.sets.pickle_machine import PairsError, run
from partialfc.data.sets.pickle_stubs import Array
from partialfc.writing import atomic_write

__all__ = ["Image", "Pairs", "PairsError", "read_pairs", "write_pairs"]

Image = bytes | np.ndarray
"""A JPEG or PNG file, or read-only uint8 [H, W, 3] of any strides, RGB."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """A verification set.

    Attributes:
        images: 2n images; pair i is images 2i and 2i + 1.
        same: Whether both images of pair i show the same identity; bool [n].
    """

    images: Sequence[Image]
    same: np.ndarray


def read_pairs(path: str | Path) -> Pairs:
    """Read an LFW-style ``.bin``, written by Python 2 or 3 at any protocol from 0 to 5.

    Memory is proportional to the file, whatever the file says, and nothing in it is run.

    Raises:
        PairsError: If the file is damaged, does anything but make images and bools, or does not
            have two images for every bool.
        OSError: If the file cannot be read.
    """
    name = str(path)
    with Path(path).open("rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PairsError(f"{name}: not a regular file; give the path of a .bin.")
        value = run(stream, status.st_size, name)
    match value:
        case (list() | tuple() as bins, list() | tuple() | Array() as issame):
            same = _same(issame, name)
        case _:
            raise PairsError(f"{name}: the pickle must be (bins, issame), two sequences.")
    _require_two_images_per_pair(len(bins), len(same), name)
    return Pairs([_image(item, index, name) for index, item in enumerate(bins)], same)


def write_pairs(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write JPEG or PNG images as an LFW-style ``.bin`` (pickle protocol 3); all of it or nothing.

    Args:
        path: Replaced if it exists.
        images: 2n JPEG or PNG files; pair i is images 2i and 2i + 1.
        same: Whether both images of pair i show the same identity; n of them.

    Raises:
        PairsError: If the numbers do not match, or an image is no JPEG or PNG of less than 4 GiB.
        OSError: If the file cannot be written.
    """
    target = Path(path)
    _require_two_images_per_pair(len(images), len(same), str(path))
    with atomic_write(target) as partial, partial.open("wb") as file:
        file.write(b"\x80\x03](")  # PROTO 3, EMPTY_LIST, MARK
        for index, image in enumerate(images):
            if not _is_image(image) or len(image) >= 1 << 32:
                raise _not_an_image(image, index, str(path))
            file.write(struct.pack("<cI", b"B", len(image)))  # BINBYTES
            file.write(image)
        file.write(b"e](")  # APPENDS, EMPTY_LIST, MARK
        file.write(b"".join(b"\x88" if pair else b"\x89" for pair in same))
        file.write(b"e\x86.")  # APPENDS, TUPLE2, STOP
        file.flush()
        os.fsync(file.fileno())


def _require_two_images_per_pair(num_images: int, num_pairs: int, name: str) -> None:
    if num_images != 2 * num_pairs or num_pairs == 0:
        raise PairsError(
            f"{name}: {num_images} images for {num_pairs} pairs, where each pair needs two and "
            "there must be one pair; the file is incomplete, or is not a verification set."
        )


def _same(issame: list[object] | tuple[object, ...] | Array, name: str) -> np.ndarray:
    if isinstance(issame, Array):
        values = issame.values
        if values is None or values.ndim != 1 or not _are_bits(values):
            raise PairsError(
                f"{name}: an array of issame must be [n] of bools, or of integers 0 and 1."
            )
        return np.asarray(values == 1)
    for index, item in enumerate(issame):
        if not isinstance(item, int) or item not in (0, 1):
            seen = item if isinstance(item, int) else type(item).__name__
            raise PairsError(f"{name}: issame[{index}] is {seen}, must be a bool, or 0 or 1.")
    return np.array(issame, dtype=np.bool_)


def _are_bits(values: np.ndarray) -> bool:
    """Whether all are 0 or 1; a bool of a file may be any byte."""
    number = values.view(np.uint8) if values.dtype == np.bool_ else values
    return bool(((number == 0) | (number == 1)).all())


def _image(item: object, index: int, name: str) -> Image:
    """Return the bytes of a JPEG or PNG, or the pixels of an array, without a copy."""
    if isinstance(item, Array) and item.values is not None and item.values.dtype == np.uint8:
        if item.values.ndim == 3 and item.values.size:
            return item.values
        item = item.data
    if _is_image(item):
        return item
    raise _not_an_image(item, index, name)


def _is_image(item: object) -> TypeGuard[bytes]:
    return isinstance(item, bytes) and item.startswith((b"\xff\xd8", b"\x89PNG\r\n\x1a\n"))


def _not_an_image(item: object, index: int, name: str) -> PairsError:
    seen = f"{len(item)} bytes" if isinstance(item, bytes) else type(item).__name__
    start = f" beginning with {item[:4].hex()}" if isinstance(item, bytes) else ""
    return PairsError(
        f"{name}: image {index} is {seen}{start}; it must be a JPEG (beginning with ffd8), a "
        "PNG (89504e47) or uint8 [H, W, 3]; encode the image so and write the set anew."
    )
