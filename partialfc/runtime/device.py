"""The device and the threads of one rank."""

import os
import zlib

import torch
from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from partialfc import cores
from partialfc.config import ConfigError
from partialfc.distributed.agreement import collective_device
from partialfc.distributed.ranks import Ranks, gather_rows
from partialfc.runtime.place import Place, set_own_threads

_ASK_FOR_GPUS = {
    "CUDA_VISIBLE_DEVICES": ("", "-1", "NoDevFiles"),
    "SLURM_GPUS_PER_NODE": ("", "0"),
    "SLURM_GPUS_ON_NODE": ("", "0"),
}
"""What says that a run is to have GPUs, and the values that say that it is not."""


def device_of(wanted: str, place: Place) -> torch.device:
    """Return the device of a rank. May talk to the other ranks of this host, before any collective.

    Args:
        wanted: ``run.device``.
        place: Of the rank.

    Raises:
        ConfigError: If GPUs were asked for and there are none, or fewer than ranks.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    asking = [
        f"{name} = {os.environ[name]!r}"
        for name, nothing in _ASK_FOR_GPUS.items()
        if os.environ.get(name, "").strip() not in nothing
    ]
    if wanted == "cuda":
        asking = ['run.device = "cuda"']
    if not gpus and asking:
        raise ConfigError(
            f"{asking[0]}: a GPU is asked for, and torch sees no GPU here. Look at nvidia-smi, "
            'install a CUDA build of torch, or set run.device = "cpu".'
        )
    if not gpus:
        return torch.device("cpu")
    if place.local_size <= gpus:
        return torch.device("cuda", place.local_rank)
    if gpus == 1 and _has_its_own(place):
        return torch.device("cuda", 0)
    raise ConfigError(
        f"run.device = {wanted!r}: {place.local_size} ranks on this host for {gpus} GPUs, and each "
        f'rank needs its own. Start {gpus}, or set run.device = "cpu".'
    )


_met: list[Store] = []
"""Kept, as rank 0 may serve it: it would end while others still ask. The process group that comes
after joins it, as torch has one server a port in a process."""


def _has_its_own(place: Place) -> bool:
    """Whether the one GPU that each rank of this host sees is another one: ``--gpus-per-task=1``.

    The ranks tell each other its UUID by the store through which they meet.
    """
    store, _, _ = next(rendezvous("env://", rank=place.rank, world_size=place.size))
    _met.append(store)
    store.set(f"gpu of rank {place.rank}", str(torch.cuda.get_device_properties(0).uuid))
    first = place.rank - place.local_rank
    ranks = range(first, first + place.local_size)
    return len({store.get(f"gpu of rank {rank}") for rank in ranks}) == place.local_size


def threads_of(wanted: int | None, ranks: Ranks, place: Place) -> int:
    """Return the CPU threads of torch's operators on this rank. Collective: one all-gather.

    A setting comes first, then the user's OMP_NUM_THREADS; else the CPUs that this rank may use are
    divided among the ranks that may use the same ones, and a quota among those of this host.
    """
    allowed = cores.affinity()
    own = zlib.crc32(repr((place.rank - place.local_rank, sorted(allowed))).encode())
    row = torch.tensor([[own]])
    if ranks.size > 1:
        row = gather_rows(row.to(collective_device(ranks)), ranks).cpu()
    if wanted is not None:
        return wanted
    if set_own_threads():
        return torch.get_num_threads()
    share = len(allowed) // int((row == own).sum())
    limit = cores.quota()
    return max(1, min(share, limit // place.local_size) if limit else share)
