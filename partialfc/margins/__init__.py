"""The losses of the field on one head: what each makes of the products of queries and keys.

``base`` says what a margin is, ``angles`` has the curves; the other modules are one family each.
"""

from partialfc.margins.base import Bend, Gradient, Margin, Positive, Rows, State
from partialfc.margins.binary import UniFace
from partialfc.margins.by_norm import AdaFace, MagFace
from partialfc.margins.fixed import ArcFace, CombinedMargin, CosFace
from partialfc.margins.mined import CurricularFace, MVSoftmax
from partialfc.margins.multiplicative import FNormSphereFace, LSoftmax, SphereFace
from partialfc.margins.others import AdaCos, ElasticFace, SubCenterArcFace
from partialfc.margins.softmax import ModifiedSoftmax, NormalizedSoftmax, Softmax

MARGINS: dict[str, type[Margin]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "combined": CombinedMargin,
    "softmax": Softmax,
    "modified_softmax": ModifiedSoftmax,
    "normalized_softmax": NormalizedSoftmax,
    "l_softmax": LSoftmax,
    "sphereface": SphereFace,
    "f_norm_sphereface": FNormSphereFace,
    "adaface": AdaFace,
    "magface": MagFace,
    "curricularface": CurricularFace,
    "mv_softmax": MVSoftmax,
    "elasticface": ElasticFace,
    "adacos": AdaCos,
    "subcenter_arcface": SubCenterArcFace,
    "uniface": UniFace,
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
    "Rows",
    "Softmax",
    "SphereFace",
    "State",
    "SubCenterArcFace",
    "UniFace",
]
