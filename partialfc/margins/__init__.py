"""The losses of the field on one head: what each makes of the products of queries and keys.

``base`` says what a margin is, ``angles`` has the curves; the other modules are one family each.
Names, ranges and defaults are in :mod:`partialfc.definitions.margins`.
"""

from partialfc.definitions import margins as definitions
from partialfc.definitions.margins import Gradient
from partialfc.margins.base import Bend, Margin, Positive, RowMeans, Rows, State
from partialfc.margins.binary import UniFace
from partialfc.margins.by_norm import AdaFace, MagFace
from partialfc.margins.fixed import ArcFace, CombinedMargin, CosFace
from partialfc.margins.mined import CurricularFace, MVSoftmax
from partialfc.margins.multiplicative import FNormSphereFace, LSoftmax, SphereFace
from partialfc.margins.others import AdaCos, ElasticFace, SubCenterArcFace
from partialfc.margins.softmax import ModifiedSoftmax, NormalizedSoftmax, Softmax

MARGINS: dict[str, type[Margin]] = {
    name: globals()[definition.__name__] for name, definition in definitions.MARGINS.items()
}
"""Every margin by the name it has in a settings file."""

__all__ = [
    "MARGINS",
    "AdaCos",
    "AdaFace",
    "ArcFace",
    "Bend",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "FNormSphereFace",
    "Gradient",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "ModifiedSoftmax",
    "NormalizedSoftmax",
    "Positive",
    "RowMeans",
    "Rows",
    "Softmax",
    "SphereFace",
    "State",
    "SubCenterArcFace",
    "UniFace",
]
