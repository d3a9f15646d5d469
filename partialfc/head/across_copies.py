"""The whole batch where several copies of the class centers are held, each by some of the ranks.

A copy computes the softmax of its own ranks' rows. What looks at all rows together is a margin: the
mean of norms, the draws of a batch, the moving averages. It is given the rows of all copies, in the
order that they have in one batch, and of what it returns a copy takes its own. So a margin knows
nothing of copies.

Shape suffixes: B = rows of a copy's batch, K = positives of a row, P = K * B pairs, A = G * P pairs
of all G copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from partialfc.distributed.ranks import Ranks, gather_rows, sum_over_ranks
from partialfc.margins import Margin, Positive, RowMeans, Rows, State
from partialfc.margins.base import Bend

T = TypeVar("T", Positive, Bend)


@dataclass(frozen=True, slots=True)
class AcrossCopies:
    """A batch among those of all copies.

    Attributes:
        across: The ranks that hold the same rows, one of each copy.
        rows: B, the same in every copy.
    """

    across: Ranks
    rows: int

    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return fp32 values [P] of all copies [A]; one all-gather, none for one copy."""
        given = [value for value in values if value is not None]
        if self.across.size == 1 or not given:
            return [*values]
        # Pairs lie [K, B]: rows come first for the gathering, and copies go into B.
        columns = [value.float().view(-1, self.rows) for value in given]
        row_AK = gather_rows(torch.cat(columns).T.contiguous(), self.across)
        every = iter(torch.split(row_AK.T, [len(column) for column in columns]))
        return [None if value is None else next(every).flatten() for value in values]

    def of(self, rows: Rows) -> Rows:
        """Return the rows of all copies; as :meth:`gather`."""
        dot_A, norm_A, length_A = self.gather([rows.dot_B, rows.norm_B, rows.length_B])
        assert dot_A is not None
        return replace(rows, dot_B=dot_A, norm_B=norm_A, length_B=length_A)

    def own(self, value: T) -> T:
        """Return the part of this copy of what is said of the rows of all."""
        if self.across.size == 1:
            return value
        parts: dict[str, Any] = {
            field.name: self._own(getattr(value, field.name))
            for field in fields(value)
            if field.name.endswith("_B")
        }
        return replace(value, **parts)

    def _own(self, value_A: Tensor | None) -> Tensor | None:
        if value_A is None:
            return None
        start = self.across.rank * self.rows
        columns = value_A.view(-1, self.across.size * self.rows)
        return columns[:, start : start + self.rows].flatten()

    def learn(
        self, margin: Margin, state: State, sum_B: Tensor, logit_KB: Tensor, means: RowMeans
    ) -> dict[str, Tensor]:
        """Return what :meth:`Margin.learn` does of all rows; one all-gather where it learns."""
        if self.across.size == 1 or type(margin).learn is Margin.learn:
            return margin.learn(state, sum_B, logit_KB, means)
        size = len(logit_KB), -1
        present, counted = means.present_KB, means.counted_B
        every = self.gather([sum_B, logit_KB, means.share_KB, present, counted])
        sum_A, logit_A, share_A, present_A, counted_A = every
        assert sum_A is not None
        assert logit_A is not None
        whole = RowMeans(
            None if share_A is None else share_A.view(size),
            None if present_A is None else present_A.view(size) > 0,
            counted_A,
            means.rows * self.across.size,
        )
        return margin.learn(state, sum_A, logit_A.view(size), whole)

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over copies of some scalars: one all-reduce, none for one copy."""
        if self.across.size == 1:
            return [*values]
        summed = sum_over_ranks(torch.stack([*values]), self.across)
        return [*(summed / self.across.size).unbind()]
