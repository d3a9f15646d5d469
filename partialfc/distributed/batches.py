"""Gathers the batches of all ranks, and refuses those of another size than was said.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, D = embedding, K =
bytes of a row, W = ranks, 1 = one a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.distributed.ranks import Ranks, gather_rows
from partialfc.distributed.shares import Shares


class Batches:
    """Gathers one batch after another.

    Ranks that bring unequal numbers of rows to a collective read garbage or wait for ever. So they
    always bring as many as in the last one, behind a row that says how many they have, or by how
    many that is not their share. If that is the same everywhere, or 0, what is more than in the
    last one is gathered next. Smaller shares are filled up on the way.

    Args:
        ranks: Those that gather.
        what: What has the size, for messages.
        beside: Whether a GPU gathers beside the steps, which do not wait for it.
    """

    def __init__(self, ranks: Ranks, what: str = "batches", *, beside: bool = False) -> None:
        self._ranks, self._what, self._beside = ranks, what, beside
        self._last = 0

    def gather(
        self,
        queries_bD: Tensor,
        identities: Tensor,
        more: Tensor | None = None,
        shares: Shares | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries, identities and what more a row has of all ranks, rank by rank, bit for
        bit.

        Collective: one all-gather of [b + 1] rows; one more if b is larger than the last time, and
        the first time; b is the largest share's. A row has D * itemsize bytes, 8 for each of its
        identities, and 4 for each number more.

        Args:
            queries_bD: This rank's, any dtype.
            identities: int64 [b], or [b, any], as many on every rank.
            more: fp32, as identities.
            shares: b of every rank; ``None`` where all are equal.

        Returns:
            queries_BD: In the dtype of ``queries_bD``; contiguous.
            identities: int64 [B], or [B, any].
            more: fp32, as identities, or ``None``.

        Raises:
            ValueError: If b is not the same on all ranks, or not its share, on every rank; on a
                GPU, a device-side assertion fails instead.
        """
        queries_bD = queries_bD.contiguous()
        if self._ranks.size == 1:
            return queries_bD, identities, more
        # As bytes: gloo knows no 16-bit integers, and no backend mixes two dtypes.
        wanted = [queries_bD, identities] if more is None else [queries_bD, identities, more]
        parts = [_as_rows(part) for part in wanted]
        row_bK = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
        widths = [part.shape[1] * part.itemsize for part in parts]
        columns = zip(torch.split(self._of_all(row_bK, shares), widths, dim=2), wanted, strict=True)
        queries_BD, identities, *others = (
            _joined(column, part, shares) for column, part in columns
        )
        return queries_BD, identities, others[0] if others else None

    def gather_identities(self, identities: Tensor, shares: Shares | None = None) -> Tensor:
        """Return the int64 identities [B], or [B, any], of all ranks; collective as
        :meth:`gather`."""
        if self._ranks.size == 1:
            return identities
        identities = identities.long()
        row_WbK = self._of_all(_as_rows(identities).view(torch.uint8), shares)
        return _joined(row_WbK, identities, shares)

    def _of_all(self, row_bK: Tensor, shares: Shares | None) -> Tensor:
        """Return the rows [W, b, K] of all ranks, filled up to the largest share; K >= 8."""
        own, last, ranks = len(row_bK), self._last, self._ranks
        count = own if shares is None else shares.largest
        size_1K = row_bK.new_zeros(1, row_bK.shape[1])
        said = own if shares is None else own - shares.sizes[ranks.rank]  # 0 if it is its share
        size_1K[:, :8] = torch.full((1, 1), said, device=row_bK.device).view(torch.uint8)
        sent = torch.cat([size_1K, row_bK])
        if own < max(count, last):
            sent = F.pad(sent, (0, 0, 0, max(count, last) - own))
        row_WbK = gather_rows(sent[: 1 + last], ranks, beside=self._beside).view(
            ranks.size, 1 + last, -1
        )
        self._refuse_other(row_WbK[:, 0, :8].contiguous().view(torch.int64).squeeze(1), shares)
        row_WbK = row_WbK[:, 1 : 1 + count]
        if count > last:
            more = sent[1 + last : 1 + count]
            more_WbK = gather_rows(more, ranks, beside=self._beside)
            more_WbK = more_WbK.view(ranks.size, count - last, -1)
            row_WbK = torch.cat([row_WbK, more_WbK], dim=1)
        self._last = count
        return row_WbK

    def _refuse_other(self, size_W: Tensor, shares: Shares | None) -> None:
        other_W = size_W != (size_W[0] if shares is None else 0)
        if other_W.device.type != "cpu":
            must = "the same size on every rank" if shares is None else "the sizes of the shares"
            torch._assert_async(~other_W.any(), f"{self._what} must have {must}")
        elif other_W.any():
            rank = int(other_W.nonzero()[0])
            if shares is not None:
                share = shares.sizes[rank]
                raise ValueError(
                    f"{self._what} must have the sizes of the shares, got "
                    f"{share + int(size_W[rank])} on rank {rank} instead of {share}."
                )
            raise ValueError(
                f"{self._what} must have the same size on every rank, got {int(size_W[rank])} on "
                f"rank {rank} and {int(size_W[0])} on rank 0; leave out what does not divide by "
                "the number of ranks, as drop_last=True of a DataLoader and of a "
                "DistributedSampler do, or say the shares of all ranks."
            )


def _as_rows(value: Tensor) -> Tensor:
    """Return numbers [b] as rows [b, 1], and rows as they are."""
    return value.unsqueeze(1) if value.ndim == 1 else value.contiguous()


def _joined(row_WbK: Tensor, like: Tensor, shares: Shares | None) -> Tensor:
    """Return bytes of all ranks as the rows [B, ...] of one tensor, of another's dtype and kind."""
    if shares is None or shares.equal:
        rows = row_WbK.flatten(0, 1).contiguous().view(like.dtype)
    else:
        parts = [row_WbK[rank, :size] for rank, size in enumerate(shares.sizes)]
        rows = torch.cat(parts).view(like.dtype)
    return rows.squeeze(1) if like.ndim == 1 else rows
