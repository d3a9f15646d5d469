"""The two passes of the head over tiles of class centers.

``passes`` is the loop over tiles, ``products`` its matrix products, ``positives`` what is left out
of them. The other steps of a tile are in ``torch`` for any device and in ``kernels`` and
``row_kernels`` for GPUs; ``dispatch`` chooses.
"""

from partialfc.tiles.passes import FirstPass, Kept, Logits, first_pass, positives, second_pass
from partialfc.tiles.products import Compute, operand_dtype
from partialfc.tiles.torch import project_, take_rows, unit
from partialfc.tiles.workspace import Workspace

__all__ = [
    "Compute",
    "FirstPass",
    "Kept",
    "Logits",
    "Workspace",
    "first_pass",
    "operand_dtype",
    "positives",
    "project_",
    "second_pass",
    "take_rows",
    "unit",
]
