"""How many files and connections a rank may have open, and needs: counted before any is missing."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

from partialfc.config import ConfigError
from partialfc.distributed.links import rounds
from partialfc.runtime.place import Place, of_torchrun

_OTHERS = 256
"""Files of images, checkpoints and records, and what libraries open; an allowance."""
_OF_NCCL = 512
"""Of its proxies, rings and trees; an allowance, as it depends on the network."""
_LINKED = 2
"""Threads that ask other ranks beside the training: for flags, and for checkpoints."""
OF_STORE = 2
"""Connections of a rank to the store: the process group's and the watchdog's."""
_NO_LIMIT = 1 << 30
REMEDY = (
    "Raise the hard limit of what starts it: ulimit -Hn, LimitNOFILE= of a service, "
    "--ulimit nofile= of docker"
)


def raise_limit(place: Place) -> int:
    """Let this process open as many as it may; return how many.

    That of the torchrun above it, too, which on one of the hosts serves the store to every rank.
    """
    if sys.platform == "win32":
        return _NO_LIMIT
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if place.local_rank == 0 and sys.platform == "linux" and of_torchrun("cmdline"):
        with suppress(OSError, ValueError):
            _, most = resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)
            resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (most, most))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def needed(rank: int, size: int, *, nccl: bool, peers: bool = False) -> dict[str, int]:
    """Return how many a rank needs, by what for; those that are certain first.

    Beside NCCL it does not grow with W but with its logarithm, and on the rank that serves the
    store if torchrun does not. Copies for peers have a group of gloo of their own.
    """
    if size == 1:
        return {"files": _OTHERS}
    groups = peers + (not nccl)
    connections = {"gloo's connections with each other rank": groups * (size - 1)} if groups else {}
    serves = rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    return {
        **connections,
        "links with a few ranks": _LINKED * (2 * rounds(size) + 1),
        "the store": OF_STORE * (size + 1 if serves else 1),
        **({"NCCL": _OF_NCCL} if nccl else {}),
        "files": _OTHERS,
    }


def in_words(parts: Mapping[str, int], limit: int) -> str:
    """Say the sum and what it is of."""
    each = ", ".join(f"{count:,} for {what}" for what, count in parts.items())
    return f"{sum(parts.values()):,} descriptors of {limit:,} allowed ({each})"


def refuse_too_few(place: Place, *, nccl: bool, peers: bool = False) -> None:
    """Raise the limit, and look whether it is enough for what is certain.

    Raises:
        ConfigError: If it is not.
    """
    limit, parts = raise_limit(place), needed(place.rank, place.size, nccl=nccl, peers=peers)
    certain = sum(parts.values()) - parts["files"] - parts.get("NCCL", 0)
    if certain > limit:
        raise ConfigError(
            f"too many open files: a rank of {place.size:,} needs about {in_words(parts, limit)}. "
            f"{REMEDY}."
        )


def ran_out(
    error: BaseException, place: Place, *, nccl: bool, peers: bool = False
) -> ConfigError | None:
    """Return what to tell of an error that says that no more can be opened; ``None`` of another."""
    first = next((one for one in _causes(error) if _says_so(one)), None)
    if first is None:
        return None
    parts = in_words(needed(place.rank, place.size, nccl=nccl, peers=peers), raise_limit(place))
    return ConfigError(
        f"too many open files ({str(first).splitlines()[0]}): a rank of {place.size:,} needs about "
        f"{parts}. {REMEDY}."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    return isinstance(error, OSError | RuntimeError) and os.strerror(errno.EMFILE) in str(error)
