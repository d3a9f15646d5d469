"""What the pixels of many images say together: swapped channels, crops that are not aligned.

They are hints and no more: a data set of blue people would be one too.

Shape suffixes: S = side of an image in pixels.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.alignment.mean_face import unaligned

_SWAPPED = 2.0
_FLAT = 6.0
_LOPSIDED = 0.8
_BORDER, _BORDERED = 0.2, 0.05


class Look:
    """Sums over images, one at a time."""

    def __init__(self) -> None:
        self.images = 0
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._decoded: Counter[tuple[int, int]] = Counter()
        self._rgb = np.zeros(3)
        self._bordered = self._grey = 0
        self._sums: dict[tuple[int, int], NDArray[np.float64]] = {}

    def add(self, pixels: NDArray[np.uint8], size: tuple[int, int] | None = None) -> None:
        """Take note of an RGB image [height, width, 3], at its ``size`` or a smaller scale."""
        self.images += 1
        self._sizes[size or pixels.shape[:2]] += 1
        size = pixels.shape[:2]
        self._decoded[size] += 1
        self._rgb += pixels.mean((0, 1))
        self._grey += bool((pixels[:, :, 0] == pixels[:, :, 2]).all())
        self._bordered += _black_border(pixels) > _BORDER
        if size in self._sums or len(self._sums) < 4:
            self._sums[size] = self._sums.get(size, 0) + pixels.astype(np.float64)

    def mean(self) -> NDArray[np.float64]:
        """Return the mean [height, width, 3] of the images of the most common size."""
        size = max(self._sums, key=lambda size: self._decoded[size])
        return self._sums[size] / self._decoded[size]

    def numbers(self) -> dict[str, Any]:
        """Return what was seen."""
        mean = self.mean().mean(2)
        flipped = np.corrcoef(mean.ravel(), mean[:, ::-1].ravel())[0, 1] if mean.std() else 1.0
        return {
            "sizes": {f"{w} x {h}": n for (h, w), n in self._sizes.most_common(4)},
            "mean_rgb": [round(float(value), 1) for value in self._rgb / self.images],
            "grey": self._grey / self.images,
            "black_border": self._bordered / self.images,
            "mean_image_contrast": round(float(mean.std()), 2),
            "mean_image_symmetry": round(float(flipped), 3),
        }

    def hints(self, size: int = 112) -> list[str]:
        """Return what looks wrong for aligned faces, in words."""
        numbers, hints = self.numbers(), []
        other = self.images - self._sizes[(size, size)]
        if other:
            hints.append(f"{other / self.images:.1%} of the images are not {size} x {size}")
        red, _, blue = numbers["mean_rgb"]
        if blue > red + _SWAPPED and numbers["grey"] < 1:
            hints.append(
                f"blue is brighter than red on average ({blue:.0f} > {red:.0f}), skin is not: were "
                f"the images written as BGR?"
            )
        if numbers["mean_image_contrast"] < _FLAT:
            hints.append(
                f"the mean image is nearly flat (standard deviation "
                f"{numbers['mean_image_contrast']} levels): the crops are not aligned to each other"
            )
        elif numbers["mean_image_symmetry"] < _LOPSIDED:
            hints.append(
                f"the mean image is not like its mirror image (correlation "
                f"{numbers['mean_image_symmetry']}): the crops are not centered on the face"
            )
        elif hint := unaligned(self.mean().mean(2), max(self._decoded.values())):
            hints.append(hint)
        if numbers["black_border"] > _BORDERED:
            hints.append(
                f"{numbers['black_border']:.1%} of the images are black at their border over more "
                f"than {_BORDER:.0%} of the area: the crops reach beyond the photos"
            )
        return hints

    def save_mean(self, path: Path) -> None:
        """Write the mean image, three times as large."""
        image = Image.fromarray(np.rint(self.mean()).astype(np.uint8))
        image.resize((3 * image.width, 3 * image.height), Image.Resampling.BICUBIC).save(path)


def _black_border(pixels: NDArray[np.uint8]) -> float:
    """Share of the area in rows and columns that are black from the border on."""
    dark = pixels.max(2) < 8
    rows, columns = ~dark.all(1), ~dark.all(0)
    if not rows.any():
        return 1.0
    height = len(rows) - int(rows.argmax()) - int(rows[::-1].argmax())
    width = len(columns) - int(columns.argmax()) - int(columns[::-1].argmax())
    return float(1 - height * width / dark.size)
