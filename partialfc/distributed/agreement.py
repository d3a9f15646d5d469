"""What one rank knows and all must act on: small collectives, each with a host synchronisation."""

import torch
import torch.distributed as dist
from torch import Tensor

from partialfc.distributed.ranks import Ranks


def all_agree(fine: bool, ranks: Ranks) -> bool:
    """Whether every rank is fine. Collective: one all-reduce; a host synchronisation."""
    if ranks.size == 1:
        return fine
    flag = torch.tensor(int(fine), device=collective_device(ranks))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=ranks.group)
    return bool(flag.item())


def from_leader(value: int, ranks: Ranks) -> int:
    """Return rank 0's integer on every rank. Collective: one broadcast; a host synchronisation."""
    if ranks.size == 1:
        return value
    shared: Tensor = torch.tensor(value, dtype=torch.int64, device=collective_device(ranks))
    dist.broadcast(shared, 0, group=ranks.group)
    return int(shared.item())


def words_of_any(own: str, ranks: Ranks) -> str:
    """Return on every rank the words of the lowest rank that has any, or "" if none has.

    For an error that all ranks raise and one can explain: whichever rank's message is read first
    names the cause. Collective: one all-reduce, and two broadcasts if there are words; host
    synchronisations.
    """
    if ranks.size == 1:
        return own
    device = collective_device(ranks)
    speaker = torch.tensor(ranks.rank if own else ranks.size, device=device)
    dist.all_reduce(speaker, dist.ReduceOp.MIN, group=ranks.group)
    source = int(speaker.item())
    if source == ranks.size:
        return ""
    encoded = own.encode(errors="replace")
    length = torch.tensor(len(encoded), device=device)
    dist.broadcast(length, group_src=source, group=ranks.group)
    text = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if ranks.rank == source:
        text.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(text, group_src=source, group=ranks.group)
    return bytes(text.tolist()).decode()


def largest(value: int, ranks: Ranks) -> int:
    """Return the largest integer of all ranks. Collective: one all-reduce."""
    if ranks.size == 1:
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=collective_device(ranks))
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=ranks.group)
    return int(shared.item())


def total(value: int, ranks: Ranks) -> int:
    """Return the sum of an integer over all ranks. Collective: one all-reduce."""
    if ranks.size == 1:
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=collective_device(ranks))
    dist.all_reduce(shared, group=ranks.group)
    return int(shared.item())


def collective_device(ranks: Ranks) -> torch.device:
    """Where a tensor must be for a collective of these ranks."""
    if dist.get_backend(ranks.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
