"""Which rows of the centers are in use, and where they lie.

Shape suffixes: C = rows of a shard, D = embedding, n = rows of the set, M = some of them, T = rows
of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Newest = Callable[[Tensor], Tensor]
"""Returns the class centers at int64 places [T] of a set as they are at the present step, fp32
[T, D] in a buffer that the next call changes."""


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows of a rank's shard, and where they lie in the tensors at hand.

    The tensors are those of the whole shard, or compact ones that hold the rows of the set only, in
    its order, as staging makes them.

    Attributes:
        row_n: int64 [n] rows of the shard, distinct; ``None`` for all in order.
        place_n: int64 [n] their places in the tensors; ``None``: the tensors hold them in order.
        first_row: Number in the whole head of the shard's first row: rounding is keyed by numbers.
        newest: Reads class centers that are stored as they were at steps before; ``None``: they are
            stored as they are.
    """

    row_n: Tensor | None
    place_n: Tensor | None
    first_row: int = 0
    newest: Newest | None = None

    @classmethod
    def of(cls, row_n: Tensor | None, *, first_row: int = 0, compact: bool = False) -> "RowSet":
        """Return rows of a shard, in its tensors or in compact ones."""
        return cls(row_n, None if compact else row_n, first_row)

    @property
    def compact(self) -> bool:
        """Whether the tensors hold some rows of the shard only."""
        return self.row_n is not None and self.place_n is None

    def count(self, tensor: Tensor) -> int:
        """Return n, where ``tensor`` is one of those at hand."""
        return len(tensor if self.place_n is None else self.place_n)

    def some(self, which_M: Tensor) -> "RowSet":
        """Return the rows at some places of the set, int64, as they are stored: ``newest`` is not
        theirs."""
        return RowSet(
            which_M if self.row_n is None else self.row_n[which_M],
            which_M if self.place_n is None else self.place_n[which_M],
            self.first_row,
        )

    def numbers(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return int64 numbers in the whole head of rows ``start:stop`` of the set [T]."""
        if self.row_n is None:
            return torch.arange(self.first_row + start, self.first_row + stop, device=device)
        return self.row_n[start:stop] + self.first_row
