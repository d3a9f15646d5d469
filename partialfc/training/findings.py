"""What a look at the machines of a run finds, on all ranks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from partialfc.distributed.agreement import collective_device
from partialfc.distributed.ranks import gather_rows
from partialfc.runtime.process import Runtime


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: Of the check.
        value: The numbers, in words.
        level: Whether to go on.
        remedy: What to do about it, if it is not fine.
    """

    name: str
    value: str
    level: Literal["fine", "warning", "refused"] = "fine"
    remedy: str = ""


def of_all(values: list[float], runtime: Runtime) -> Tensor:
    """Numbers of all ranks, [W, n] fp64 on the host: one all-gather."""
    row = torch.tensor([values], dtype=torch.float64)
    if runtime.ranks.size == 1:
        return row
    return gather_rows(row.to(collective_device(runtime.ranks)), runtime.ranks).cpu()


def ranks_with(flags: list[bool]) -> list[int]:
    """Return the ranks whose flag is set."""
    return [rank for rank, flag in enumerate(flags) if flag]
