"""Rows of the new identities out of those of the old ones, a piece at a time.

    checkpoint -> OldRows: a file without a name, in the order of the old identities
               -> new_rows: those of some new identities, read from anywhere in it -> written

Shape suffixes: n = identities of a piece, K = centers of an identity, D = numbers of a row, A =
added identities.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.checkpoint.stored_rows import StoredRows
from partialfc.head.centers import fill_initial_

Mean = Callable[[Tensor], Tensor]
"""From added identities [A], ascending, to the mean embeddings [A, D] of their images."""


class OldRows:
    """Rows of identities on the disk, read in any order; the file is gone with the process.

    Args:
        rows: Of all identities in order, as it yields them.
        folder: Where there is room for them.

    Raises:
        OSError: If there is none.
    """

    def __init__(self, rows: StoredRows, folder: Path) -> None:
        self._shape = rows.per_identity, rows.width
        self._bytes = 4 * rows.per_identity * rows.width
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        for piece in rows:
            self._file.write(piece.numpy().data)
        self._file.flush()

    def __getitem__(self, old_n: np.ndarray) -> Tensor:
        """Return fp32 rows [n, K, D] of some identities, as they are in the checkpoint."""
        found = torch.empty(len(old_n), *self._shape)
        view, size = found.view(-1).view(torch.uint8).numpy().data, self._bytes
        ends = [*np.flatnonzero(np.diff(old_n) != 1) + 1, len(old_n)] if len(old_n) else []
        for low, high in pairwise([0, *ends]):
            wanted, at = view[low * size : high * size], int(old_n[low]) * size
            while wanted:
                count = os.preadv(self._file.fileno(), [wanted], at)
                assert count, "it has all identities"
                wanted, at = wanted[count:], at + count
        return found


def new_rows(
    old: OldRows,
    stored: StoredRows,
    olds: np.ndarray,
    news: np.ndarray,
    count: int,
    mean: Mean | None,
) -> Iterator[Tensor]:
    """Yield the rows [n * K, D] of all new identities in order.

    A merged row has the mean direction and the mean length of those that it is made of; one that
    only moves is not rounded. An added one is what a new run would begin with; with ``mean`` it is
    as long as the old ones are in the mean.

    Args:
        old: Rows of the old identities.
        stored: What they are.
        olds: Old identities that go on.
        news: What each becomes.
        count: New identities.
        mean: Of the images of added ones.
    """
    order = np.argsort(news, kind="stable")  # those of one new identity stay in their order
    typical = None if mean is None else _typical(old, olds, stored.piece)
    olds, news = olds[order], news[order]
    for low in range(0, count, stored.piece):
        some = range(low, min(low + stored.piece, count))
        pairs = slice(*np.searchsorted(news, (some.start, some.stop)))
        rows, times = _moved(old[olds[pairs]], news[pairs] - low, len(some))
        added = torch.nonzero(times == 0).flatten()
        if len(added):
            fresh = torch.empty(len(some) * stored.per_identity, stored.width)
            first = low * stored.per_identity
            numbers = range(first, first + len(fresh))
            fill_initial_(fresh, numbers, seed=stored.seed, device=fresh.device)
            rows[added] = fresh.view_as(rows)[added]
        if len(added) and mean is not None and typical is not None:
            mean_AD = F.normalize(mean(added + low)) * typical
            rows[added, :, : mean_AD.shape[1]] = mean_AD.unsqueeze(1)
        yield rows.flatten(0, 1)


def _moved(old_nKD: Tensor, new_n: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Rows of a piece, zeros where an identity is added, and of how many old ones each is made."""
    at = torch.from_numpy(new_n)
    shape = (count, *old_nKD.shape[1:])
    direction = torch.zeros(shape).index_add_(0, at, F.normalize(old_nKD, dim=2))
    length = torch.zeros(*shape[:2], 1).index_add_(0, at, old_nKD.norm(dim=2, keepdim=True))
    times = torch.bincount(at, minlength=count)
    once = times == 1
    rows = F.normalize(direction, dim=2) * length / times.clamp(min=1).view(-1, 1, 1)
    rows[at[once[at]]] = old_nKD[once[at]]
    return rows, times


def _typical(old: OldRows, olds: np.ndarray, piece: int) -> Tensor:
    """The mean length of the rows that go on."""
    starts = range(0, len(olds), piece)
    return torch.cat([old[olds[low : low + piece]].norm(dim=2) for low in starts]).mean()
