"""Any image file as upright RGB pixels: one rule for training, packing, embedding and measuring.

JPEG, PNG, WebP, BMP, TIFF, PGM and PPM are told apart by their first bytes, whatever a file is
called, and are turned as their EXIF says. Headers are read, and limits applied, before a decoder
allocates a byte. Transparency is not looked at; of several pictures in a file the first is taken.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.data.images import jpeg
from partialfc.data.images.exif import UPRIGHT, upright
from partialfc.data.images.jpeg import MAX_BYTES, MAX_PIXELS, Frame, check_size
from partialfc.data.images.other import check_other, decode_other
from partialfc.data.images.png import SIGNATURE, check_png

MOST_PIXELS = 1 << 28
"""Pixels of the largest JPEG that is read, 268 million: libjpeg decodes it at a smaller scale."""
MOST_WHOLE_PIXELS = 1 << 27
"""Pixels of the largest image that must be decoded as a whole: no JPEG, progressive, or CMYK."""
MOST_BYTES = 1 << 28
"""Bytes of the largest file that is read."""

_MOST_PASSES = 1 << 31  # pixels times the scans of a progressive image
_LARGE = 1 << 25  # pixels, whose decoder may need 128 MiB
_one_large = threading.Lock()


def check_image(view: NDArray[np.uint8]) -> Frame:
    """Return what the headers of an image say, or refuse it before it is decoded.

    Args:
        view: uint8 [bytes], the whole file.

    Raises:
        ValueError: If it is of no format that is read, is truncated, or is larger than it may be.
    """
    if not len(view):
        raise ValueError("the file is empty. Copy it again from where it came, or leave it out.")
    check_size(view, MOST_BYTES)
    if view[:2].tobytes() == jpeg.START:
        frame, bits, coding, scans = jpeg.read_headers(view)
        jpeg.check_kind(bits, coding)
        plain = frame.components in (1, 3)
        if not plain and frame.components != 4:
            raise ValueError(
                f"the JPEG has {frame.components} components, must be 1, 3 or 4. Encode it again "
                "as a baseline RGB JPEG, or leave it out."
            )
        whole = scans > 1 or not plain
        jpeg.check_pixels(frame, scans, MOST_WHOLE_PIXELS if whole else MOST_PIXELS)
        if scans * frame.height * frame.width > _MOST_PASSES:
            raise ValueError(
                f"the JPEG asks for {scans} passes over {frame.width} x {frame.height} pixels, "
                f"at most {_MOST_PASSES} pixels are passed over. Encode it again as a baseline "
                "JPEG, or leave it out."
            )
    elif is_png(view):
        frame, bits = check_png(view, MOST_WHOLE_PIXELS)
        plain = bits <= 8
    else:
        frame, plain = check_other(view, MOST_WHOLE_PIXELS), False
    if plain and frame.orientation == UPRIGHT and _is_small(view, frame):
        return frame
    return frame._replace(plain=False)


def decode_image(view: NDArray[np.uint8], side: int = 0) -> NDArray[np.uint8]:
    """Return the upright RGB pixels [height, width, 3] of an image.

    Those of a JPEG or PNG are the same as DALI's on the CPU.

    Args:
        view: uint8 [bytes], the whole file.
        side: Pixels that the shorter side is needed with, 0 for all that there are. A JPEG of more
            than ``MAX_PIXELS`` pixels is decoded smaller, with twice as many at least.

    Raises:
        ValueError: As :func:`check_image`, and if the image cannot be decoded.
    """
    frame = check_image(view)
    with _alone_if_large(frame):
        if view[:2].tobytes() != jpeg.START:
            pixels = decode_other(view, "PNG" if is_png(view) else "")
        elif frame.components == 4:
            pixels = decode_other(view, "JPEG")
        else:
            pixels = jpeg.decode(view, 0 if _is_small(view, frame) else 2 * side)
    return pixels if frame.orientation == UPRIGHT else upright(pixels, frame.orientation)


def decode_plain(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the RGB pixels of an image of which :func:`check_image` said that it is plain.

    Raises:
        ValueError: If it cannot be decoded.
    """
    is_jpeg = view[:2].tobytes() == jpeg.START
    return jpeg.decode(view) if is_jpeg else decode_other(view, "PNG")


def plain_image(view: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return an image that is not plain as a PNG that is: upright, [size, size, 3]; its bytes.

    Raises:
        ValueError: As :func:`decode_image`.
    """
    stored = BytesIO()
    pixels = resize(decode_image(view, size), size)
    Image.fromarray(pixels).save(stored, "PNG", compress_level=1)
    return np.frombuffer(stored.getvalue(), np.uint8)


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] as [size, size, 3]; itself if it is so.

    Bilinear, wider when it shrinks, rounded once at the end, as in DALI.

    Pillow rounds the pixels of an RGB image between its two passes; on planes of floats it does
    not, which is twenty times closer to DALI.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    resized = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        plane = Image.fromarray(pixels[:, :, channel].astype(np.float32))
        resized[:, :, channel] = np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR))
    return np.rint(resized).astype(np.uint8)


def is_png(view: NDArray[np.uint8]) -> bool:
    """Whether the bytes of an image are a PNG's, by the first eight."""
    return view[:8].tobytes() == SIGNATURE


def _is_small(view: NDArray[np.uint8], frame: Frame) -> bool:
    """Whether loaders decode so many pixels and bytes."""
    return frame.height * frame.width <= MAX_PIXELS and len(view) <= MAX_BYTES


@contextmanager
def _alone_if_large(frame: Frame) -> Iterator[None]:
    """So that the memory of several threads is bounded by that of one large image."""
    if frame.height * frame.width <= _LARGE:
        yield
    else:
        with _one_large:
            yield
