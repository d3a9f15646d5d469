"""Shapes of the fused kernels' tiles, by card. To add or change one is to change this table.

Nothing is searched at run time: a step begins with the kernels that this table names, and the same
card gives the same bits. ``python tools/bench/kernel_shapes.py`` chooses the shapes by arithmetic
from what the compiler makes of candidates, for D above 256; below, half of the registers are free.

Nothing here needs torch, so a login node can ask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kernel = Literal["pull", "pull_bent", "update", "update_kept"]
"""Pass 1, pass 1 of a margin that bends negatives; pass 2, pass 2 with kept exponentials."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a program of a fused kernel goes through what it streams.

    Attributes:
        streamed: Rows that it reads at once: a power of two, 16 at least.
        warps: Of a program; 8 are two warpgroups of Hopper.
        stages: Blocks in shared memory at once; 2: one is read while another is multiplied.
    """

    streamed: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, and the shapes that its multiprocessors have room for.

    Attributes:
        name: As in the driver's name of the device.
        capability: Compute capability, the least that the shapes are for.
        multiprocessors: Pass 1 splits the classes until about as many have work.
        shared_bytes: Shared memory that a program may have.
        shapes: Of each kernel, for D = 512, for D of 257 to 511, and for less.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    shapes: Mapping[Kernel, tuple[Shape, Shape, Shape]]

    def shape(self, kernel: Kernel, dim: int) -> Shape:
        """Return the shape for embeddings of ``dim`` elements, 1 to 512."""
        return self.shapes[kernel][0 if dim == 512 else 1 if dim > 256 else 2]


Shapes = Mapping[Kernel, tuple[Shape, Shape, Shape]]

_HOPPER: Shapes = {
    "pull": (Shape(64, 8, 2), Shape(32, 8, 2), Shape(64, 8, 2)),
    "pull_bent": (Shape(32, 8, 2), Shape(32, 8, 2), Shape(64, 8, 2)),
    "update": (Shape(64, 8, 2), Shape(32, 8, 2), Shape(64, 8, 2)),
    "update_kept": (Shape(64, 8, 2), Shape(64, 8, 3), Shape(64, 8, 2)),
}
_BLACKWELL: Shapes = dict.fromkeys(_HOPPER, (Shape(64, 8, 2),) * 3)
_AMPERE: Shapes = {
    "pull": (Shape(32, 8, 2), Shape(16, 8, 2), Shape(64, 8, 2)),
    "pull_bent": (Shape(32, 8, 2), Shape(16, 8, 2), Shape(64, 8, 2)),
    "update": (Shape(32, 8, 2), Shape(32, 8, 2), Shape(64, 8, 2)),
    "update_kept": (Shape(64, 8, 2), Shape(32, 8, 2), Shape(64, 8, 2)),
}
_SMALL: Shapes = {
    "pull": (Shape(16, 8, 2), Shape(16, 8, 2), Shape(32, 8, 2)),
    "pull_bent": (Shape(16, 8, 2), Shape(16, 8, 2), Shape(32, 8, 2)),
    "update": (Shape(16, 8, 2), Shape(16, 8, 2), Shape(32, 8, 2)),
    "update_kept": (Shape(32, 8, 2), Shape(32, 8, 2), Shape(32, 8, 2)),
}

_KIB = 1 << 10
H200 = Card("H200", (9, 0), 132, 227 * _KIB, _HOPPER)
CARDS = (
    H200,
    Card("H100 PCIe", (9, 0), 114, 227 * _KIB, _HOPPER),
    Card("H100", (9, 0), 132, 227 * _KIB, _HOPPER),
    Card("B200", (10, 0), 148, 227 * _KIB, _BLACKWELL),
    Card("B300", (10, 3), 148, 227 * _KIB, _BLACKWELL),
    Card("A100", (8, 0), 108, 163 * _KIB, _AMPERE),
)
"""The first whose name is in that of the device."""
OTHERS = (
    Card("sm_103", (10, 3), 148, 227 * _KIB, _BLACKWELL),
    Card("sm_100", (10, 0), 148, 227 * _KIB, _BLACKWELL),
    Card("sm_90", (9, 0), 132, 227 * _KIB, _HOPPER),
    Card("sm_80", (8, 0), 108, 163 * _KIB, _AMPERE),
)
"""Of the same capability, without a name above."""
DEFAULT = Card("any other", (8, 0), 108, 99 * _KIB, _SMALL)
"""Any other from capability 8.0 on: it has at least so much shared memory."""


def card_for(capability: tuple[int, int], name: str = "") -> Card | None:
    """Return the row of a device; ``None`` where tensor cores have no bf16, before 8.0."""
    if capability < DEFAULT.capability:
        return None
    same = [card for card in CARDS if card.capability == capability and card.name in name]
    same += [card for card in OTHERS if card.capability == capability]
    return next(iter(same), DEFAULT)
