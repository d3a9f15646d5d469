"""Whether the mean of many images looks like that of aligned faces: cheap, and told in words.

Aligned faces have their eyes at one place, and so does their mean: two dark spots, with the bridge
of the nose between them and the cheeks below brighter. Photos as they were taken, and crops by a
detector's box, have skin, hair and background everywhere.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.alignment.crop import SIZE, TEMPLATE

DARKER = 0.2
"""Least difference of skin and eyes, in standard deviations of the mean image. Aligned photos have
0.7 (faces seen from the side) to 2.1, and photos as they are -0.7 to -0.4."""
FEWEST = 16
"""Images whose mean says something."""

_RADIUS = 6.0


def eye_contrast(mean: NDArray[np.floating]) -> float:
    """Return how much darker the eyes' places are than the bridge of the nose and the cheeks.

    The darker of these two counts; in standard deviations of the image.

    Args:
        mean: Brightness of the mean image, [H, W], any unit; it is looked at as 112 x 112.
    """
    image = Image.fromarray(mean.astype(np.float32))
    grey = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    left, right = TEMPLATE[0], TEMPLATE[1]
    down = TEMPLATE[3:].mean(0) - TEMPLATE[:2].mean(0)
    eyes = _brightness(grey, left, right)
    bridge = _brightness(grey, (left + right) / 2)
    cheeks = _brightness(grey, left + 0.45 * down, right + 0.45 * down)
    spread = float(grey.std())
    return (min(bridge, cheeks) - eyes) / spread if spread > 1e-6 else 0.0


def unaligned(mean: NDArray[np.floating], images: int) -> str | None:
    """Return what is to be said of images that are plainly not aligned; ``None`` of others.

    Args:
        mean: As :func:`eye_contrast`.
        images: How many it is the mean of.
    """
    contrast = eye_contrast(mean)
    if images < FEWEST or contrast >= DARKER:
        return None
    return (
        f"the mean image has no eyes where aligned faces have them (contrast {contrast:.2f}, at "
        f"least {DARKER}): partialfc align cuts faces out of photos as they are"
    )


def _brightness(grey: NDArray[np.float32], *centers: NDArray[np.floating]) -> float:
    """Mean over a spot around each center."""
    y, x = np.mgrid[:SIZE, :SIZE]
    spots = [grey[(x - cx) ** 2 + (y - cy) ** 2 < _RADIUS**2].mean() for cx, cy in centers]
    return float(np.mean(spots))
