"""The images that are trained on: JPEG and PNG files, told apart by their first bytes.

A PNG of up to 8 bits per sample passes, of any colour type; transparency is not looked at. Like a
JPEG's, its headers are read before a decoder allocates a byte.
"""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.data.images import jpeg
from partialfc.data.images.jpeg import MAX_BYTES, MAX_PIXELS, Frame, check_jpeg

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
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


def check_image(view: NDArray[np.uint8]) -> Frame:
    """Return what the headers of a JPEG or a PNG say, or refuse it before it is decoded.

    Args:
        view: uint8 [bytes], the whole file.

    Raises:
        ValueError: If it is neither, is truncated, is of a kind that is not decoded, or is larger
            than it may be.
    """
    return _check_png(view) if is_png(view) else check_jpeg(view)


def decode_image(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the RGB pixels [height, width, 3] of an image that :func:`check_image` lets pass.

    They are the same as DALI's on the CPU.

    Raises:
        ValueError: If the image cannot be decoded.
    """
    if not is_png(view):
        return jpeg.decode(view)
    try:
        with Image.open(BytesIO(view.tobytes()), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything on a broken chunk
        raise ValueError(f"{type(error).__name__}: {error}") from None


def is_png(view: NDArray[np.uint8]) -> bool:
    """Whether the bytes of an image are a PNG's, by the first eight."""
    return view[:8].tobytes() == _SIGNATURE


def _check_png(view: NDArray[np.uint8]) -> Frame:
    """One header, which comes first, and an end; nothing that not every decoder takes."""
    if len(view) > MAX_BYTES:
        raise _refusal(f"the PNG has {len(view)} bytes, at most {MAX_BYTES} are allowed")
    frame, seen = None, set()
    for kind, at, length in _chunks(view):
        if frame is None:
            if kind != b"IHDR" or length != _HEADER_BYTES:
                raise _refusal("the PNG does not begin with its header")
            frame = _read_header(view, at)
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
        if kind == b"IEND":
            return frame
        seen.add(kind)
    raise _refusal(f"the PNG has more than {_MAX_CHUNKS} chunks")


def _chunks(view: NDArray[np.uint8]) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, where its bytes begin and how many they are; all are there."""
    at = len(_SIGNATURE) + _CHUNK.size
    for _ in range(_MAX_CHUNKS):
        fits = at + _CRC.size <= len(view)
        length, kind = _CHUNK.unpack_from(view.data, at - _CHUNK.size) if fits else (0, b"")
        if not fits or at + length + _CRC.size > len(view):
            raise _refusal("the PNG is truncated: it has no end marker")
        yield kind, at, length
        at += length + _CRC.size + _CHUNK.size


def _read_header(view: NDArray[np.uint8], at: int) -> Frame:
    width, height, bits, colour = _HEADER.unpack_from(view.data, at)
    if bits > 8 or colour not in _COMPONENTS:
        raise _refusal(f"the PNG has {bits} bits per sample and colour type {colour}")
    if not 0 < height * width <= MAX_PIXELS:
        raise _refusal(
            f"the PNG claims {width} x {height} pixels, must be between 1 and {MAX_PIXELS}"
        )
    return Frame(height, width, _COMPONENTS[colour])


def _refusal(problem: str) -> ValueError:
    return ValueError(f"{problem}. {_REMEDY}")
