"""Gathers queries and whom their rows name, and refuses what is no identity.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, A = those of all
copies of the centers, D = query, K = identities of a row, M = norm and weights, P = K * B pairs of
a row and one of its identities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.distributed.batches import Batches
from partialfc.distributed.copies import Copies
from partialfc.distributed.shares import Shares
from partialfc.head.options import Several
from partialfc.head.sampling import refuse_unknown
from partialfc.head.several import NONE, Labels, distinct, filled, refuse_weights
from partialfc.pinned import to_device


@dataclass(frozen=True, slots=True)
class Gathered:
    """The batch of all ranks that hold a copy of the centers together.

    Attributes:
        query_BD: In the operand dtype.
        norm_B: fp32 lengths of the embeddings; ``None`` if not wanted.
        identities_P: int64, those of all rows, then their second ones; -1 is none.
        every_P: Those of the batches of all copies of the centers.
        labels: Whom the rows name.
    """

    query_BD: Tensor
    norm_B: Tensor | None
    identities_P: Tensor
    every_P: Tensor
    labels: Labels


class Gathering:
    """Gathers the batches of a head.

    Args:
        copies: Which ranks hold the centers together.
        num_identities: C.
        several: What rows of several identities, or of none, are to the loss; ``None``: every row
            has one.
        binary: Whether each center is a question of its own.
        device: Of the head and of the ranks' collectives.
    """

    def __init__(
        self,
        copies: Copies,
        num_identities: int,
        several: Several | None,
        *,
        binary: bool,
        device: torch.device,
    ) -> None:
        self._several, self._num_identities, self._binary = several, num_identities, binary
        self._copies, self._device = copies, device
        self._batches, self._across = Batches(copies.within), Batches(copies.across)
        self._steps = Batches(copies.every, "steps", beside=True)

    @property
    def most(self) -> int:
        """K, 1 where each row has one identity."""
        return 1 if self._several is None else self._several.most

    def step(self, identities: Tensor, shares: Shares | None) -> Tensor:
        """Return all identities of a step, [B] or [B, K]: those of several ranks on the device.

        Collective: one all-gather, or two. No host synchronisation.

        Args:
            identities: int64 [any] or [any, at most K], of this rank.
            shares: The numbers of all ranks where they differ.
        """
        own = filled(identities, self.most)
        own = own.flatten() if self._several is None else own
        if self._copies.every.size > 1:
            own = to_device(own, self._device)
        return self._steps.gather_identities(own, shares)

    def names(self, identities: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`step` did as [P], and the fraction of the rows that name any, if they
        need not.

        Raises:
            ValueError: If one is unknown.
        """
        if self._several is None:
            refuse_unknown(identities, self._num_identities)
            return identities, None
        refuse_unknown(identities, self._num_identities, none=True)
        return identities.T.flatten(), (identities != NONE).any(1).float().mean()

    def batch(
        self,
        query_bD: Tensor,
        identities: Tensor,
        weights: Tensor | None,
        norm_b: Tensor | None,
        shares: Shares | None,
        fraction: Tensor | None,
    ) -> Gathered:
        """Return the batch of all ranks, on the device; collective as :meth:`Batches.gather`.

        With several copies of the centers it is that of a copy's ranks, and its identities go to
        the other copies: one all-gather more of 8 bytes an identity, and one where a batch is
        larger than the last.

        Args:
            query_bD: Of this rank.
            identities: int64 [b] or [b, at most K].
            weights: Of the same shape, if the loss is ``"soft"``.
            norm_b: fp32, if the margin needs it.
            shares: b of every rank of the copy where it is not equal.
            fraction: Of :meth:`step`, if the batch is a part of one.
        """
        identities = to_device(identities, self._device)
        if weights is not None:
            weights = to_device(weights, self._device)
        if self._several is None:
            sent = query_bD, identities.flatten(), norm_b
            query_BD, identities_B, norm_B, every_B = self._gather(*sent, shares)
            labels = Labels.single(len(query_BD))
            return Gathered(query_BD, norm_B, identities_B, every_B, labels)
        identities_bK, weights_bK = distinct(identities, weights, self._several.most)
        numbers = [] if norm_b is None else [norm_b.unsqueeze(1)]
        numbers += [] if weights_bK is None else [weights_bK]
        number_bM = torch.cat(numbers, dim=1) if numbers else None
        sent = query_bD, identities_bK, number_bM
        query_BD, identities_BK, number_BM, every_AK = self._gather(*sent, shares)
        norm_B = weights_BK = None
        if number_BM is not None and norm_b is not None:
            norm_B = number_BM[:, 0].contiguous()
        if number_BM is not None and weights_bK is not None:
            weights_BK = number_BM[:, -self._several.most :]
        if self._copies.count > 1 and fraction is None:
            fraction = (every_AK != NONE).any(1).float().mean()
        labels = Labels.of(
            identities_BK, weights_BK, self._several, binary=self._binary, fraction=fraction
        )
        every_P = every_AK.T.flatten()
        own_P = every_P if every_AK is identities_BK else identities_BK.T.flatten()
        return Gathered(query_BD, norm_B, own_P, every_P, labels)

    def _gather(
        self,
        query_bD: Tensor,
        identities: Tensor,
        number: Tensor | None,
        shares: Shares | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Gather over the ranks of a copy, and identities over copies; refuse what cannot be.

        What the ranks of one copy refuse all ranks do: they bring no row to the others then, which
        is another number than theirs.
        """
        problem: ValueError | None = None
        gathered = query_bD, identities, number
        try:
            gathered = self._batches.gather(*gathered, shares)
            numbers_BM = gathered[2]
            if self._several is not None and self._several.loss == "soft":
                assert numbers_BM is not None
                refuse_weights(numbers_BM[:, -self._several.most :])
        except ValueError as error:
            problem = error
        brought = gathered[1] if problem is None else identities[:0]
        try:
            every = self._across.gather_identities(brought)
        except ValueError as error:
            raise problem or error from None
        if problem is not None:
            raise problem
        refuse_unknown(every, self._num_identities, none=self._several is not None)
        return *gathered, every
