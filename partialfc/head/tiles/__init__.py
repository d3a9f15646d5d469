"""The two passes of the head over tiles of class centers.

``passes`` is the loop over tiles, ``parts`` what goes into it and between the passes, ``products``
its matrix products, ``positives`` what is left out of them. The other steps of a tile are in
``torch`` for any device and in ``kernels`` and ``row_kernels`` for GPUs; ``dispatch`` chooses.
``fused`` and ``fused_kernels`` are both passes once more, as one kernel each.
"""

from partialfc.head.tiles import fused
from partialfc.head.tiles.parts import FirstPass, Kept, Logits, Pull
from partialfc.head.tiles.passes import first_pass, positives, second_pass, unit_keys
from partialfc.head.tiles.products import scaled_products
from partialfc.head.tiles.torch_steps import leave_out_, project_, take_rows
from partialfc.head.tiles.workspace import Workspace
from partialfc.numerics import Compute, operand_dtype, precision, unit

__all__ = [
    "Compute",
    "FirstPass",
    "Kept",
    "Logits",
    "Pull",
    "Workspace",
    "first_pass",
    "fused",
    "leave_out_",
    "operand_dtype",
    "positives",
    "precision",
    "project_",
    "scaled_products",
    "second_pass",
    "take_rows",
    "unit",
    "unit_keys",
]
