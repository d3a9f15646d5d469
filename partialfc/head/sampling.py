"""The sampled class centers of one step: all positives of the global batch, and keyed negatives.

It is made on the host, which then knows how many rows a step has: a GPU is never asked. Every
canonical shard orders its rows by a permutation keyed by (seed, step, shard) and samples the
first ``quota`` of them. A positive that is not among them takes the place of the last negative. So
the negatives are uniform without replacement given the positives, any number of ranks samples the
same rows, and nothing costs time or memory in the size of the shard. Centers near to the positives
are taken as positives are, where they are asked for.

Shape suffixes: B = rows of the gathered batch, n = sampled rows, P = distinct positives on this
rank or all that a step was fixed for, N = centers near to them, Q = positives and such centers, V =
canonical shards of this rank, M = those beyond the quota.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from partialfc import keyed as permutation
from partialfc.head.nearest import NearestCenters, first_of_shards
from partialfc.head.options import Nearest, Negatives, NegativesName
from partialfc.head.several import NONE
from partialfc.head.sharding import Sharding
from partialfc.keyed import key, keys

NOT_LOCAL = -1
"""Target of a row whose class center lives on another rank."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows of this rank in use at one step.

    Attributes:
        rows: int64 [n] shard-local rows, distinct; ``None`` for all rows in order.
        target_B: int64 column of each row's own class center, or ``NOT_LOCAL``.
        log_weight_n: fp32, log of how many rows each stands for; ``None``: each for itself.
        host_n: ``rows`` on the host.
    """

    rows: Tensor | None
    target_B: Tensor
    log_weight_n: Tensor | None = None
    host_n: Tensor | None = None


class KeyedSampler:
    """Samples this rank's rows as a function of seed, step, canonical shard and positives.

    Args:
        sharding: The cut of the identities.
        rank: This rank.
        sample_rate: Fraction of a canonical shard's rows sampled per step, positives included, in
            (0, 1]. A shard with more positives than that samples its positives only.
        seed: The run's seed.
        negatives: ``"weighted"`` lets each stand for the rows that it was drawn among, and draws at
            least one from each shard that has any. So do ``"nearest"`` and its options.
        nearest: Whose rows near to the positives are in the sample for certain, each for itself.
    """

    def __init__(
        self,
        sharding: Sharding,
        rank: int,
        *,
        sample_rate: float,
        seed: int,
        negatives: Negatives = "uniform",
        nearest: NearestCenters | None = None,
    ) -> None:
        if negatives not in get_args(NegativesName) and not isinstance(negatives, Nearest):
            names = ", ".join(get_args(NegativesName))
            raise ValueError(f"negatives must be one of {names}, got {negatives!r}.")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}.")
        shards = sharding.shards(rank)
        self.owned = sharding.owned(rank)
        self.every, self._weighted = sample_rate == 1, negatives != "uniform"
        self.nearest = nearest
        self._seed = seed
        self._shard_V = np.arange(shards.start, shards.stop)
        start = np.array([sharding.start(v) for v in range(shards.start, shards.stop + 1)])
        self._start_V = torch.from_numpy(start[:-1] - self.owned.start)
        self._size_V = torch.from_numpy(np.diff(start))
        # Of all ranks' shards, so that any world size permutes a shard in the same way.
        self._largest = -(-sharding.num_identities // sharding.canonical_shards)
        self._quota_V = torch.from_numpy(
            np.array([sharding.quota(v, sample_rate) for v in shards], np.int64)
        )

    def __call__(self, step: int, identities_B: Tensor) -> Sample:
        """Return the sample of ``step`` for a global batch, on the host; no collective.

        Args:
            step: Optimizer steps taken so far.
            identities_B: int64 global identities, in [0, C), the same on every rank; -1 is none. On
                the host, or a GPU is waited for.
        """
        identities_B = identities_B.cpu()
        local_B = identities_B - self.owned.start
        is_local_B = (local_B >= 0) & (local_B < len(self.owned))
        if self.every or not len(self.owned):
            rows = None if self.every else local_B.new_empty(0)
            return Sample(rows, torch.where(is_local_B, local_B, NOT_LOCAL))

        positive_P, which_B = torch.unique(local_B[is_local_B], return_inverse=True)
        certain_Q = positive_P
        if self.nearest is not None:
            certain_Q = self._with_nearest(self.nearest, positive_P, identities_B)
        rows_n, log_weight_n = self._sample(step, certain_Q)
        target_B = torch.full_like(identities_B, NOT_LOCAL)
        target_B[is_local_B] = torch.searchsorted(rows_n, positive_P)[which_B]
        return Sample(rows_n, target_B, log_weight_n)

    def _with_nearest(
        self, nearest: NearestCenters, positive_P: Tensor, identities_B: Tensor
    ) -> Tensor:
        """Add rows near to the batch's positives: of each shard at most a share of its negatives.

        Which ones depends on the batch and the lists alone, so what is drawn afterwards is uniform
        among what is left.
        """
        own_N, place_N = nearest.near(identities_B.numpy())
        positive = positive_P.numpy()
        other_N = ~np.isin(own_N, positive)
        start_V = self._start_V.numpy()
        positives_V = np.bincount(
            np.searchsorted(start_V, positive, "right") - 1, minlength=len(start_V)
        )
        left_V = np.maximum(self._quota_V.numpy() - positives_V, 0)
        most_V = (left_V * nearest.options.share).astype(np.int64)
        taken = first_of_shards(own_N[other_N], place_N[other_N], start_V, most_V)
        return torch.from_numpy(np.sort(np.concatenate([positive, taken])))

    def _sample(self, step: int, certain_Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sampled rows [n] with some that are certain, ascending, and their weights."""
        start_V, size_V, device = self._start_V, self._size_V, certain_Q.device
        key_V = torch.from_numpy(keys(self._shard_V, key(self._seed, "negatives", step)))
        shard_Q = torch.bucketize(certain_Q, start_V, right=True) - 1
        certain_V = shard_Q.bincount(minlength=len(start_V))
        fewest_V = certain_V + 1 if self._weighted else certain_V
        quota_V = torch.maximum(self._quota_V, fewest_V).minimum(size_V)
        stop_V = quota_V.cumsum(0)
        offset_V = stop_V - quota_V

        # Columns in the order of the permutation: place k of a shard holds its k-th row.
        shard_n = torch.repeat_interleave(quota_V)
        place_n = torch.arange(len(shard_n), device=device) - offset_V[shard_n]
        rows_n = (
            self._permute(place_n, size_V[shard_n], key_V[shard_n], inverse=False)
            + start_V[shard_n]
        )

        # A certain row knows its place by the inverse permutation. Those beyond the quota take the
        # last places of their shard that hold none.
        place_Q = self._permute(
            certain_Q - start_V[shard_Q], size_V[shard_Q], key_V[shard_Q], inverse=True
        )
        column_Q = offset_V[shard_Q] + place_Q
        beyond_Q = place_Q >= quota_V[shard_Q]
        free_n = torch.ones_like(rows_n)
        free_n[column_Q[~beyond_Q]] = 0
        count_n = free_n.cumsum(0)
        shard_M = shard_Q[beyond_Q]
        beyond_V = shard_M.bincount(minlength=len(start_V))
        nth_M = torch.arange(len(shard_M), device=device) - (beyond_V.cumsum(0) - beyond_V)[shard_M]
        last_M = count_n[stop_V[shard_M] - 1]
        column_M = torch.searchsorted(count_n, last_M - nth_M)
        rows_n[column_M] = certain_Q[beyond_Q]
        # Ascending, so that a step goes through the memory of its rows from one end to the other.
        rows_n, order_n = rows_n.sort()
        log_weight_n = None
        if self._weighted:
            free_n[column_M] = 0
            among_V, drawn_V = size_V - certain_V, quota_V - certain_V
            log_V = (among_V.double() / drawn_V).log().float()
            log_weight_n = torch.where(free_n > 0, log_V[shard_n], 0.0)[order_n]
        return rows_n, log_weight_n

    def _permute(self, index: Tensor, size: Tensor, key: Tensor, *, inverse: bool) -> Tensor:
        """By numpy, which takes a third of torch's time."""
        walk = permutation.unpermute if inverse else permutation.permute
        arrays = (index.numpy(), size.numpy(), key.numpy())
        return torch.from_numpy(walk(*arrays, largest=self._largest))


def refuse_unknown(identities: Tensor, num_identities: int, *, none: bool = False) -> None:
    """Refuse an identity outside [0, C): all ranks see the same ones, so all refuse together.

    Args:
        identities: int64, of one a row or several.
        num_identities: C.
        none: Whether -1 may be in the place of one.

    Raises:
        ValueError: If there is one; on a GPU, a device-side assertion fails instead.
    """
    known = (identities >= (NONE if none else 0)) & (identities < num_identities)
    if known.device.type != "cpu":
        torch._assert_async(known.all(), f"an identity is not in [0, {num_identities})")
    elif not known.all():
        where, found = int((~known).nonzero()[0][0]), int(identities[~known][0])
        also = ", or -1 for none" if none else ""
        raise ValueError(
            f"identities must be in [0, {num_identities}){also}, got {found} at "
            f"position {where} of the global batch; num_identities of the head must cover the data."
        )


def refuse_unfixed(identities_B: Tensor, fixed_P: Tensor) -> None:
    """Refuse an identity that the sample of the step was not fixed for: it has no target.

    Args:
        identities_B: int64 identities of a micro-batch; -1 is none.
        fixed_P: int64 identities that the sample was fixed for, ascending.

    Raises:
        ValueError: If there is one; on a GPU, a device-side assertion fails instead.
    """
    place_B = torch.searchsorted(fixed_P, identities_B).clamp(max=len(fixed_P) - 1)
    fixed_B = (fixed_P[place_B] == identities_B) | (identities_B < 0)
    if fixed_B.device.type != "cpu":
        torch._assert_async(fixed_B.all(), "an identity was not given to sample_step")
    elif not fixed_B.all():
        raise ValueError(
            f"identity {int(identities_B[~fixed_B][0])} was not given to sample_step, which "
            "fixed the centers of this step; give it those of all micro-batches, or call it "
            "after what is only looked at."
        )
