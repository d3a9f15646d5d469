"""A process's place among the ranks, as its environment says, and the torchrun that started it."""

import math
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from partialfc.config import Config, ConfigError
from partialfc.config.schema import nearest_multiples


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands.

    Attributes:
        rank: In [0, size).
        size: World size, >= 1.
        local_rank: In [0, local_size).
        local_size: Ranks of this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def hosts(self) -> int:
        """Hosts of the run."""
        return self.size // self.local_size


def own_place() -> Place:
    """Return the place that torchrun or a job gave to this process; without them it is alone.

    Raises:
        ConfigError: If the variables are no numbers, or do not go together: left over from another
            program, or set to nothing.
    """
    number = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name} = {value!r}: must be an integer. {_REMEDY}")
        number[name] = None if value is None else int(value)
    size, local_size = (number[name] or 1 for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(f"WORLD_SIZE = {size}: {name} is not set. {_REMEDY}")
    for name, most in (
        ("RANK", size - 1),
        ("LOCAL_RANK", (number["LOCAL_WORLD_SIZE"] or size) - 1),
        ("LOCAL_WORLD_SIZE", size),
    ):
        if (number[name] or 0) > most:
            raise ConfigError(
                f"{name} = {number[name]}: must be at most {most} of {size} ranks. {_REMEDY}"
            )
    return Place(number["RANK"] or 0, size, number["LOCAL_RANK"] or 0, local_size)


_REMEDY = (
    "torchrun and jobs set it; if another program left it over, unset it: "
    "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"
)


def refuse_unusable(config: Config) -> None:
    """Look whether this process may write the run's folder and open its port; nothing is changed.

    Raises:
        ConfigError: If it may not.
    """
    at = config.run.folder
    while not os.path.lexists(at):
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        why = "may not write there" if at.is_dir() else "it is no folder"
        raise ConfigError(
            f"run.folder = {str(config.run.folder)!r}: cannot be made or written to: {at}: {why}. "
            "Set another run.folder."
        )
    host, port = config.monitor.host, config.monitor.port
    if port is None or not 0 < port < 1024:
        return
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, port))
    except PermissionError as error:
        raise ConfigError(
            f"monitor.port = {port}: ports below 1024 are the system's, and this user may not open "
            "it. Set one from 1024 on, or 0 for any."
        ) from error
    except OSError:
        pass  # taken, or no such host: the exporter says so


def use_large_pages(config: Config) -> None:
    """Let torch take large tensors in pages of 2 MiB where a run is on a CPU.

    Its activations are given back and taken again in every step: in pages of 4 KiB a fifth of the
    time goes to the kernel. torch reads the variable once, so this comes before its import; a
    user's own value stays.
    """
    if config.run.device == "cpu" or not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def of_torchrun(what: Literal["environ", "cmdline"]) -> list[str]:
    """Return what the torchrun above this process was started with; empty without one (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(OSError):
            text = Path(f"/proc/{os.getppid()}/{what}").read_bytes()
            return text.decode(errors="replace").split("\0")
    return []


def set_own_threads() -> bool:
    """Whether the user set OMP_NUM_THREADS; torchrun sets 1 for several ranks where nobody did."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value == "1" and (before := of_torchrun("environ")):
        return "OMP_NUM_THREADS=1" in before
    return bool(value)


_HOSTS_LOOKED_AT = 500
"""Some give a maximum that means "any number"."""


def elastic_warning(config: Config, place: Place) -> str | None:
    """Return which numbers of hosts that ``torchrun --nnodes=MIN:MAX`` allows cannot train this."""
    words = " ".join(of_torchrun("cmdline"))
    asked = re.search(r"--nnodes[= ](\d+):(\d+)\b", words) or re.fullmatch(
        r"(\d+):(\d+)", os.environ.get("PET_NNODES", "")
    )
    if asked is None:
        return None
    low, high = int(asked[1]), int(asked[2])
    looked_at = range(max(1, low), min(high, low + _HOSTS_LOOKED_AT) + 1)
    can: list[str] = []
    cannot: dict[str, str] = {}
    for hosts in looked_at:
        try:
            config.check(hosts * place.local_size)
            can.append(str(hosts))
        except ConfigError as error:
            cannot[str(hosts)] = str(error)
    if not cannot:
        return None
    batch = config.data.global_batch
    parts = math.lcm(*looked_at)
    parts *= place.local_size * config.optimizer.accumulation
    return (
        f"torchrun --nnodes={low}:{high} with {place.local_size} ranks a host: this run can go on "
        f"with {_some(can)} hosts, not with {_some([*cannot])}. {next(iter(cannot.values()))}"
        + (f" For every number: {nearest_multiples(batch, parts)}." if parts <= 2 * batch else "")
    )


def _some(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
