"""PNG images: their headers, read before a decoder allocates a byte.

A PNG is checked chunk by chunk, checksums included, and refused if decoders may differ about it.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from partialfc.data.images.exif import UPRIGHT, orientation_of
from partialfc.data.images.jpeg import Frame

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""

_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")
_HEADER = struct.Struct(">IIBB")
_HEADER_BYTES = 13
_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_ANCILLARY = 0x20
_PALETTE, _COLOUR_AT = 3, 25
_MAX_CHUNKS = 1 << 14
_COMPONENTS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_REMEDY = "Encode it again as an RGB PNG of 8 bits or as a JPEG, or leave it out."
_EXIF = b"eXIf"


def check_png(view: NDArray[np.uint8], most_pixels: int) -> tuple[Frame, int]:
    """Return what the headers of a PNG say and its bits per sample, or refuse it.

    One header, which comes first, and an end; nothing that not every decoder takes.

    Args:
        view: uint8 [bytes], the whole file.
        most_pixels: That it may have.

    Raises:
        ValueError: If it is truncated, damaged, of no kind in the standard, or too large.
    """
    frame, bits, orientation, seen = None, 0, UPRIGHT, set()
    for kind, at, length in _chunks(view):
        if frame is None:
            if kind != b"IHDR" or length != _HEADER_BYTES:
                raise _refusal("the PNG does not begin with its header")
            frame, bits = _read_header(view, at, most_pixels)
        elif kind == b"IHDR":  # decoders go by the last one, which is of any size
            raise _refusal("the PNG has a second header")
        if (
            zlib.crc32(view.data[at - 4 : at + length])
            != _CRC.unpack_from(view.data, at + length)[0]
        ):
            raise _refusal(f"the PNG is damaged: the checksum of its {kind!r} is wrong")
        if kind[0] & _ANCILLARY == 0 and kind not in _CRITICAL:
            raise _refusal(f"the PNG has a chunk {kind!r} that is not in the standard")
        if kind == b"IDAT" and view[_COLOUR_AT] == _PALETTE and b"PLTE" not in seen:
            raise _refusal("the PNG has no palette before its pixels")
        if kind == _EXIF:
            orientation = orientation_of(view.data[at : at + length].tobytes())
        if kind == b"IEND":
            return frame._replace(orientation=orientation), bits
        seen.add(kind)
    raise _refusal(f"the PNG has more than {_MAX_CHUNKS} chunks")


def _chunks(view: NDArray[np.uint8]) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, where its bytes begin and how many they are; all are there."""
    at = len(SIGNATURE) + _CHUNK.size
    for _ in range(_MAX_CHUNKS):
        fits = at + _CRC.size <= len(view)
        length, kind = _CHUNK.unpack_from(view.data, at - _CHUNK.size) if fits else (0, b"")
        if not fits or at + length + _CRC.size > len(view):
            raise _refusal("the PNG is truncated: it has no end marker")
        yield kind, at, length
        at += length + _CRC.size + _CHUNK.size


def _read_header(view: NDArray[np.uint8], at: int, most_pixels: int) -> tuple[Frame, int]:
    width, height, bits, colour = _HEADER.unpack_from(view.data, at)
    if bits > 16 or colour not in _COMPONENTS:
        raise _refusal(f"the PNG has {bits} bits per sample and colour type {colour}")
    if not 0 < height * width <= most_pixels:
        raise ValueError(
            f"the PNG claims {width} x {height} pixels, must be between 1 and {most_pixels}. "
            "Make it smaller, or leave it out."
        )
    return Frame(height, width, _COMPONENTS[colour]), bits


def _refusal(problem: str) -> ValueError:
    return ValueError(f"{problem}. {_REMEDY}")
