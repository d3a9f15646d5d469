"""Checkpoints on disks that hosts do not share: ``checkpoint.shared = false``.

Each host has in a checkpoint's folder what its own ranks wrote, and rank 0's manifest. So files on
all disks together are what one disk has otherwise. A start first agrees on the newest checkpoint
of which every file is sound on some disk. Then each host gets the files that its ranks open and
that it has not, and they are read as from a shared disk.

Saving, each host commits its own folder, and removes its own old ones, after all have written.
"""

import os
import socket
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import (
    MANIFEST,
    digest_of,
    last_step,
    leftovers,
    manifest_in,
    note_of,
    path_of,
    read_manifest,
    set_aside,
    signed,
    step_of,
    steps,
    write_manifest,
)
from partialfc.checkpoint.local_disks.transfers import Found, bring
from partialfc.checkpoint.parts import parts_of, writers
from partialfc.checkpoint.peers.hosts import host_number
from partialfc.checkpoint.peers.recovery import gathered
from partialfc.checkpoint.pieces import THREADS, compare_pieces
from partialfc.distributed.agreement import largest, words_of_any
from partialfc.distributed.ranks import moved
from partialfc.errors import CheckpointError, DamagedError, OtherFormatError
from partialfc.model.heads import Heads
from partialfc.runtime.process import Runtime

_NAME = struct.Struct(">8q")
"""64 bytes of a host's name, as numbers that a collective takes."""
_NAMED = 4
"""Hosts, and files of each step, that a message names."""
_LACKS_DISK = (
    "Start with the disks of these hosts, or copy what they have of run.folder to any host's. "
    "checkpoint.peers_every_steps keeps copies on other hosts, so that one may be lost. To begin "
    "anew, choose another run.folder."
)

_Key = tuple[int, int]
"""Step and the first bits of the manifest's checksum: starts may write one step each."""

_NONE = -1, -1


class LocalDisks:
    """The checkpoints of a run on the disks of its hosts. Collective: two collectives.

    Args:
        folder: Of the checkpoints: on each host another one, by the same settings.
        runtime: This rank.

    Attributes:
        leads: Whether this rank commits and removes checkpoints on its host.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._folder, self._runtime, self._disk = folder, runtime, Disk()
        self._ranks = ranks = runtime.ranks
        name = socket.gethostname().encode()[: _NAME.size].ljust(_NAME.size, b"\0")
        rows = [row for _, row in gathered([[host_number(), *_NAME.unpack(name)]], 9, ranks)]
        self._hosts = [host for host, *_ in rows]
        self._names = {
            host: _NAME.pack(*name).rstrip(b"\0").decode(errors="replace") for host, *name in rows
        }
        self._beside = [rank for rank, host in enumerate(self._hosts) if host == self._host]
        self.leads = ranks.rank == self._beside[0]
        self._found: Found | None = None

    def described(self, heads: Heads) -> dict[str, Any]:
        """Return what a manifest says of the hosts, so that one which is missing can be named."""
        hosts = [
            {"name": name, "ranks": [rank for rank, one in enumerate(self._hosts) if one == host]}
            for host, name in self._names.items()
        ]
        holders = {name: head.sharding.holders for name, head in heads.items()}
        first = {name: held.start for name, held in holders.items() if held}
        return {"hosts": hosts, "first_ranks": first}

    def newest(
        self,
        damaged: Mapping[Path, str] = MappingProxyType({}),
        *,
        has_copies: bool = False,
    ) -> Path | None:
        """Return the newest checkpoint that is whole on all disks together. Collective.

        Each rank compares the checksums of a share of what its host has; a file that is damaged
        there is as one that is not there. Newer checkpoints are set aside on every host. What is
        found is kept until :meth:`forget`.

        Args:
            damaged: What loading has found to be wrong with some.
            has_copies: Whether the run can go on without a checkpoint.

        Raises:
            CheckpointError: On every rank, if there are checkpoints and none is whole; nothing is
                touched then. It names hosts and files.
        """
        if self._found is not None and self._found.path not in damaged:
            return self._found.path
        self._found = None
        problems: list[str] = []
        keys = self._keys()
        own: _Key | None = None
        key: _Key | None = None
        while True:
            own, key = self._next(keys, own, key)
            if key == _NONE:
                break
            path = path_of(self._folder, key[0])
            found = self._looked_at(path, key)
            problem = damaged.get(path) or self._lacks(found)
            if not problem:
                self._prepare(key, found)
                self._found = found
                return path
            problems.append(f"{path.name}: {problem}")
            if self._runtime.leads and path not in damaged:
                print(f"{path}: passed over: {problem}", flush=True)
        if not problems:
            unread = f"{self._named(self._host)} has some without a sound manifest or set aside"
            has_any = self.leads and last_step(self._folder) > 0
            problems = [*filter(None, [words_of_any(unread if has_any else "", self._ranks)])]
        if problems and not has_copies:
            raise CheckpointError(
                f"checkpoint.shared = false: no checkpoint in {self._folder} is whole on the disks "
                f"of the {len(self._names)} hosts that are here. {problems[0]}. {_LACKS_DISK}"
            )
        self._prepare((0, 0), None)
        return None

    def forget(self) -> None:
        """What was found is loaded: from now on there may be a newer one."""
        self._found = None

    def bring(self, heads: Heads) -> None:
        """Give to each host the files of what was found that its ranks open and it has not.

        Collective: see :func:`~partialfc.checkpoint.local_disks.transfers.bring`.
        """
        assert self._found is not None
        count = bring(self._found, heads, self._hosts, self._runtime)
        if count and self._runtime.leads:
            print(f"{self._found.path}: {count} files went to hosts that lacked them", flush=True)

    @property
    def _host(self) -> int:
        return self._hosts[self._ranks.rank]

    def _keys(self) -> Iterator[_Key]:
        """What this host has a sound manifest of, the newest first."""
        for path in reversed(steps(self._folder)) if self.leads else ():
            try:
                key = _key_of(read_manifest(path))
            except OtherFormatError:
                raise
            except CheckpointError as error:
                print(f"{path}: as missing on {self._named(self._host)}: {error}", flush=True)
                continue
            if key[0] == step_of(path):
                yield key

    def _next(
        self, keys: Iterator[_Key], own: _Key | None, before: _Key | None
    ) -> tuple[_Key, _Key]:
        """This host's newest checkpoint after it had one, and that of all hosts. Collective."""
        refusal = ""
        try:
            if own is None or own == before:
                own = next(keys, _NONE)
        except OtherFormatError as error:
            refusal = str(error)
        if refusal := words_of_any(refusal, self._ranks):  # it is whole: not to be set aside
            raise OtherFormatError(refusal)
        assert own is not None
        step = largest(own[0], self._ranks)
        return own, (step, largest(own[1] if own[0] == step else -1, self._ranks))

    def _looked_at(self, path: Path, key: _Key) -> Found:
        """What all disks together have of a checkpoint. Collective."""
        own = _manifest_at(path)
        is_own = own is not None and _key_of(own) == key
        text = words_of_any(signed(own) if own and is_own else "", self._ranks)
        manifest = manifest_in(text, path)  # names are looked at here too
        files = [*manifest["files"], *parts_of(manifest)]
        sound: list[list[int]] = []
        if own is None or is_own:  # a manifest that is lost takes no file along
            place = path if os.path.lexists(path) else _uncommitted(path)
            sound = [*self._sound(place, manifest, files)]
        offers: dict[int, list[int]] = {}
        for rank, (number,) in gathered(sound, 1, self._ranks):
            offers.setdefault(number, []).append(rank)
        return Found(path, manifest, files, offers)

    def _sound(
        self, path: Path, manifest: Mapping[str, Any], files: Sequence[str]
    ) -> Iterator[list[int]]:
        """The places of files that this host has and this rank finds as they were written."""
        there = {file.name for file in path.glob("*")}
        with ThreadPoolExecutor(THREADS) as pool:
            for number in range(
                self._beside.index(self._ranks.rank), len(files), len(self._beside)
            ):
                if files[number] not in there:
                    continue
                try:
                    note = note_of(path, manifest, files[number])
                    compare_pieces(path / files[number], note, range(len(note.sha256)), pool)
                except DamagedError as error:
                    said = f"{path}: as missing on {self._named(self._host)}: {error}"
                    print(said, flush=True)
                    continue
                moved()
                yield [number]

    def _lacks(self, found: Found) -> str:
        """Which files are on no disk, and which hosts had them."""
        missing = [file for at, file in enumerate(found.files) if at not in found.offers]
        if not missing:
            return ""
        then, hosts = _hosts_then(found.manifest), dict[str, str]()
        for file in missing:
            hosts.setdefault(then.get(file, "some host"), file)
        words = [f"{file} of {host}" for host, file in hosts.items()]
        more = f" and of {len(words) - _NAMED} other hosts" if len(words) > _NAMED else ""
        return (
            f"{len(missing)} of its {len(found.files)} files are on no disk: "
            f"{', '.join(words[:_NAMED])}{more}"
        )

    def _named(self, host: int) -> str:
        ranks = [rank for rank, one in enumerate(self._hosts) if one == host]
        return _host_words(self._names[host], ranks)

    def _prepare(self, key: _Key, found: Found | None) -> None:
        """Set newer checkpoints aside on each host, and have a folder for what is to come."""

        def prepare() -> None:
            has_any = found is not None and any(
                rank in self._beside for ranks in found.offers.values() for rank in ranks
            )
            if found is not None and has_any and not os.path.lexists(found.path):
                self._disk.rename(_uncommitted(found.path), found.path)
            torn = [] if found is None else [*found.path.glob(".*.partial")]
            for leftover in (*leftovers(self._folder), *torn):
                self._disk.remove(leftover)
            every = steps(self._folder)
            aside = every[bisect_left(every, key[0] + 1, key=step_of) :]
            own = None if found is None else _manifest_at(found.path)
            if found is not None and own is not None and _key_of(own) != key:
                aside = [*aside, found.path]
            set_aside(aside)
            if found is None or (own is not None and found.path not in aside):
                return
            if os.path.lexists(found.path):  # its manifest was lost
                self._disk.remove(found.path / MANIFEST)
                write_manifest(found.path, found.manifest, self._disk)
                return
            temporary = _uncommitted(found.path)
            self._disk.make_folder(temporary)
            write_manifest(temporary, found.manifest, self._disk)
            self._disk.rename(temporary, found.path)
            self._disk.sync(self._folder)

        self._together(prepare)

    def _together(self, action: Callable[[], None]) -> None:
        """Do something once a host; raise on all ranks if it failed on any."""
        problem = ""
        if self.leads:
            try:
                action()
            except OSError as error:
                problem = f"on {self._named(self._host)}: {error}"
        if problem := words_of_any(problem, self._ranks):
            raise CheckpointError(f"{self._folder}: {problem}")


def _uncommitted(path: Path) -> Path:
    """Where a checkpoint lies until it has its name.

    A kill may leave it so on some hosts; it is whole on all of them if one has committed it.
    """
    return path.with_name(f".{path.name}.partial")


def _key_of(manifest: Mapping[str, Any]) -> _Key:
    return manifest["step"], int(digest_of(manifest)[:15], 16)


def _manifest_at(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, ``None`` where there is no sound one."""
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _hosts_then(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The hosts that wrote files, in words; a manifest of a shared disk does not say it."""
    hosts: dict[int, str] = {}
    written = dict.fromkeys(manifest["files"], 0)
    with suppress(KeyError, TypeError, AttributeError, IndexError):
        written |= dict(writers(manifest))
        for host in manifest["hosts"]:
            words = _host_words(str(host["name"])[:64], host["ranks"])
            hosts |= dict.fromkeys(host["ranks"], words)
    return {file: hosts.get(rank, f"rank {rank}") for file, rank in written.items()}


def _host_words(name: str, ranks: Sequence[int]) -> str:
    first, last = ranks[0], ranks[-1]
    return f"host {name} ({f'rank {first}' if first == last else f'ranks {first} to {last}'})"
