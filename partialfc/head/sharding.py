"""Which identities a rank owns: pure integers, the same on every rank.

The identities are cut once into canonical shards, contiguous and equal to within one row. They
are fixed for a run, so what is keyed by them (the negatives of a step) does not depend on the
world size. A rank owns a contiguous run of whole canonical shards, or none where a small head lies
on some of the ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The cut of ``num_identities`` rows into canonical shards over ``world_size`` ranks.

    Attributes:
        num_identities: C, identities of the whole head; >= 1.
        canonical_shards: V, units that sampling is keyed by; >= world_size.
        world_size: W, ranks that train the head; >= 1.
        holders: Those of them that the shards lie on, in [0, W); ``None`` for all.

    Raises:
        ValueError: If a value is outside its range.
    """

    num_identities: int
    canonical_shards: int
    world_size: int
    holders: range | None = None

    def __post_init__(self) -> None:
        if self.num_identities < 1:
            raise ValueError(f"num_identities must be >= 1, got {self.num_identities}.")
        if not 1 <= len(self._holders) <= self.canonical_shards:
            raise ValueError(
                f"canonical_shards must be at least the number of ranks that they lie on, got "
                f"{self.canonical_shards} shards for {len(self._holders)} ranks; set "
                "head.canonical_shards to the largest number of ranks that the run will ever have, "
                "or more."
            )
        if (
            self._holders.step != 1
            or not 0 <= self._holders.start < self._holders.stop <= self.world_size
        ):
            raise ValueError(
                f"holders must be ranks in [0, {self.world_size}) that follow one another, got "
                f"{self.holders}."
            )

    @property
    def _holders(self) -> range:
        return range(self.world_size) if self.holders is None else self.holders

    def start(self, shard: int) -> int:
        """First identity of a canonical shard; ``start(V)`` is the number of identities."""
        return self.num_identities * shard // self.canonical_shards

    def shards(self, rank: int) -> range:
        """Canonical shards of a rank; ascending by rank, and empty where it holds none."""
        start, stop = (
            self.canonical_shards * min(max(place, 0), len(self._holders)) // len(self._holders)
            for place in (rank - self._holders.start, rank + 1 - self._holders.start)
        )
        return range(start, stop)

    def owned(self, rank: int) -> range:
        """Global identities of a rank; empty for some ranks when there are few identities."""
        shards = self.shards(rank)
        return range(self.start(shards.start), self.start(shards.stop))

    @property
    def fewest(self) -> int:
        """Identities of the rank that owns fewest, of those that own any."""
        every = (len(self.owned(rank)) for rank in range(self.world_size))
        return min(filter(None, every))

    def quota(self, shard: int, sample_rate: float) -> int:
        """Rows that a canonical shard samples per step.

        The quotas of all shards add up to ``round(sample_rate * C)``, at least one in all.
        """
        total = max(1, round(sample_rate * self.num_identities))
        start, stop = self.start(shard), self.start(shard + 1)
        return total * stop // self.num_identities - total * start // self.num_identities


GROWTH = 4
"""A run may grow to this many times the ranks of its first start."""

_SAMPLED_OF_A_SHARD = 32
_FEWEST_WEIGHTED = 16


def default_canonical_shards(
    num_identities: int, ranks: int = 1, *, weighted_rate: float | None = None
) -> int:
    """Return V for a head of ``num_identities``, >= ``ranks``, the most that it will be shared by.

    About 1024 identities a shard: fine enough that 7 ranks differ by a few percent in load, and
    no fewer than 64 shards, so that up to 64 ranks change nothing. With a ``weighted_rate``, the
    sample rate where each negative stands for those of its shard, some 32 sampled rows a shard, and
    16 shards at least: the fewer are drawn, the more one that is near to a row is made to count.
    """
    shards = min(max(num_identities // 1024, 64), 1024)
    if weighted_rate is not None:
        sampled = int(num_identities * weighted_rate)
        shards = min(shards, max(_FEWEST_WEIGHTED, sampled // _SAMPLED_OF_A_SHARD))
    return max(shards, ranks)
