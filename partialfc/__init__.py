"""Face recognition training on millions of identities: a sharded, sampled margin softmax."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialfc.distributed.shares import Shares
    from partialfc.head.options import Kernels, Memory, Nearest, Precision, Sets, Several
    from partialfc.head.partial_fc import PartialFC
    from partialfc.head.rows.rules import RowAdagrad, RowAdamW, RowSGD
    from partialfc.losses.over_ranks import EmbeddingLosses
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

__version__ = "0.1.0"

__all__ = [
    "AdaCos",
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "EmbeddingLosses",
    "FNormSphereFace",
    "Kernels",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "Memory",
    "ModifiedSoftmax",
    "Nearest",
    "NormalizedSoftmax",
    "PartialFC",
    "Precision",
    "RowAdagrad",
    "RowAdamW",
    "RowSGD",
    "Sets",
    "Several",
    "Shares",
    "Softmax",
    "SphereFace",
    "SubCenterArcFace",
    "UniFace",
    "__version__",
]

_HOME = {
    "Kernels": "head.options",
    "Memory": "head.options",
    "Nearest": "head.options",
    "PartialFC": "head.partial_fc",
    "Precision": "head.options",
    "RowAdagrad": "head.rows.rules",
    "RowAdamW": "head.rows.rules",
    "RowSGD": "head.rows.rules",
    "Several": "head.options",
    "Sets": "head.options",
    "Shares": "distributed.shares",
    "EmbeddingLosses": "losses.over_ranks",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: settings and packs need no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'partialfc' has no attribute {name!r}")
    return getattr(import_module(f"partialfc.{_HOME.get(name, 'margins')}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return __all__
