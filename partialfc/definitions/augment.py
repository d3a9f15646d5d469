"""Random changes to training images; :mod:`partialfc.data.augment` draws them."""

from typing import Annotated

from partialfc.definitions import Definition, Range, Unit

Probability = Annotated[float, Range(ge=0, le=1)]
CHANGES = ("crop", "rotate", "colour", "grey", "blur", "downscale", "jpeg", "cutout")
"""Changes that happen with a probability, in their order; see :class:`Augment`."""

Shift = Annotated[int, Range(ge=0, le=16), Unit("pixels")]


class Augment(Definition):
    """Random changes besides flip and shift, in this order; the first number of each is the
    probability that it happens to an image. All but ``crop`` need DALI."""

    crop: Probability = 0.0
    """Probability that a square part is cut out and resized to the whole."""

    crop_side: Annotated[float, Range(gt=0, lt=1)] = 0.8
    """Smallest side of that part, as a share of the image's."""

    rotate: Probability = 0.0
    """Probability of a rotation about the middle; outermost pixels fill the corners."""

    rotate_degrees: Annotated[float, Range(gt=0, le=180), Unit("degrees")] = 15.0
    """Largest rotation, in either direction."""

    colour: Probability = 0.0
    """Probability that brightness, contrast, saturation and hue change, all four."""

    colour_strength: Annotated[float, Range(gt=0, lt=1)] = 0.3
    """Largest relative change of the first three; the hue turns by at most 45 degrees times it."""

    grey: Probability = 0.0
    """Probability that an image loses its colour."""

    blur: Probability = 0.0
    """Probability of a Gaussian blur."""

    blur_sigma: Annotated[float, Range(gt=0, le=16), Unit("pixels")] = 2.0
    """Largest standard deviation of the blur."""

    downscale: Probability = 0.0
    """Probability that an image is made small and large again."""

    downscale_side: Annotated[float, Range(gt=0, lt=1)] = 0.25
    """Smallest side in between, as a share of the image's."""

    jpeg: Probability = 0.0
    """Probability of JPEG artefacts."""

    jpeg_quality: Annotated[int, Range(ge=1, le=95)] = 20
    """Lowest quality of that JPEG; the highest is 95."""

    cutout: Probability = 0.0
    """Probability that a grey square covers a part."""

    cutout_side: Annotated[float, Range(gt=0, lt=1)] = 0.4
    """Largest side of the square, as a share of the image's."""
