"""Random changes to an image that are functions of (seed, epoch, sample id), not of a generator.

So an image is changed in the same way on any rank, with any loader and after any resume. The
functions here say what happens to each image; the loaders do it.

Shape suffixes: B = images of one rank's batch, n = numbers that a change needs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.definitions.augment import CHANGES, Augment, Probability, Shift
from partialfc.keyed import key, uniform

_BEST_JPEG = 95
_LEAST_BLUR = 0.1
_HUE = 45.0


class Augmentation(Augment):
    """What may happen to an image of training, which in the end has the size S.

    The changes come in the order of ``CHANGES``, then shift and flip; numbers are uniform in their
    range: a square of [crop_side, 1] times the side, anywhere, which is cut out before the image is
    resized to S and so has the detail of the file; then a rotation in either direction; factors in
    [1 - strength, 1 + strength], and a hue of up to 45 degrees times the strength in either
    direction; a blur of [0.1, blur_sigma] pixels; a side in between of [downscale_side, 1] times S;
    a quality in [jpeg_quality, 95]; a grey square of up to cutout_side times S.
    """

    shift: Shift = 0
    """Largest translation; each axis moves by a uniform integer in [-shift, shift], and the border
    is filled with the image's outermost pixels."""

    flip: Probability = 0.5
    """Probability of mirroring left and right."""

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of the changes that may happen."""
        return tuple(name for name in CHANGES if getattr(self, name) > 0)


class Change(NamedTuple):
    """One of ``CHANGES`` for the images of a batch.

    Attributes:
        chosen_B: bool, whether it happens.
        value_Bn: float32, how: of crop and cutout top, left, bottom and right in pixels; of colour
            the factors of brightness, contrast, saturation and the hue in degrees; of grey 0; of
            the others their one number.
    """

    chosen_B: NDArray[np.bool_]
    value_Bn: NDArray[np.float32]


class Draw(NamedTuple):
    """What happens to each image of a batch.

    Attributes:
        shift_x_B: int64 pixels to the right, negative to the left.
        shift_y_B: int64 pixels down, negative up.
        flip_B: bool, mirror the shifted image left and right.
        changes: By name, those that may happen.
    """

    shift_x_B: NDArray[np.int64]
    shift_y_B: NDArray[np.int64]
    flip_B: NDArray[np.bool_]
    changes: dict[str, Change]


def draw(
    augmentation: Augmentation, seed: int, epoch: int, sample_id_B: NDArray[np.int64], size: int
) -> Draw:
    """Return what happens to each image [B] of size S in one epoch of the run with this seed."""
    side = 2 * augmentation.shift + 1

    def number(purpose: str) -> NDArray[np.float64]:
        return uniform(sample_id_B, key(seed, purpose, epoch))

    return Draw(
        shift_x_B=(number("shift_x") * side).astype(np.int64) - augmentation.shift,
        shift_y_B=(number("shift_y") * side).astype(np.int64) - augmentation.shift,
        flip_B=number("flip") < augmentation.flip,
        changes={
            name: Change(
                number(name) < getattr(augmentation, name),
                np.stack(_values(name, augmentation, size, number), 1).astype(np.float32),
            )
            for name in augmentation.changes
        },
    )


def _values(
    name: str, a: Augmentation, size: int, number: Callable[[str], NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """The numbers of a change, each [B]."""

    def between(low: float, high: float, purpose: str) -> NDArray[np.float64]:
        return low + (high - low) * number(f"{name}_{purpose}")

    match name:
        case "crop":
            return _square(np.rint(size * between(a.crop_side, 1, "side")), size, number, name)
        case "cutout":
            largest = max(1.0, a.cutout_side * size)
            return _square(np.ceil(between(0, largest, "side")).clip(1), size, number, name)
        case "rotate":
            return [between(-a.rotate_degrees, a.rotate_degrees, "degrees")]
        case "colour":
            low, high = 1 - a.colour_strength, 1 + a.colour_strength
            factors = [
                between(low, high, part) for part in ("brightness", "contrast", "saturation")
            ]
            hue = _HUE * a.colour_strength
            return [*factors, between(-hue, hue, "hue")]
        case "blur":
            return [between(min(_LEAST_BLUR, a.blur_sigma), a.blur_sigma, "sigma")]
        case "downscale":
            return [np.rint(size * between(a.downscale_side, 1, "side")).clip(1)]
        case "jpeg":
            return [np.rint(between(a.jpeg_quality, _BEST_JPEG, "quality"))]
    return [np.zeros_like(number(name))]  # grey: of the saturation nothing is left


def _square(
    side_B: NDArray[np.float64], size: int, number: Callable[[str], NDArray[np.float64]], name: str
) -> list[NDArray[np.float64]]:
    """Top, left, bottom and right of a square of whole pixels, anywhere in the image."""
    room_B = size - side_B + 1
    top_B = np.floor(number(f"{name}_top") * room_B)
    left_B = np.floor(number(f"{name}_left") * room_B)
    return [top_B, left_B, top_B + side_B, left_B + side_B]
