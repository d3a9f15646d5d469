"""The positives' share of the gradient of the centers, in fp32 beside the tiles.

There is one positive for each row of the batch and it outweighs all negatives of that row, so it is
left out of the matrix products, whose operands may have 16 bits.

Shape suffixes: P = rows of all micro-batches, D = embedding, T = rows of a tile, 1 = one a row.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positives:
    """Sorted by row of the sample; those of other ranks come first, at ``NOT_LOCAL``.

    Attributes:
        target_P: int64 row of the sample, ascending.
        order_P: int64 place of each in the two below.
        slope_P: fp32 derivative of the loss by the positive's product.
        embedding_PD: Derivative of that product by its key, fp32 or bf16: queries as a rule.
    """

    target_P: Tensor
    order_P: Tensor
    slope_P: Tensor
    embedding_PD: Tensor

    @classmethod
    def of(
        cls, targets: Sequence[Tensor], slopes: Sequence[Tensor], embeddings: Sequence[Tensor]
    ) -> "Positives":
        """Return the positives of some micro-batches."""
        target_P, order_P = torch.cat(list(targets)).sort(stable=True)
        return cls(target_P, order_P, torch.cat(list(slopes)), torch.cat(list(embeddings)))

    def first(self, rows: int) -> Tensor:
        """Return int64 [rows + 1]: positives of row i are ``first[i]`` to ``first[i + 1]``."""
        every = torch.arange(rows + 1, device=self.target_P.device)
        return torch.searchsorted(self.target_P, every)

    def add_(self, gradient_TD: Tensor, start: int, factor_T1: Tensor | None = None) -> None:
        """Add their share, times ``factor_T1``, to the gradient of the tile at ``start``."""
        low, high = (self._before(row) for row in (start, start + len(gradient_TD)))
        if low == high:
            return
        place, pull_PD = self.target_P[low:high] - start, self._pull_PD[low:high]
        if factor_T1 is not None:
            pull_PD = pull_PD * factor_T1[place]
        gradient_TD.index_add_(0, place, pull_PD)

    def _before(self, row: int) -> int:
        """How many come before a row of the sample."""
        return bisect_left(self._targets, row)

    @cached_property
    def _targets(self) -> list[int]:
        targets: list[int] = self.target_P.tolist()  # host sync
        return targets

    @cached_property
    def _pull_PD(self) -> Tensor:
        """Slope times embedding in fp32, in the order of the targets."""
        return self.embedding_PD[self.order_P].float() * self.slope_P[self.order_P].unsqueeze(1)
