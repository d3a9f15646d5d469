"""A face cut out by five landmarks, as arcface's images of 112 x 112 pixels are.

Two eyes, nose and two corners of the mouth go to fixed places by a similarity transform (rotation,
one scale, shift) in the least-squares sense: S. Umeyama, "Least-squares estimation of
transformation parameters between two point patterns", 1991.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
"""Where left eye, right eye, nose, left and right corner of the mouth go: x, y at 112 pixels; left
is left in the image."""

SIZE = 112
"""Side of an aligned face, in pixels."""


def similarity(points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the transform [2, 3] that takes landmarks nearest to their places.

    Args:
        points: [5, 2], x and y in pixels of the image, in the order of ``TEMPLATE``.

    Raises:
        ValueError: If the shape is wrong, a number is not finite, or all points are one.
    """
    source = np.asarray(points, dtype=np.float64)
    if source.shape != (5, 2) or not np.isfinite(source).all():
        raise ValueError(f"landmarks must be [5, 2] and finite, got {source.tolist()}.")
    from_mean, to_mean = source.mean(axis=0), TEMPLATE.mean(axis=0)
    from_zero, to_zero = source - from_mean, TEMPLATE - to_mean
    variance = (from_zero**2).sum()
    if variance < 1e-6:
        raise ValueError("all five landmarks are at one point.")
    left, weight, right = np.linalg.svd(to_zero.T @ from_zero)
    sign = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # no mirror image
    rotation = (left * sign) @ right
    scale = (weight * sign).sum() / variance
    matrix = scale * rotation
    return np.hstack([matrix, (to_mean - matrix @ from_mean)[:, None]])


def align(
    pixels: NDArray[np.uint8],
    points: NDArray[np.floating],
    *,
    size: int = SIZE,
    smooth: bool = True,
) -> NDArray[np.uint8]:
    """Return the aligned face [size, size, 3] of an image [H, W, 3]; outside it is black.

    Bilinear, as OpenCV's warpAffine; single values differ by one or two, for that rounds
    coordinates to 1/32 pixel.

    Args:
        pixels: RGB.
        points: As :func:`similarity`.
        size: Side in pixels; the face fills as much of it as at 112.
        smooth: Average whole blocks of a face that is more than twice as large first; a bilinear
            look at some of its pixels alone would show patterns that are not there. arcface_torch
            does not.

    Raises:
        ValueError: As :func:`similarity`.
    """
    matrix = np.vstack([similarity(points), [0, 0, 1]])
    back = np.linalg.inv(matrix)[:2]
    # Pillow counts from the corner of a pixel, landmarks from its centre.
    back[:, 2] += 0.5 - back[:, :2] @ [0.5, 0.5]
    back[:, :2] *= SIZE / size
    photo = Image.fromarray(pixels)
    block = min(int(crop_side(points) / size), *photo.size)
    if smooth and block > 1:
        photo = photo.reduce(block)
        back /= block
    coefficients = tuple(back.ravel().tolist())
    aligned = np.empty((size, size, 3), np.float32)
    for channel in range(3):  # as floats: on bytes Pillow cuts off instead of rounding
        plane = Image.fromarray(np.asarray(photo)[:, :, channel].astype(np.float32))
        moved = plane.transform(
            (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
        aligned[:, :, channel] = np.asarray(moved)
    return np.rint(aligned).clip(0, 255).astype(np.uint8)


def crop_side(points: NDArray[np.floating]) -> float:
    """Return the side, in pixels of the image, of the square that an aligned face is cut from.

    Raises:
        ValueError: As :func:`similarity`.
    """
    return float(SIZE / np.hypot(*similarity(points)[:, 0]))
