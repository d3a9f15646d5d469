"""Files of a checkpoint from the disks that have them to those whose ranks open them.

They go from a rank that found them sound to the first rank of a host, in pieces. There each is
written beside, compared with its note, and gets its name.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import LONGEST_NOTE, note_in, note_name, note_of
from partialfc.checkpoint.parts import ENDING, files_with_rows, is_part, statistics_of
from partialfc.checkpoint.peers.recovery import gathered
from partialfc.checkpoint.peers.sending import received_text, sent_text
from partialfc.checkpoint.pieces import THREADS, compare_pieces
from partialfc.distributed.agreement import words_of_any
from partialfc.distributed.ranks import Ranks, moved
from partialfc.distributed.streams import Pieces
from partialfc.errors import CheckpointError, DamagedError
from partialfc.model.heads import Heads
from partialfc.runtime.process import Runtime
from partialfc.writing import read_text

_BLOCK = 16 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole on all disks together.

    Attributes:
        path: Of it, on each.
        manifest: Of it.
        files: All of its files, in the order of the manifest.
        offers: By the place of a file, ranks that found it sound, one a host.
    """

    path: Path
    manifest: Mapping[str, Any]
    files: Sequence[str]
    offers: Mapping[int, Sequence[int]]


def bring(found: Found, heads: Heads, hosts: Sequence[int], runtime: Runtime) -> int:
    """Give to each host the files that its ranks open and it has not; return how many went.

    Collective: an all-gather of the files of each rank; where any host lacks one, streams and an
    all-reduce.

    Args:
        found: What is loaded.
        heads: That are filled.
        hosts: Of each rank.
        runtime: This rank.

    Raises:
        CheckpointError: On every rank, if one cannot be written or comes damaged.
    """
    rank, problems = runtime.ranks.rank, list[str]()
    sends: dict[int, list[Pieces]] = {}
    receives: dict[int, list[Pieces]] = {}
    transfers = _transfers(found, heads, hosts, runtime.ranks)
    for source, to, file in transfers:
        if source == rank:
            sends.setdefault(to, []).append(_sent(found, file))
        if to == rank:
            receives.setdefault(source, []).append(_received(found, file, Disk(), problems))
    if not transfers:
        return 0
    out = {rank: chain.from_iterable(pieces) for rank, pieces in sends.items()}
    back = {rank: chain.from_iterable(pieces) for rank, pieces in receives.items()}
    try:
        with runtime.streams(out, back) as streams:
            streams.exchange(out, back, tell=moved)
    except DamagedError as error:  # this rank alone knows it, so it may not take another checkpoint
        raise CheckpointError(f"{found.path}: {error}") from error
    own = f"rank {rank}: {problems[0]}" if problems else ""
    if problem := words_of_any(own, runtime.ranks):
        raise CheckpointError(f"{found.path}: {problem}")
    return len(transfers)


def _opened(found: Found, heads: Heads, ranks: Ranks) -> list[list[int]]:
    """The places of files that this rank opens and others may not."""
    wanted = [
        file
        for name, head in heads.items()
        for _, file in files_with_rows(found.manifest, name, head.owned_rows)
    ]
    if found.manifest["world_size"] == ranks.size > 1:
        wanted.append(statistics_of(ranks.rank) + ENDING)
    place = {file: at for at, file in enumerate(found.files)}
    return [[place[file]] for file in wanted if file in place]


def _transfers(
    found: Found, heads: Heads, hosts: Sequence[int], ranks: Ranks
) -> list[tuple[int, int, str]]:
    """From which rank to which each file goes, in an order that all ranks know. Collective."""
    common = {at for at, file in enumerate(found.files) if not is_part(file)}
    wanted = {host: {*common} for host in hosts}
    for rank, (number,) in gathered(_opened(found, heads, ranks), 1, ranks):
        wanted[hosts[rank]].add(number)
    transfers = []
    for at, (host, numbers) in enumerate(sorted(wanted.items())):
        for number in sorted(numbers):
            offers = found.offers[number]
            if host not in (hosts[rank] for rank in offers):
                source = offers[at % len(offers)]  # not all from one
                transfers.append((source, hosts.index(host), found.files[number]))
    return transfers


def _sent(found: Found, file: str) -> Pieces:
    """A file, behind its note if that is beside it. What cannot be read goes out as other bytes."""
    path, manifest = found.path, found.manifest
    if file not in manifest["files"]:
        yield from sent_text(read_text(path / note_name(file), most=LONGEST_NOTE))
    with (path / file).open("rb") as whole:
        for block in _blocks(note_of(path, manifest, file).bytes):
            with suppress(OSError):
                whole.readinto(block.numpy().data)
            yield block


def _received(found: Found, file: str, disk: Disk, problems: list[str]) -> Pieces:
    """Write what :func:`_sent` yields. Behind a problem the rest is taken, so no rank waits."""
    path, manifest = found.path, found.manifest
    texts: list[str] = []
    if file in manifest["files"]:
        note = note_of(path, manifest, file)
    else:
        yield from received_text(texts.append)
        note = note_in(texts[0], manifest, file)
    temporary = path / f".{file}.partial"
    whole = None
    try:
        for text in texts:
            beside = path / f".{note_name(file)}.partial"
            beside.write_text(text, encoding="utf-8")
            disk.sync(beside)
            disk.rename(beside, path / note_name(file))
        whole = temporary.open("wb")
    except OSError as error:
        problems.append(f"{path / file}: {error}")
    for block in _blocks(note.bytes):
        yield block
        try:
            if whole is not None and not problems:
                disk.write(whole, block.numpy().data)
        except OSError as error:
            problems.append(f"{path / file}: {error}")
    try:
        if whole is not None:
            whole.close()
        if problems:
            disk.remove(temporary)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            compare_pieces(temporary, note, range(len(note.sha256)), pool)
        disk.sync(temporary)
        disk.rename(temporary, path / file)
    except (OSError, DamagedError) as error:
        problems.append(f"{path / file}: {error}")


def _blocks(count: int) -> Pieces:
    """Pieces of one memory that together are as long as a file."""
    block = torch.empty(min(_BLOCK, count), dtype=torch.uint8)
    for start in range(0, count, _BLOCK):
        yield block[: count - start]
