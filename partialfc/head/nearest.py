"""Which centers are near to those of a batch: lists of neighbours, searched again now and then.

A rank keeps the lists of its own rows, which a checkpoint holds by row, and from all ranks' lists
those entries that are rows of its own: whose neighbours they are. So a step asks no other rank.
Both lie in host memory: 4 and 10 bytes an entry. In between two searches the lists stay as they
are, whatever the centers do; a search goes over all rows, since one that moved is a new neighbour
to rows that did not.

Shape suffixes: C = rows of this rank, D = embedding, E = entries of all lists that are rows of this
rank, J = sets of identities, N = neighbours of a batch on this rank, P = identities of a batch, T =
rows of a block, V = canonical shards of this rank, k = length of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.distributed.ranks import Ranks, gather_rows, max_over_ranks
from partialfc.head.neighbours import Rows, nearest_rows
from partialfc.head.options import Nearest, Sets
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.sharding import Sharding

LISTS = "neighbours"
"""Name of the lists in a checkpoint."""

_UNSEARCHED = -2
"""In a list that is not made yet."""
_BLOCK_ROWS = 1 << 18
"""Rows of all ranks whose lists are handed round at once."""

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of lists that are identities of this rank, ascending by whose list it is.

    Attributes:
        of_E: int32 identities, of any rank.
        own_E: int32 identities of this rank, from 0 on.
        place_E: int16 places in the lists.
    """

    of_E: NDArray[np.int32]
    own_E: NDArray[np.int32]
    place_E: NDArray[np.int16]


class NearestCenters:
    """The neighbours of all centers, and those of a batch.

    Args:
        options: How many, and when they are searched again.
        sharding: The cut of the identities.
        ranks: Those that share the head.
        dim: D, elements of a row that are looked at.
        per_identity: Rows of an identity.
        sets: Sets of identities that may have the same people: never each other's neighbours.
        device: Where a search is computed.
    """

    def __init__(
        self,
        options: Nearest,
        sharding: Sharding,
        ranks: Ranks,
        *,
        dim: int,
        per_identity: int = 1,
        sets: Sets | None = None,
        device: torch.device,
    ) -> None:
        owned = [sharding.owned(rank) for rank in range(ranks.size)]
        if sharding.num_identities * per_identity >= 1 << 31:
            raise ValueError(
                f'negatives = "nearest": lists number 2**31 rows, and {sharding.num_identities:,} '
                f"identities of {per_identity} have more. Use weighted."
            )
        self.options, self._ranks, self._device = options, ranks, device
        self._dim, self._per, self._owned = dim, per_identity, owned
        self._of_rank = [range(one.start * per_identity, one.stop * per_identity) for one in owned]
        self._first_of_set = self._share_JJ = None
        if sets is not None:
            first = [*accumulate(sets.sizes, initial=0)]
            self._first_of_set = torch.tensor(first[:-1]) * per_identity
            self._share_JJ = torch.zeros(len(sets.sizes), len(sets.sizes), dtype=torch.bool)
            for one, other in sets.pairs:
                self._share_JJ[one, other] = self._share_JJ[other, one] = True
        size = len(self._of_rank[ranks.rank]), options.neighbours
        self.lists = torch.full(size, _UNSEARCHED, dtype=torch.int32)
        """int32 [C, k] numbers of rows of the whole head, the nearest first; negative for none."""
        self._entries: _Entries | None = None
        self._looked_at: int | None = None

    def forget(self) -> None:
        """Take what the lists are now for what they are: they have been filled from outside."""
        self._entries = self._looked_at = None

    def due(self, step: int) -> bool:
        """Whether a step begins with a search."""
        return step % self.options.every_steps == 0

    @torch.no_grad()
    def refresh(self, optimizer: RowOptimizer) -> None:
        """Search again if the step is one of those, or there are no lists; before a step's sample.

        Collective, where something is done: see :func:`partialfc.head.neighbours.nearest_rows`; an
        all-gather for every block of lists; one all-reduce of [1] after a load.

        Args:
            optimizer: Of the centers.
        """
        step = optimizer.steps
        if self._looked_at == step:
            return
        due = self.due(step)
        if self._entries is None and not due:
            missing = torch.tensor(int((self.lists == _UNSEARCHED).any()), device=self._device)
            due = bool(max_over_ranks(missing, self._ranks))  # host sync
        if due:
            self._search(optimizer)
        if due or self._entries is None:
            self._entries = self._exchange()
        self._looked_at = step

    def _search(self, optimizer: RowOptimizer) -> None:
        """Make the lists anew. Where unsampled rows move, all of them catch up first."""
        optimizer.catch_up(None)
        optimizer.settle()
        rows = Rows(
            centers_CD=optimizer.centers.detach(),
            dim=self._dim,
            of_rank=self._of_rank,
            per_identity=self._per,
            first_of_set=self._first_of_set,
            share_JJ=self._share_JJ,
        )
        most = self.options.neighbours
        with torch.autocast(self._device.type, enabled=False):
            self.lists.copy_(nearest_rows(rows, most, self._ranks, self._device))

    def near(self, identities_P: Whole) -> tuple[Whole, Whole]:
        """Return the neighbours of a batch among the identities of this rank.

        No collective. They are the same for any order of the batch.

        Args:
            identities_P: Of the whole head; negative is none.

        Returns:
            own_N: int64 identities of this rank, from 0 on, ascending, distinct.
            place_N: int64, the first place that each has in a list of the batch.
        """
        entries = self._entries
        if entries is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        asked_P = np.unique(identities_P)
        first_P = np.searchsorted(entries.of_E, asked_P, "left")
        count_P = np.searchsorted(entries.of_E, asked_P, "right") - first_P
        before_P = count_P.cumsum() - count_P
        at = np.repeat(first_P - before_P, count_P) + np.arange(count_P.sum())
        own, place = entries.own_E[at].astype(np.int64), entries.place_E[at].astype(np.int64)
        order = np.lexsort((place, own))
        own, place = own[order], place[order]
        is_first = np.diff(own, prepend=-1) > 0
        return own[is_first], place[is_first]

    def _exchange(self) -> _Entries:
        """Hand the lists of all ranks round, and keep what is of this rank."""
        owned, most = self._owned[self._ranks.rank], self.options.neighbours
        low, high = owned.start * self._per, owned.stop * self._per
        part = -(-_BLOCK_ROWS // self._ranks.size)
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in self._of_rank]
        for start in range(0, max(map(len, self._of_rank)), part):
            own_Tk = self.lists[start : start + part]
            block_Tk = torch.full((part, most), _UNSEARCHED, dtype=torch.int32)
            block_Tk[: len(own_Tk)] = own_Tk
            every = gather_rows(block_Tk.to(self._device), self._ranks)
            for rank, one_Tk in enumerate(every.view(-1, part, most)):
                row_E, place_E = ((one_Tk >= low) & (one_Tk < high)).nonzero(as_tuple=True)
                of_E = (row_E + (self._of_rank[rank].start + start)) // self._per
                own_E = (one_Tk[row_E, place_E] - low) // self._per
                place_E = place_E.to(torch.int16)
                found[rank].append((of_E.int().cpu(), own_E.int().cpu(), place_E.cpu()))
        columns = zip(*(block for blocks in found for block in blocks), strict=True)
        return _Entries(*(torch.cat(column).numpy() for column in columns))


def first_of_shards(
    own_N: Whole, place_N: Whole, start_V: Whole, most_V: Sequence[int] | Whole
) -> Whole:
    """Return the identities that are taken, ascending: of each canonical shard the nearest.

    Args:
        own_N: Identities of the rank, from 0 on.
        place_N: How near each is: its place in a list.
        start_V: First identities of the shards.
        most_V: How many each takes.
    """
    shard_N = np.searchsorted(start_V, own_N, "right") - 1
    order_N = np.lexsort((own_N, place_N, shard_N))
    shard_N = shard_N[order_N]
    nth_N = np.arange(len(own_N)) - np.searchsorted(shard_N, shard_N)
    taken: Whole = np.sort(own_N[order_N][nth_N < np.asarray(most_V)[shard_N]])
    return taken
