"""Which way up an image is: the orientation of EXIF, as cameras that are held sideways write it.

Pixels are stored as the sensor saw them, and a number from 1 to 8 says how they are to be turned.
"""

import struct

import numpy as np
from numpy.typing import NDArray

UPRIGHT = 1
ORIENTATION = 0x0112
"""The tag of the orientation."""

_NUMBERS = {3: "H", 4: "I"}  # a short, as the standard has it, or a long


def orientation_of(exif: bytes) -> int:
    """Return the orientation, 1 to 8, that a block of EXIF says; 1 if it says none that is valid.

    Args:
        exif: The TIFF structure, which begins with ``II`` or ``MM``.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return UPRIGHT
    (at,) = struct.unpack_from(order + "I", exif, 4)
    if at + 2 > len(exif):
        return UPRIGHT
    (entries,) = struct.unpack_from(order + "H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
        if tag == ORIENTATION:
            if kind not in _NUMBERS or count != 1:
                return UPRIGHT
            (value,) = struct.unpack_from(order + _NUMBERS[kind], exif, entry + 8)
            return value if 1 <= value <= 8 else UPRIGHT
    return UPRIGHT


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return pixels [height, width, 3] as they are to be seen; contiguous, a copy if turned."""
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)
