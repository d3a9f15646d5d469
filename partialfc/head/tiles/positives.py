"""The positives' share of the gradient of the centers, in fp32 beside the tiles.

There are a few positives for each row of the batch and they outweigh all negatives of that row, so
they are left out of the matrix products, whose operands may have 16 bits.

Shape suffixes: B = rows of all micro-batches, D = embedding, P = their positives, T = rows of a
tile, N = T + 1, 1 = one a row.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positives:
    """Sorted by row of the sample; those of other ranks come first, at ``NOT_LOCAL``.

    Attributes:
        target_P: int64 row of the sample, ascending.
        row_P: int64 row of each in ``embedding_BD``.
        slope_P: fp32 derivative of the loss by the positive's product.
        embedding_BD: Derivative of that product by its key, fp32 or bf16: queries as a rule.
    """

    target_P: Tensor
    row_P: Tensor
    slope_P: Tensor
    embedding_BD: Tensor

    @classmethod
    def of(
        cls, targets: Sequence[Tensor], slopes: Sequence[Tensor], embeddings: Sequence[Tensor]
    ) -> "Positives":
        """Return the positives of some micro-batches: of each K * B targets and slopes, first those
        of all rows, then their second ones, and B embeddings."""
        target_P, order_P = _joined(targets).sort(stable=True)
        slope_P, row_P = _joined(slopes)[order_P], order_P
        if any(map(_several, targets, embeddings)):
            starts = accumulate((len(one) for one in embeddings), initial=0)
            rows = map(_rows, targets, embeddings, starts)
            row_P = torch.cat(list(rows))[order_P]
        return cls(target_P, row_P, slope_P, _joined(embeddings))

    def first(self, stop: int, start: int = 0) -> Tensor:
        """Return int64 [stop - start + 1]: positives of row ``start + i`` are ``first[i]`` to
        ``first[i + 1]``."""
        every = torch.arange(start, stop + 1, device=self.target_P.device)
        return torch.searchsorted(self.target_P, every)

    def add_(self, gradient_TD: Tensor, start: int, factor_T1: Tensor | None = None) -> None:
        """Add their share, times ``factor_T1``, to the gradient of the tile at ``start``.

        No host synchronisation: a GPU finds the positives of each row by itself, and adds them up
        in their order.
        """
        if gradient_TD.is_cuda:
            first_N = self.first(start + len(gradient_TD), start)
            share_TD = torch.segment_reduce(self._pull_PD, "sum", offsets=first_N, unsafe=True)
            gradient_TD.add_(share_TD if factor_T1 is None else share_TD * factor_T1)
            return
        low, high = (self._before(row) for row in (start, start + len(gradient_TD)))
        if low == high:
            return
        place = self.target_P[low:high] - start
        pull_PD = self.embedding_BD[self.row_P[low:high]].float()
        pull_PD = pull_PD * self.slope_P[low:high].unsqueeze(1)
        if factor_T1 is not None:
            pull_PD = pull_PD * factor_T1[place]
        gradient_TD.index_add_(0, place, pull_PD)

    def _before(self, row: int) -> int:
        """How many come before a row of the sample."""
        return bisect_left(self._targets, row)

    @cached_property
    def _targets(self) -> list[int]:
        targets: list[int] = self.target_P.tolist()
        return targets

    @cached_property
    def _pull_PD(self) -> Tensor:
        return self.embedding_BD[self.row_P].float() * self.slope_P.unsqueeze(1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _several(target_P: Tensor, embedding_BD: Tensor) -> bool:
    return len(target_P) != len(embedding_BD)


def _rows(target_P: Tensor, embedding_BD: Tensor, start: int) -> Tensor:
    """Row of each positive, where the rows of a micro-batch begin at ``start``."""
    every_P = torch.arange(len(target_P), device=target_P.device)
    return every_P % max(1, len(embedding_BD)) + start
