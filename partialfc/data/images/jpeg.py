"""JPEG images: what may be decoded, said from their headers alone, and a decoder for the CPU.

An image of 300 bytes may claim 65,500 x 65,500 pixels, or ask for a thousand passes over them. So
its headers are read before any decoder allocates a byte. What loaders decode as it is stored are
baseline and progressive images of 8 bits with one component (grey) or three.
"""

import struct
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.data.images.exif import UPRIGHT, orientation_of

try:
    from simplejpeg import decode_jpeg, encode_jpeg
except ImportError:  # it has no wheel for this platform
    decode_jpeg = encode_jpeg = None

MAX_PIXELS = 1 << 22
"""Pixels of the largest image that loaders decode, 2048 x 2048; its RGB bytes are 12 MiB."""
MAX_BYTES = 1 << 24
"""Bytes of the largest image that loaders decode."""
MAX_SCANS = 64
"""Scans of the longest progressive image that is decoded; encoders write about 10."""

_MAX_SEGMENTS = 1024
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
START = b"\xff\xd8"
"""The first bytes of every JPEG."""
_END, _SCAN, _APP1 = b"\xff\xd9", 0xDA, 0xE1
_EXIF = b"Exif\0\0"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # without tables and reserved
_DECODED = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_REENCODE = "Encode it again as a baseline RGB JPEG, or leave it out."
_SHRINK = "Make it smaller, or leave it out."
_RENEW = "Copy it again from where it came, or leave it out."


class Frame(NamedTuple):
    """What the headers of an image say.

    Attributes:
        height, width: In pixels, as they are stored.
        components: 1 for grey, 3 for colour, 4 for CMYK.
        orientation: How it is to be turned, 1 to 8; see :mod:`~partialfc.data.images.exif`.
        plain: Whether loaders decode it as it is stored: an upright JPEG or PNG of 8 bits that is
            not large.
    """

    height: int
    width: int
    components: int
    orientation: int = UPRIGHT
    plain: bool = True


class Headers(NamedTuple):
    """A JPEG's frame, its bits per sample, the marker of its coding, and its scans.

    ``scans`` is 1 where a decoder stops after the first.
    """

    frame: Frame
    bits: int
    coding: int
    scans: int


def check_jpeg(view: NDArray[np.uint8]) -> Frame:
    """Return what the headers of a JPEG say, or refuse it before it is decoded.

    Bytes after the image are allowed. What only decoding can tell, damage between the headers and
    the end marker, is not seen here.

    Args:
        view: uint8 [bytes], the whole file.

    Raises:
        ValueError: If it is no JPEG, is truncated, is of a kind that loaders do not decode, or is
            larger than ``MAX_PIXELS``, ``MAX_BYTES`` or ``MAX_SCANS`` allow.
    """
    check_size(view, MAX_BYTES)
    frame, bits, coding, scans = read_headers(view)
    check_kind(bits, coding)
    if frame.components not in (1, 3):
        which = " (CMYK)" if frame.components == 4 else ""
        problem = f"the JPEG has {frame.components} components{which}, must be 1 or 3"
        raise ValueError(f"{problem}. {_REENCODE}")
    check_pixels(frame, scans, MAX_PIXELS)
    return frame


def check_size(view: NDArray[np.uint8], most: int) -> None:
    """Raise ValueError if a file has more bytes than ``most``."""
    if len(view) > most:
        raise ValueError(f"it has {len(view)} bytes, at most {most} are allowed. {_SHRINK}")


def check_kind(bits: int, coding: int) -> None:
    """Raise ValueError for a coding or a depth that libjpeg does not decode to 8 bits."""
    if coding not in _DECODED:
        raise ValueError(
            f"the JPEG's frame marker is ff {coding:02x} (lossless, differential or arithmetic "
            f"coding), must be ff c0, c1 or c2. {_REENCODE}"
        )
    if bits != 8:
        raise ValueError(f"the JPEG has {bits} bits per sample, must be 8. {_REENCODE}")


def check_pixels(frame: Frame, scans: int, most: int) -> None:
    """Raise ValueError for more pixels than ``most``, or more passes over them than are made."""
    if not 0 < frame.height * frame.width <= most:
        raise ValueError(
            f"the JPEG claims {frame.width} x {frame.height} pixels, must be between 1 and {most}. "
            f"{_SHRINK}"
        )
    if scans > MAX_SCANS:
        raise ValueError(
            f"the JPEG has {scans} scans, at most {MAX_SCANS} are allowed. {_REENCODE}"
        )


def read_headers(view: NDArray[np.uint8]) -> Headers:
    """Return what the headers of a JPEG say, whatever they allow.

    Raises:
        ValueError: If it is no JPEG, or is truncated.
    """
    data = view.tobytes()  # indexing bytes is far cheaper than indexing an array
    if data[:2] != START:
        raise _refusal(f"a JPEG begins with the bytes ff d8, these with {data[:2].hex(' ')!r}")
    coding, frame, exif, at = 0, None, None, 2
    for _ in range(_MAX_SEGMENTS):
        if at + _SEGMENT.size > len(data):
            raise _refusal("the JPEG ends inside its headers")
        mark, marker, length = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF:
            raise _refusal(f"byte {at} of the JPEG is {mark:02x}, must be a marker's ff")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _SCAN:
            break
        if marker in _FRAMES:
            if frame is not None:
                raise _refusal("the JPEG has a second frame header")
            if at + _SEGMENT.size + _FRAME.size > len(data):
                raise _refusal("the JPEG ends inside its frame header")
            coding, frame = marker, _FRAME.unpack_from(data, at + _SEGMENT.size)
        elif marker == _APP1 and exif is None and data.startswith(_EXIF, at + _SEGMENT.size):
            exif = data[at + _SEGMENT.size + len(_EXIF) : at + 2 + length]
        at += 2 + length
    else:
        raise _refusal(f"the JPEG has more than {_MAX_SEGMENTS} header segments")
    if frame is None:
        raise _refusal("the JPEG has no frame header before its first scan")
    if data.rfind(_END, at) < 0:
        raise _refusal("the JPEG is truncated: it has no end marker")
    bits, height, width, components = frame
    orientation = UPRIGHT if exif is None else orientation_of(exif)
    scans = 1
    interleaved = data[at + 4 : at + 5] == bytes([components])
    if coding == _PROGRESSIVE or not interleaved:
        # Else a decoder stops after the first scan.
        scans = data.count(bytes([0xFF, _SCAN]), at)
    return Headers(Frame(height, width, components, orientation), bits, coding, scans)


def decode(view: NDArray[np.uint8], side: int = 0) -> NDArray[np.uint8]:
    """Return the RGB pixels [height, width, 3] of a JPEG that :func:`check_jpeg` lets pass.

    The pixels are libjpeg-turbo's, the same as DALI's on the CPU. As there, damage that leaves
    every row decodable is not an error; an EXIF orientation is not applied.

    Args:
        view: uint8 [bytes], the whole file.
        side: If it is not 0, the image is decoded at the smallest of libjpeg's scales, 1/8 to 1,
            at which height and width are at least so many pixels.

    Raises:
        ValueError: If the image cannot be decoded.
    """
    if decode_jpeg is not None:
        small = {"min_height": side, "min_width": side} if side else {}
        pixels: NDArray[np.uint8] = decode_jpeg(view, strict=False, **small)
        return pixels
    try:
        with Image.open(BytesIO(view.tobytes()), formats=["JPEG"]) as image:
            if side:
                image.draft("RGB", (side, side))
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(str(error)) from None


def encode(pixels: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Return RGB pixels [height, width, 3] as a baseline JPEG with chroma at half resolution."""
    pixels = np.ascontiguousarray(pixels)
    if encode_jpeg is not None:
        encoded: bytes = encode_jpeg(pixels, quality=quality, colorsubsampling="420")
        return encoded
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _refusal(problem: str) -> ValueError:
    return ValueError(f"{problem}. {_RENEW}")
