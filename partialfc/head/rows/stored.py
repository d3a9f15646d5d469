"""What the updates of rows are given: centers and states as they are stored, and one step's say.

Shape suffixes: C = rows of the tensors at hand.
"""

from dataclasses import dataclass

from torch import Tensor

from partialfc.head.row_set import RowSet
from partialfc.head.rows.rules import States
from partialfc.keyed import key

CENTERS = "centers"
MOMENTUM = "momentum"
"""Names of what is stored, which its rounding is keyed by."""
AT_STEP = "at_step"
"""State of rows that move unsampled: the step that each is at."""
SCALE = "_scale"
"""Ending of the state that holds the scales of another."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Class centers and their states as they are stored, and which rows of them are meant.

    Attributes:
        centers: fp32, bf16, fp16 or fp8 [C, D]; changed in place, as the states are.
        states: By name, [C, ...] each.
        rows: Those meant.
    """

    centers: Tensor
    states: States
    rows: RowSet

    @property
    def count(self) -> int:
        """How many rows are meant."""
        return self.rows.count(self.centers)

    def scale(self, name: str) -> Tensor | None:
        """Return the fp32 scales [C, 1] of centers or of a state; ``None`` where it has none."""
        return self.states.get(name + SCALE)


@dataclass(frozen=True, slots=True)
class RoundingKeys:
    """Keys of the stochastic rounding of one step, signed 64-bit."""

    centers: int
    momentum: int

    @classmethod
    def of(cls, step_key: int) -> "RoundingKeys":
        """Return the keys of a step."""
        return cls(key(step_key, CENTERS), key(step_key, MOMENTUM))


@dataclass(frozen=True, slots=True)
class SgdStep:
    """One step of SGD, for the kernels that take it.

    Attributes:
        lr: Learning rate.
        weight_decay: Factor of a row in its gradient.
        momentum: Factor of the old velocity; of no matter where none is stored.
        keys: Of the rounding.
        skip: Scalar bool on the device: if true, nothing is written. ``None``: false.
    """

    lr: float
    weight_decay: float
    momentum: float
    keys: RoundingKeys
    skip: Tensor | None
