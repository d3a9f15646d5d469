"""The two passes of the head over tiles of class centers.

``passes`` is the loop over tiles, ``products`` its matrix products, ``torch`` the other steps of a
tile on any device.
"""

from partialfc.tiles.passes import FirstPass, Kept, first_pass, positives, second_pass
from partialfc.tiles.products import Compute, operand_dtype
from partialfc.tiles.torch import project_, take_rows, unit
from partialfc.tiles.workspace import Workspace

__all__ = [
    "Compute",
    "FirstPass",
    "Kept",
    "Workspace",
    "first_pass",
    "operand_dtype",
    "positives",
    "project_",
    "second_pass",
    "take_rows",
    "unit",
]
