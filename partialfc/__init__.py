"""Face recognition training on millions of identities: a sharded, sampled margin softmax."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialfc.head import PartialFC
    from partialfc.margins import (
        AdaCos,
        AdaFace,
        ArcFace,
        CombinedMargin,
        CosFace,
        CurricularFace,
        ElasticFace,
        FNormSphereFace,
        LSoftmax,
        MagFace,
        Margin,
        ModifiedSoftmax,
        MVSoftmax,
        NormalizedSoftmax,
        Softmax,
        SphereFace,
        SubCenterArcFace,
        UniFace,
    )
    from partialfc.row_rules import RowAdagrad, RowAdamW, RowSGD

__all__ = [
    "AdaCos",
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "FNormSphereFace",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "ModifiedSoftmax",
    "NormalizedSoftmax",
    "PartialFC",
    "RowAdagrad",
    "RowAdamW",
    "RowSGD",
    "Softmax",
    "SphereFace",
    "SubCenterArcFace",
    "UniFace",
]

_HOME = {"PartialFC": "head"} | dict.fromkeys(("RowAdagrad", "RowAdamW", "RowSGD"), "row_rules")


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: settings and packs need no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'partialfc' has no attribute {name!r}")
    return getattr(import_module(f"partialfc.{_HOME.get(name, 'margins')}"), name)
