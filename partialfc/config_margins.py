"""Settings of the margins, one section each; what they compute is in :mod:`partialfc.margins`."""

import math
from typing import Annotated, Literal

from pydantic import Field

from partialfc.settings import Section, Unit


class Margin(Section):
    """What every margin has. A new margin is a subclass and an entry in ``AnyMargin``."""

    name: str
    """Which margin."""

    scale: Annotated[float, Field(gt=0, le=1024)] = 64.0
    """s, the factor of every cosine in the softmax: the radius of the hypersphere."""

    inter_class_filter: Annotated[float | None, Field(gt=-1, lt=1), Unit("units of cosine")] = None
    """Cosine above which a negative is taken for the same person under another identity: its
    logit becomes 0 and it gets no gradient. Left out, there is no filter."""


class ArcFace(Margin):
    """s cos(theta + angular) on the positive (https://arxiv.org/abs/1801.07698, eq. 3)."""

    name: Literal["arcface"] = "arcface"
    """Which margin."""

    angular: Annotated[float, Field(ge=0, le=math.pi / 2), Unit("radians")] = 0.5
    """m, added to the positive's angle. 0 is a plain normalised softmax."""

    gradient: Literal["straight_through", "exact"] = "straight_through"
    """``straight_through`` takes the margin for a constant in backward, as arcface_torch does;
    ``exact`` is the paper's derivative, with a factor sin(theta + m) / sin(theta) more."""


class CosFace(Margin):
    """s (cos(theta) - additive) on the positive (https://arxiv.org/abs/1801.09414, eq. 4)."""

    name: Literal["cosface"] = "cosface"
    """Which margin."""

    additive: Annotated[float, Field(ge=0, lt=2), Unit("units of cosine")] = 0.4
    """m, subtracted from the positive's cosine. 0 is a plain normalised softmax."""


AnyMargin = Annotated[ArcFace | CosFace, Field(discriminator="name")]
