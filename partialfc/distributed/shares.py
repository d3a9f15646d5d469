"""How a batch is cut for ranks that it does not divide by.

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, W = ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shares:
    """How many rows of a batch each rank has; collectives carry as many as the largest has.

    Attributes:
        sizes: b of every rank, by rank.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, ranks: int, multiple: int = 1) -> "Shares":
        """Return the multiples of a number that are the shares and differ by one of it at most.

        Args:
            rows: B; divides by ``multiple``.
            ranks: W, at most B / ``multiple``.
            multiple: Micro-batches of a step: they are as large as each other on every rank.
        """
        fewest, more = divmod(rows // multiple, ranks)
        return cls(tuple(multiple * (fewest + (rank < more)) for rank in range(ranks)))

    def of_each(self, parts: int) -> "Shares":
        """Return the shares of each of some micro-batches of one size."""
        return Shares(tuple(size // parts for size in self.sizes))

    @property
    def largest(self) -> int:
        """Rows of the largest share."""
        return max(self.sizes)

    @property
    def equal(self) -> bool:
        """Whether all have the same size."""
        return min(self.sizes) == self.largest

    def rows(self, rank: int) -> slice:
        """Return where a rank's rows are among all [B]."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])
