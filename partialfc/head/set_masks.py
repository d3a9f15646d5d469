"""From the identities of a batch to the sets of identities that each row leaves out.

Shape suffixes: B = rows of the gathered batch, J = sets, K = identities of a row, n = sampled rows,
P = K * B pairs of a row and one of its identities.
"""

from itertools import accumulate

import torch
from torch import Tensor

from partialfc.head.options import Sets
from partialfc.head.tiles.set_mask import SetMask


class SetMasks:
    """Makes the masks of a head's batches.

    Args:
        sets: The cut of the identities; ``None`` for one set, which has no masks.
        owned: Identities of this rank.
        per_identity: Rows of an identity.
        device: Of the masks.
    """

    def __init__(
        self, sets: Sets | None, owned: range, per_identity: int, device: torch.device
    ) -> None:
        self._sets = sets
        if sets is None:
            return
        first = [*accumulate(sets.sizes, initial=0)]
        inside = (min(max(one, owned.start), owned.stop) - owned.start for one in first)
        self._rows = (*(one * per_identity for one in inside),)
        self._first_J = torch.tensor(first[:-1], device=device)
        self._share_JJ = torch.zeros(len(sets.sizes), len(sets.sizes), device=device)
        for one, other in sets.pairs:
            self._share_JJ[one, other] = self._share_JJ[other, one] = 1

    def __call__(self, identities_P: Tensor, most: int, row_n: Tensor | None) -> SetMask | None:
        """Return the mask of a batch, or ``None`` for none; no collective.

        A row leaves out the sets that may have the people of a set of its own, and never one of
        its own. A row of no identity leaves out none.

        Args:
            identities_P: int64 identities of all rows, then their second ones; -1 is none.
            most: K.
            row_n: int64 sampled rows of the shard, ascending; ``None`` for all.
        """
        if self._sets is None:
            return None
        # Of sets that begin at the same identity only the last can have it.
        set_KB = torch.bucketize(identities_P, self._first_J, right=True).view(most, -1) - 1
        every_J = torch.arange(len(self._first_J), device=set_KB.device)
        own_JB = (set_KB == every_J.view(-1, 1, 1)).any(1)
        masked_JB = (self._share_JJ @ own_JB.float() > 0) & ~own_JB
        return SetMask(self._rows, self._rows, masked_JB).among(row_n)
