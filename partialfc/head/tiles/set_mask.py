"""Negatives that a row is not told from: whole sets of identities, each a range of columns.

Shape suffixes: B = rows of the gathered batch, J = sets, n = sampled rows, T = rows of a tile.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SetMask:
    """Which sets each row of a batch leaves out. There is no mask of rows and columns.

    Attributes:
        rows: J + 1 rows of the shard: set j has those from ``rows[j]`` up to ``rows[j + 1]``.
        columns: The same places among the rows of a pass, which are in ascending order.
        masked_JB: bool, whether a row leaves a set out: never one that it has a positive in.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    masked_JB: Tensor

    def among(self, row_n: Tensor | None) -> "SetMask":
        """Return it for a pass over rows ``row_n`` of the shard, ascending; ``None`` for all."""
        if row_n is None:
            return replace(self, columns=self.rows)
        first = torch.tensor(self.rows, device=row_n.device)
        return replace(self, columns=(*torch.searchsorted(row_n, first).tolist(),))  # host sync

    def leave_out_(self, logit_TB: Tensor, start: int) -> None:
        """Set what is left out of the tile at column ``start`` to -inf."""
        for masked_B, low, high in zip(
            self.masked_JB, self.columns[:-1], self.columns[1:], strict=True
        ):
            low, high = max(low - start, 0), min(high - start, len(logit_TB))
            if low < high:
                logit_TB[low:high].masked_fill_(masked_B, -torch.inf)
