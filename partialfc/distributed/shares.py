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


def wrong_copies(ranks_per_copy: int, ranks: int) -> str:
    """Return what is wrong with so many ranks a copy, or ""."""
    if ranks_per_copy >= 1 and (ranks % ranks_per_copy == 0 or ranks < ranks_per_copy):
        return ""
    fits = [size for size in range(1, ranks + 1) if ranks % size == 0]
    below = max((size for size in fits if size <= ranks_per_copy), default=1)
    return (
        f"ranks_per_copy = {ranks_per_copy}: must be a number that the {ranks} ranks divide by, as "
        f"{below}. Or leave it out: all ranks then hold the class centers together."
    )


def uneven_copies(ranks_per_copy: int, shares: Shares) -> str:
    """Return what is wrong with copies that have not as many rows as each other, or ""."""
    starts = range(0, len(shares.sizes), ranks_per_copy)
    rows = [sum(shares.sizes[start : start + ranks_per_copy]) for start in starts]
    if len({*rows}) == 1:
        return ""
    return (
        f"ranks_per_copy = {ranks_per_copy}: every copy of the class centers must have as many "
        f"rows of a batch, and they have {min(rows)} to {max(rows)}"
    )
