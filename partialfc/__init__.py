"""Face recognition training on millions of identities: a sharded, sampled margin softmax."""

from partialfc.head import PartialFC
from partialfc.margins import ArcFace, CosFace, Margin
from partialfc.row_optimizer import RowAdamW, RowSGD

__all__ = ["ArcFace", "CosFace", "Margin", "PartialFC", "RowAdamW", "RowSGD"]
