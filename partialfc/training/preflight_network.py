"""Looks at what is between the hosts: how fast it is, and whether it bears so many ranks."""

import ipaddress
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from partialfc.config import Config
from partialfc.distributed.agreement import all_agree, collective_device
from partialfc.distributed.ranks import gather_rows, sum_to_owner
from partialfc.runtime import descriptors
from partialfc.runtime.network import own_address
from partialfc.runtime.place import own_place
from partialfc.runtime.process import Runtime
from partialfc.training.findings import Finding, of_all

_REPEATS = 10
_GPU_BYTES_PER_SECOND = 1e9
_SECONDS_OF_NAMES = 10.0


def open_files(config: Config, runtime: Runtime) -> Iterator[Finding]:
    """Whether every rank may have as many open as it needs. Collective: one all-gather."""
    ranks, place = runtime.ranks, own_place()
    limit = int(of_all([float(descriptors.raise_limit(place))], runtime).min())
    groups = descriptors.Groups.of(config, place, nccl=runtime.device.type == "cuda")
    parts = descriptors.needed(ranks.rank, ranks.size, groups)
    short = sum(parts.values()) > limit
    yield Finding(
        "open files",
        descriptors.in_words(parts, limit),
        "warning" if short else "fine",
        f"{descriptors.REMEDY}.",
    )


def names(runtime: Runtime) -> Iterator[Finding]:
    """What the store's server waits for: it asks for the name of each that connects, one after the
    other. Measured on rank 0, of the last rank's address. Collective: two all-gathers."""
    ranks, own = runtime.ranks, own_address()
    number = 0 if ":" in own else int(ipaddress.IPv4Address(own))
    last = int(of_all([float(number)], runtime)[-1])
    if ranks.size == 1 or not last:
        return
    start = time.monotonic()
    with suppress(OSError):
        if runtime.leads:
            socket.getnameinfo((str(ipaddress.IPv4Address(last)), 0), socket.NI_NUMERICSERV)
    seconds = of_all([time.monotonic() - start], runtime)[0].item()
    whole = seconds * descriptors.OF_STORE * ranks.size
    yield Finding(
        "names",
        f"{1e3 * seconds:.1f} ms for the name of an address, {whole:.1f} s of each start for "
        f"{descriptors.OF_STORE * ranks.size:,} connections to the store",
        "warning" if whole > _SECONDS_OF_NAMES else "fine",
        "Write all addresses into /etc/hosts of rank 0's host, or give it a resolver that keeps "
        "answers.",
    )


def collectives(config: Config, runtime: Runtime) -> Iterator[Finding]:
    """At the size of the head's: gathered embeddings forth, their gradients back."""
    ranks = runtime.ranks
    if ranks.size == 1:
        return
    rows = config.shares(ranks.size).largest
    own = torch.zeros(rows, config.backbone.embedding_dim, device=collective_device(ranks))
    whole = own.new_zeros(rows * ranks.size, own.shape[1])
    kinds: tuple[tuple[str, Callable[[], Tensor]], ...] = (
        ("all-gather", lambda: gather_rows(own, ranks)),
        ("reduce-scatter", lambda: sum_to_owner(whole, ranks)),
    )
    for name, collective in kinds:
        seconds = _timed(collective, runtime)
        moved = whole.numel() * whole.element_size() * (ranks.size - 1) / ranks.size
        value = (
            f"{1e3 * seconds:.2f} ms for {whole.numel() * 4 / 2**20:.3g} MiB, "
            f"{moved / seconds / 1e9:.2f} GB/s"
        )
        slow = runtime.device.type == "cuda" and moved / seconds < _GPU_BYTES_PER_SECOND
        large = moved > 16 << 20  # below it, latency is what is measured
        yield Finding(
            name,
            value,
            "warning" if slow and large else "fine",
            "Look at NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO: is it on the fast network?",
        )


def _timed(collective: Callable[[], Tensor], runtime: Runtime) -> float:
    """Median seconds of the slowest rank."""
    seconds = []
    for repeat in range(_REPEATS + 3):
        all_agree(True, runtime.ranks)
        start = time.monotonic()
        collective()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()  # host sync: it is measured
        if repeat >= 3:
            seconds.append(time.monotonic() - start)
    return of_all([statistics.median(seconds)], runtime).max().item()
