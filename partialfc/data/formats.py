"""The images that are trained on: JPEG and PNG files, told apart by their first bytes.

A PNG of up to 8 bits per sample passes, of any colour type; transparency is not looked at. Like a
JPEG's, its headers are read before a decoder allocates a byte.
"""

import struct
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.data import jpeg
from partialfc.data.jpeg import MAX_BYTES, MAX_PIXELS, Frame, check_jpeg

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CHECKSUM = 4
_HEADER = struct.Struct(">IIBB")
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
    return _check_png(view) if _is_png(view) else check_jpeg(view)


def decode_image(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the RGB pixels [height, width, 3] of an image that :func:`check_image` lets pass.

    They are the same as DALI's on the CPU.

    Raises:
        ValueError: If the image cannot be decoded.
    """
    if not _is_png(view):
        return jpeg.decode(view)
    try:
        with Image.open(BytesIO(view.tobytes()), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything on a broken chunk
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _is_png(view: NDArray[np.uint8]) -> bool:
    return view[:8].tobytes() == _SIGNATURE


def _check_png(view: NDArray[np.uint8]) -> Frame:
    """Walk from chunk to chunk: one header, which comes first, and the end must be there."""
    if len(view) > MAX_BYTES:
        raise _refusal(f"the PNG has {len(view)} bytes, at most {MAX_BYTES} are allowed")
    frame, at = None, len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + _CHUNK.size + _CHECKSUM > len(view):
            raise _refusal("the PNG is truncated: it has no end marker")
        length, kind = _CHUNK.unpack_from(view.data, at)
        if frame is None:
            if kind != b"IHDR" or length < _HEADER.size or at + 21 > len(view):
                raise _refusal("the PNG does not begin with its header")
            frame = _read_header(view, at + _CHUNK.size)
        elif kind == b"IHDR":  # decoders go by the last one, which is of any size
            raise _refusal("the PNG has a second header")
        if kind == b"IEND":
            return frame
        at += _CHUNK.size + length + _CHECKSUM
    raise _refusal(f"the PNG has more than {_MAX_CHUNKS} chunks")


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
