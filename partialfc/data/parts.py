"""Which set of images each place of a global batch is of.

Shape suffix: B = places of a global batch.
"""

from functools import lru_cache
from math import lcm

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=16)
def parts_of_batch(images: tuple[int, ...], together: int = 1) -> NDArray[np.int64]:
    """Return the number of the set [B] that each place of a global batch is of.

    A rank takes a contiguous slice of a batch, and a micro-batch one of that, so the sets are
    spread evenly. Of k sets, each has at any b places in a row its share, b times its part of the
    batch, to within 2 - 1 / (k - 1) images: one image of two sets, less than two of any number of
    them. It is the order of Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32,
    1980), where no beginning of the batch is further from any share than half of that. The same in
    every batch, on any number of ranks.

    Args:
        images: Of each set in a batch; each >= 1.
        together: Places in a row that are of one set; divides all ``images``. The bound is then of
            such groups.

    Returns:
        int64 [B], B the sum of ``images``. It is kept for the next call, so it cannot be written
        to.
    """
    groups = [count // together for count in images]
    part_B = np.repeat(np.fromiter(_in_turn(groups), np.int64, sum(groups)), together)
    part_B.flags.writeable = False
    return part_B


def _in_turn(counts: list[int]) -> list[int]:
    """Every set as often as its count: of those that may come, the one that must come soonest.

    ``due`` is a set's share of the places so far less what it was given, in units of 1 / (unit B)
    images, so that all numbers are whole and nothing is rounded.
    """
    if len(counts) == 1:
        return [0] * counts[0]
    places, unit, common = sum(counts), 2 * (len(counts) - 1), lcm(*counts)
    given, turns = [0] * len(counts), []
    for place in range(1, places + 1):
        due = [unit * (place * n - got * places) for n, got in zip(counts, given, strict=True)]
        may = [s for s in range(len(counts)) if due[s] >= places]
        chosen = min(may, key=lambda s: ((unit - 1) * places - due[s]) * (common // counts[s]))
        given[chosen] += 1
        turns.append(chosen)
    return turns
