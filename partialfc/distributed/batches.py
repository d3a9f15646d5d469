"""Gathers the batches of all ranks, and refuses those of unequal size.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding, K =
bytes of a row, W = ranks, 1 = one a row.
"""

import torch
from torch import Tensor

from partialfc.distributed.ranks import Ranks, gather_rows


class Batches:
    """Gathers one batch after another.

    Ranks that bring unequal numbers of rows to a collective read garbage or wait for ever. So they
    always bring as many as in the last one, behind a row that says how many they have. If that is
    the same number everywhere, what is more than in the last one is gathered next.

    Args:
        ranks: Those that gather.
        what: Of which the size must be equal, for messages.
    """

    def __init__(self, ranks: Ranks, what: str = "batches") -> None:
        self._ranks, self._what = ranks, what
        self._last = 0

    def gather(
        self, queries_bD: Tensor, identities_b: Tensor, norms_b: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries, identities and norms of all ranks, rank by rank, bit for bit.

        Collective: one all-gather of [b + 1] rows; one more if b is larger than the last time, and
        the first time. A row has D * itemsize + 8 bytes, and 4 more for its norm.

        Returns:
            queries_BD: In the dtype of ``queries_bD``; contiguous.
            identities_B: int64.
            norms_B: fp32, or ``None``.

        Raises:
            ValueError: If b is not the same on all ranks, on every rank; on a GPU, a device-side
                assertion fails instead.
        """
        queries_bD = queries_bD.contiguous()
        if self._ranks.size == 1:
            return queries_bD, identities_b, norms_b
        # As bytes: gloo knows no 16-bit integers, and no backend mixes two dtypes.
        parts = [queries_bD, identities_b.unsqueeze(1)]
        parts += [] if norms_b is None else [norms_b.unsqueeze(1)]
        row_WbK = self._of_all(torch.cat([part.view(torch.uint8) for part in parts], dim=1))
        columns = torch.split(row_WbK, [part.shape[1] * part.itemsize for part in parts], dim=2)
        queries_BD, *more_B1 = (_joined(*both) for both in zip(columns, parts, strict=True))
        identities_B, *norms = (more.squeeze(1) for more in more_B1)
        return queries_BD, identities_B, norms[0] if norms else None

    def gather_identities(self, identities_b: Tensor) -> Tensor:
        """Return the int64 identities [B] of all ranks; collective as :meth:`gather`."""
        if self._ranks.size == 1:
            return identities_b
        row_b1 = identities_b.long().unsqueeze(1)
        return _joined(self._of_all(row_b1.view(torch.uint8)), row_b1).squeeze(1)

    def _of_all(self, row_bK: Tensor) -> Tensor:
        """Return the rows [W, b, K] of all ranks; K is 8 at least."""
        count, last, ranks = len(row_bK), self._last, self._ranks
        size_1K = row_bK.new_zeros(1, row_bK.shape[1])
        size_1K[:, :8] = torch.full((1, 1), count, device=row_bK.device).view(torch.uint8)
        sent = [size_1K, row_bK[:last]]
        if count < last:
            sent.append(row_bK.new_zeros(last - count, row_bK.shape[1]))
        row_WbK = gather_rows(torch.cat(sent), ranks).view(ranks.size, 1 + last, -1)
        self._refuse_unequal(row_WbK[:, 0, :8].contiguous().view(torch.int64).squeeze(1))
        row_WbK = row_WbK[:, 1 : 1 + count]
        if count > last:
            more_WbK = gather_rows(row_bK[last:], ranks).view(ranks.size, count - last, -1)
            row_WbK = torch.cat([row_WbK, more_WbK], dim=1)
        self._last = count
        return row_WbK

    def _refuse_unequal(self, size_W: Tensor) -> None:
        other_W = size_W != size_W[0]
        if other_W.device.type != "cpu":
            text = f"{self._what} must have the same size on every rank"
            torch._assert_async(~other_W.any(), text)
        elif other_W.any():
            rank = int(other_W.nonzero()[0])
            raise ValueError(
                f"{self._what} must have the same size on every rank, got {int(size_W[rank])} on "
                f"rank {rank} and {int(size_W[0])} on rank 0; leave out what does not divide by "
                "the number of ranks, as drop_last=True of a DataLoader and of a "
                "DistributedSampler do."
            )


def _joined(row_WbK: Tensor, like: Tensor) -> Tensor:
    """Return bytes of all ranks as the rows [B, ...] of one tensor, in the dtype of another."""
    return row_WbK.flatten(0, 1).contiguous().view(like.dtype)
