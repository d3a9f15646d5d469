"""How many files and connections a rank may have open, and needs: counted before any is missing."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from partialfc.config import Config, ConfigError
from partialfc.config.heads import ranks_of_copies
from partialfc.distributed.links import rounds
from partialfc.runtime.place import Place, of_torchrun

_OTHERS = 256
"""Files of images, checkpoints and records, and what libraries open; an allowance."""
_OF_NCCL = 512
"""Of its proxies, rings and trees; an allowance, as it depends on the network."""
_LINKED = 2
"""Threads that ask other ranks beside the training: for flags, and for checkpoints."""
_OF_PEERS = 4
"""Streams of copies for peers while a run trains, and what listens for them at first."""
OF_STORE = 2
"""Connections of a rank to the store: the process group's and the watchdog's."""
_NO_LIMIT = 1 << 30
REMEDY = (
    "Raise the hard limit of what starts it: ulimit -Hn, LimitNOFILE= of a service, "
    "--ulimit nofile= of docker"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The process groups of a run.

    Attributes:
        nccl: Whether they are of NCCL; gloo's have a connection with each other member.
        peers: Whether copies for peers are made, by links and streams of their own.
        ranks_per_copy: Ranks that hold the class centers together, of each head that has several
            copies: those of a copy are a group, and so are those that hold the same rows.
    """

    nccl: bool
    peers: bool = False
    ranks_per_copy: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Config, place: Place, *, nccl: bool) -> "Groups":
        """Return those of the settings of a run."""
        peers = config.checkpoint.peers_every_steps > 0
        return cls(nccl=nccl, peers=peers, ranks_per_copy=ranks_of_copies(config, place.size))

    def of_gloo(self, size: int) -> int:
        """Connections of gloo's groups with other ranks, of which there are ``size`` in all."""
        if self.nccl:
            return 0
        return size - 1 + sum(ranks - 1 + size // ranks - 1 for ranks in self.ranks_per_copy)


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


def needed(rank: int, size: int, groups: Groups) -> dict[str, int]:
    """Return how many a rank needs, by what for; those that are certain first.

    Beside NCCL it does not grow with W but with its logarithm, and on the rank that serves the
    store if torchrun does not.
    """
    if size == 1:
        return {"files": _OTHERS}
    gloo = groups.of_gloo(size)
    connections = {"gloo's connections with other ranks": gloo} if gloo else {}
    serves = rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    return {
        **connections,
        "links with a few ranks": (_LINKED + groups.peers) * (2 * rounds(size) + 1),
        **({"copies for peers": _OF_PEERS} if groups.peers else {}),
        "the store": OF_STORE * (size + 1 if serves else 1),
        **({"NCCL": _OF_NCCL} if groups.nccl else {}),
        "files": _OTHERS,
    }


def in_words(parts: Mapping[str, int], limit: int) -> str:
    """Say the sum and what it is of."""
    each = ", ".join(f"{count:,} for {what}" for what, count in parts.items())
    return f"{sum(parts.values()):,} descriptors of {limit:,} allowed ({each})"


def refuse_too_few(place: Place, groups: Groups) -> None:
    """Raise the limit, and look whether it is enough for what is certain.

    Raises:
        ConfigError: If it is not.
    """
    limit, parts = raise_limit(place), needed(place.rank, place.size, groups)
    certain = sum(parts.values()) - parts["files"] - parts.get("NCCL", 0)
    if certain > limit:
        raise ConfigError(
            f"too many open files: a rank of {place.size:,} needs about {in_words(parts, limit)}. "
            f"{REMEDY}."
        )


def ran_out(error: BaseException, place: Place, groups: Groups) -> ConfigError | None:
    """Return what to tell of an error that says that no more can be opened; ``None`` of another."""
    first = next((one for one in _causes(error) if _says_so(one)), None)
    if first is None:
        return None
    parts = in_words(needed(place.rank, place.size, groups), raise_limit(place))
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
