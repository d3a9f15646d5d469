"""JPEG images: what may be decoded, said from their headers alone, and a decoder for the CPU.

An image of 300 bytes may claim 65,500 x 65,500 pixels, or ask for a thousand passes over them. So
its headers are read before any decoder allocates a byte: baseline and progressive images of 8 bits
with one component (grey) or three pass; CMYK, arithmetic coding, 12 bits and lossless are refused.
"""

import struct
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    from simplejpeg import decode_jpeg, encode_jpeg
except ImportError:  # it has no wheel for this platform
    decode_jpeg = encode_jpeg = None

MAX_PIXELS = 1 << 22
"""Pixels of the largest image that is decoded, 2048 x 2048; its RGB bytes are 12 MiB."""
MAX_BYTES = 1 << 24
"""Bytes of the largest JPEG that is decoded."""
MAX_SCANS = 64
"""Scans of the longest progressive image that is decoded; encoders write about 10."""

_MAX_SEGMENTS = 1024
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # without tables and reserved
_DECODED = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_REMEDY = "Encode it again as a baseline RGB JPEG, or leave it out of the pack."


class Frame(NamedTuple):
    """Size of an image in pixels, and its components: 1 for grey, 3 for colour."""

    height: int
    width: int
    components: int


def check_jpeg(view: NDArray[np.uint8]) -> Frame:
    """Return what the headers of a JPEG say, or refuse it before it is decoded.

    Bytes after the image are allowed. What only decoding can tell, damage between the headers and
    the end marker, is not seen here.

    Args:
        view: uint8 [bytes], the whole file.

    Raises:
        ValueError: If it is no JPEG, is truncated, is of a kind that is not decoded, or is larger
            than ``MAX_PIXELS``, ``MAX_BYTES`` or ``MAX_SCANS`` allow.
    """
    if len(view) > MAX_BYTES:
        raise _refusal(f"the JPEG has {len(view)} bytes, at most {MAX_BYTES} are allowed")
    data = view.tobytes()  # indexing bytes is far cheaper than indexing an array
    if data[:2] != _START:
        raise _refusal(f"a JPEG begins with the bytes ff d8, these with {data[:2].hex(' ')!r}")
    kind, frame, at = 0, None, 2
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
            kind, frame = marker, _read_frame(data, at, marker)
        at += 2 + length
    else:
        raise _refusal(f"the JPEG has more than {_MAX_SEGMENTS} header segments")
    if frame is None:
        raise _refusal("the JPEG has no frame header before its first scan")
    if data.rfind(_END, at) < 0:
        raise _refusal("the JPEG is truncated: it has no end marker")
    interleaved = data[at + 4 : at + 5] == bytes([frame.components])
    if kind == _PROGRESSIVE or not interleaved:
        # Else a decoder stops after the first scan.
        scans = data.count(bytes([0xFF, _SCAN]), at)
        if scans > MAX_SCANS:
            raise _refusal(f"the JPEG has {scans} scans, at most {MAX_SCANS} are allowed")
    return frame


def decode(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the RGB pixels [height, width, 3] of a JPEG that :func:`check_jpeg` lets pass.

    The pixels are libjpeg-turbo's, the same as DALI's on the CPU. As there, damage that leaves
    every row decodable is not an error, and an EXIF orientation is not applied.

    Raises:
        ValueError: If the image cannot be decoded.
    """
    if decode_jpeg is not None:
        pixels: NDArray[np.uint8] = decode_jpeg(view, strict=False)
        return pixels
    try:
        with Image.open(BytesIO(view.tobytes()), formats=["JPEG"]) as image:
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


def _read_frame(data: bytes, at: int, marker: int) -> Frame:
    if marker not in _DECODED:
        raise _refusal(
            f"the JPEG's frame marker is ff {marker:02x} (lossless, differential or arithmetic "
            f"coding), must be ff c0, c1 or c2"
        )
    if at + _SEGMENT.size + _FRAME.size > len(data):
        raise _refusal("the JPEG ends inside its frame header")
    bits, height, width, components = _FRAME.unpack_from(data, at + _SEGMENT.size)
    if bits != 8:
        raise _refusal(f"the JPEG has {bits} bits per sample, must be 8")
    if components not in (1, 3):
        which = " (CMYK)" if components == 4 else ""
        raise _refusal(f"the JPEG has {components} components{which}, must be 1 or 3")
    if not 0 < height * width <= MAX_PIXELS:
        raise _refusal(
            f"the JPEG claims {width} x {height} pixels, must be between 1 and {MAX_PIXELS}"
        )
    return Frame(height, width, components)


def _refusal(problem: str) -> ValueError:
    return ValueError(f"{problem}. {_REMEDY}")
