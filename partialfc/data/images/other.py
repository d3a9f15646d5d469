"""Images that only Pillow reads: WebP, BMP, TIFF, PGM and PPM, JPEG of four inks, and deep grey.

Samples of more than 8 bits are brought to 0...255 by the depth that they use: of 8, 10, 12, 14 and
16 bits the fewest that hold the largest value of the image. So a 12-bit camera's image in a 16-bit
file is neither black nor white. Floats must be in [0, 1]; anything else is refused.
"""

import struct
import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.data.images.exif import UPRIGHT, orientation_of
from partialfc.data.images.jpeg import Frame

# Our own limit of pixels, which is read from the headers too, stands in its place.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_DEPTHS = (8, 10, 12, 14, 16)
_STARTS = {
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
    "PPM": tuple(b"P%d" % kind for kind in range(1, 7)),
}
_WEBP_EXIF = b"Exif\0\0"
_OTHERS = {b"ftyphei": "HEIC", b"ftypmif1": "HEIC", b"ftypavif": "AVIF", b"GIF8": "GIF"}
_CONVERT = "Convert it to JPEG or PNG, or leave it out."


def check_other(view: NDArray[np.uint8], most_pixels: int) -> Frame:
    """Return what the headers say of an image that is no JPEG and no PNG, or refuse it.

    Raises:
        ValueError: If it is of no format that is read, or too large.
    """
    kind = _format_of(view)
    if kind == "WEBP":  # Pillow has memory for all of it when it opens one
        width, height = _webp_size(view)
        _require_fits(kind, width, height, most_pixels)
    with _opened(view, kind) as image:
        width, height = image.size
        _require_fits(kind, width, height, most_pixels)
        orientation = UPRIGHT
        if kind == "WEBP":  # of a TIFF, Pillow turns the pixels as it loads them
            exif: bytes = image.info.get("exif", b"")
            orientation = orientation_of(exif.removeprefix(_WEBP_EXIF))
    return Frame(height, width, 3, orientation)


def decode_other(view: NDArray[np.uint8], kind: str = "") -> NDArray[np.uint8]:
    """Return the RGB pixels [height, width, 3] of an image; a WebP's are not turned yet.

    Args:
        view: uint8 [bytes], the whole file; its size has been checked.
        kind: What Pillow calls its format; by default it is one of those of ``check_other``.

    Raises:
        ValueError: If it cannot be decoded, or its values are outside their range.
    """
    with _opened(view, kind or _format_of(view)) as image:
        try:
            image.load()
            if image.mode == "F":
                return _grey(_of_floats(np.asarray(image)))
            if image.mode == "I" or image.mode.startswith("I;16"):
                return _grey(_of_integers(np.asarray(image), stated=image.format == "PPM"))
            return np.asarray(image.convert("RGB"))
        except (MemoryError, ValueError):
            raise
        except Exception as error:  # Pillow raises anything on broken bytes
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _opened(view: NDArray[np.uint8], kind: str) -> Image.Image:
    try:
        return Image.open(BytesIO(view.tobytes()), formats=[kind])
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the {kind} cannot be read: {type(error).__name__}: {error}") from None


def _format_of(view: NDArray[np.uint8]) -> str:
    start = view[:16].tobytes()
    for kind, starts in _STARTS.items():
        if start.startswith(starts) and (kind != "WEBP" or start[8:12] == b"WEBP"):
            return kind
    named = [name for mark, name in _OTHERS.items() if mark in start]
    if named:
        raise ValueError(f"{named[0]} images are not read. {_CONVERT}")
    raise ValueError(
        f"it is no image: a JPEG begins with the bytes ff d8, these with {start[:2].hex(' ')!r}; "
        f"PNG, WebP, BMP, TIFF, PGM and PPM are read too. {_CONVERT}"
    )


def _webp_size(view: NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height of a WebP, by the header of its first chunk."""
    head = view[12:30].tobytes().ljust(18, b"\0")
    if head.startswith(b"VP8X"):
        return (
            int.from_bytes(head[12:15], "little") + 1,
            int.from_bytes(head[15:18], "little") + 1,
        )
    if head.startswith(b"VP8L"):
        bits = int.from_bytes(head[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", head, 14)
    return width & 0x3FFF, height & 0x3FFF


def _require_fits(kind: str, width: int, height: int, most_pixels: int) -> None:
    if not 0 < height * width <= most_pixels:
        raise ValueError(
            f"the {kind} claims {width} x {height} pixels, must be between 1 and {most_pixels}. "
            "Make it smaller, or leave it out."
        )


def _of_integers(values: NDArray[np.integer], *, stated: bool) -> NDArray[np.uint8]:
    """Bytes of grey values; ``stated``: the file has said which value is white."""
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= 1 << 16:
        raise ValueError(
            f"its grey values are {lowest} to {highest}, must be in [0, 65535]. Scale them and "
            "write it with 8 bits, or leave it out."
        )
    depth = 16 if stated else next(bits for bits in _DEPTHS if highest < 1 << bits)
    scaled = values.astype(np.float32) * np.float32(255 / ((1 << depth) - 1))
    scaled_bytes: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return scaled_bytes


def _of_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Bytes of floats in [0, 1]."""
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"its grey values are floats from {lowest:g} to {highest:g}, must be in [0, 1]. Scale "
            "them, or leave it out."
        )
    return np.rint(values * 255).astype(np.uint8)


def _grey(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values[:, :, None], 3, axis=2)
