"""One rank's process: its place among the ranks, its device, threads and seeds."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from partialfc.config import Config, ConfigError
from partialfc.distributed.agreement import from_leader
from partialfc.distributed.links import Links
from partialfc.distributed.ranks import Ranks
from partialfc.distributed.streams import Streams
from partialfc.errors import Preempted
from partialfc.keyed import key
from partialfc.runtime.beats import longest_patience
from partialfc.runtime.descriptors import Groups, ran_out, refuse_too_few
from partialfc.runtime.device import device_of, threads_of
from partialfc.runtime.network import (
    own_address,
    refuse_missing,
    refuse_unreachable,
    resolve_once,
    stale_store,
)
from partialfc.runtime.place import Place, own_place
from partialfc.runtime.watchdog import Watchdog

_LEAST_FOR_LINKS = 7200.0
"""Seconds: a slow file system may take an hour for one rank's part of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this process runs.

    Attributes:
        ranks: This rank among all.
        device: The one device of this rank.
        watchdog: Of the ranks, if one watches.
        patience: Seconds that a rank may hold up the others at most: the watchdog's.
    """

    ranks: Ranks
    device: torch.device
    watchdog: Watchdog | None = None
    patience: float = 7200.0

    def links(self, seconds: float | None = None) -> Links:
        """Link this rank with a few others, for what one thread asks them beside the training.

        Collective: see :class:`Links`.

        Args:
            seconds: How much later than this rank another may come to an agreement; by default as
                long as the watchdog lets it, and two hours at least.
        """
        longest = max(_LEAST_FOR_LINKS, self.patience) if seconds is None else seconds
        return Links(self.ranks, own_address(), longest)

    def streams(self, to: Collection[int], from_: Collection[int]) -> Streams:
        """Connect this rank with some that it sends bytes to, and with some that send it bytes.

        Collective: see :class:`Streams`.

        Args:
            to: Each names this rank in its ``from_``.
            from_: Each names this rank in its ``to``.
        """
        return Streams(self.ranks, to, from_, own_address(), max(_LEAST_FOR_LINKS, self.patience))

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.ranks.rank == 0


@contextmanager
def running(config: Config) -> Iterator[Runtime]:
    """Join the ranks that torchrun started, or be the only one, and leave them at the end.

    Raises:
        ConfigError: If the settings do not fit this machine or the number of ranks.
    """
    place = own_place()
    config.check(place.size)
    _check_network(config, place)
    device = device_of(config.run.device, place)
    torch.manual_seed(key(config.run.seed, "weights"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups = Groups.of(config, place, nccl=device.type == "cuda")
    refuse_too_few(place, groups)
    watchdog = None
    try:
        if place.size > 1:
            _join(config, device)
        ranks = Ranks.of()
        torch.set_num_threads(threads_of(config.run.threads, ranks, place))
        watchdog = _watchdog(config, ranks)
        yield Runtime(ranks, device, watchdog, longest_patience(config.run.hang_seconds))
    except Preempted:  # all ranks leave together, and wait to be queued again
        raise
    except BaseException as error:
        told = ran_out(error, place, groups) or error
        explained = told if watchdog is None else watchdog.explain(told)
        if explained is error:
            raise
        raise explained from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if watchdog is not None:  # until now it bounds the time that leaving takes
            watchdog.close()


def _join(config: Config, device: torch.device) -> None:
    """Join the other ranks; a collective may take as long as the watchdog lets a rank take."""
    patience = timedelta(seconds=longest_patience(config.run.hang_seconds))
    if device.type == "cuda":
        _record_flights(config.run.folder)
        dist.init_process_group("nccl", device_id=device, timeout=patience)
    else:
        dist.init_process_group("gloo", timeout=patience)


def _check_network(config: Config, place: Place) -> None:
    nccl = config.run.device != "cpu" and torch.cuda.device_count() > 0
    try:
        if place.size > 1:
            resolve_once()
            refuse_missing("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if nccl else []))
        warning = refuse_unreachable()
    except OSError as error:
        raise ConfigError(str(error)) from error
    for sentence in (warning, stale_store()):
        if sentence and place.local_rank == 0:
            print(f"warning: {sentence}", flush=True)


def local_rank() -> int:
    """This rank among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _watchdog(config: Config, ranks: Ranks) -> Watchdog | None:
    """The watchdog has a connection of its own to the store by which the ranks found each other."""
    if not config.run.hang_seconds:
        return None
    store = None
    if ranks.size > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=config.run.hang_seconds)
        server = TCPStore(address, port, is_master=False, timeout=patience)
        # Of this start alone: torchrun keeps the store when it starts the ranks again.
        store = PrefixStore(str(from_leader(time.time_ns(), ranks)), server)
    return Watchdog(ranks, config.run.folder, config.run.hang_seconds, store)


def _record_flights(folder: Path) -> None:
    """NCCL keeps its last collectives, and writes them when one does not return."""
    folder = folder / "nccl"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),  # its name before torch 2.9
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_")),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_")),
    ):
        os.environ.setdefault(name, value)
