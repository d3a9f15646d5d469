"""Random changes to an image that are functions of (seed, epoch, sample id), not of a generator.

So an image is changed in the same way on any rank, with any loader and after any resume. The
functions here say what happens to each image; the loaders do it.

Shape suffix: B = images of one rank's batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.permutation import key, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What may happen to an image of training, in this order, after it has its final size.

    Attributes:
        shift: Largest translation, in pixels of the final image, >= 0. Each axis moves by a uniform
            integer in [-shift, shift]; the border is filled with the image's outermost pixels.
        flip: Probability of mirroring left and right, in [0, 1].

    Raises:
        ValueError: If a value is outside its range.
    """

    shift: int = 0
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"data.shift must be >= 0 pixels, got {self.shift}.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is a probability, must be in [0, 1], got {self.flip}.")


class Draw(NamedTuple):
    """What happens to each image of a batch.

    Attributes:
        shift_x_B: int64 pixels to the right, negative to the left.
        shift_y_B: int64 pixels down, negative up.
        flip_B: bool, mirror the shifted image left and right.
    """

    shift_x_B: NDArray[np.int64]
    shift_y_B: NDArray[np.int64]
    flip_B: NDArray[np.bool_]


def draw(augmentation: Augmentation, seed: int, epoch: int, sample_id_B: NDArray[np.int64]) -> Draw:
    """Return what happens to each image [B] in one epoch of the run with this seed."""
    side = 2 * augmentation.shift + 1

    def number(purpose: str) -> NDArray[np.float64]:
        return uniform(sample_id_B, key(seed, purpose, epoch))

    return Draw(
        shift_x_B=(number("shift_x") * side).astype(np.int64) - augmentation.shift,
        shift_y_B=(number("shift_y") * side).astype(np.int64) - augmentation.shift,
        flip_B=number("flip") < augmentation.flip,
    )
