"""Whether several copies of the class centers are still the same, by a digest of all bits.

Every copy is updated by the same sums, so only a fault makes them differ: of a memory, of a library
that does not give all ranks the same sum.

Shape suffixes: C = rows of this rank, D = elements of a row, G = copies, N = tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from partialfc.distributed.agreement import collective_device, words_of_any
from partialfc.distributed.copies import Copies
from partialfc.distributed.ranks import gather_rows
from partialfc.words import names_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS = 1 << 16
"""Summed at once: a sum of 64-bit integers copies what it sums."""


def drifted(tensors: Mapping[str, Tensor], copies: Copies) -> str:
    """Return on every rank where copies differ, in words; "" if they do not, or there is one.

    Collective with several copies: one all-gather of 8 bytes a tensor, one all-reduce, and two
    broadcasts if they differ; reads all rows once. Host synchronisations.

    Args:
        tensors: Of this rank by name, [C, ...] each.
        copies: Which ranks hold them.
    """
    if copies.count == 1:
        return ""
    digest_N = torch.stack([_digest(value).cpu() for value in tensors.values()])
    digest_GN = gather_rows(
        digest_N.unsqueeze(0).to(collective_device(copies.across)), copies.across
    )
    other_N = (digest_GN != digest_GN[0]).any(0).tolist()
    names = [name for name, other in zip(tensors, other_N, strict=True) if other]
    size, problem = copies.within.size, ""
    if names:
        holders = range(copies.within.rank, copies.every.size, size)
        problem = (
            f"{', '.join(names)}: {names_of(holders)} hold the same rows, and their bits differ. A "
            "memory or a network may be faulty: go on from the newest checkpoint, on other nodes"
        )
    return words_of_any(problem, copies.every)


def _digest(value: Tensor) -> Tensor:
    """int64 scalar: the sum of all elements' bits, each column with an odd factor of its own."""
    bits_CD = value.detach().view(_INTEGERS[value.itemsize]).flatten(1)
    odd_D = 2 * torch.arange(bits_CD.shape[1], device=value.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for piece in torch.split(bits_CD, _ROWS):
        total += (piece.sum(0, dtype=torch.int64) * odd_D).sum()
    return total
