"""Going on from copies: which step is whole on the hosts that are left, and who gets what of it.

Every rank looks at a share of the parts on its host. What they found goes to all, so all choose the
same step. Then each rank gets what a checkpoint of this step would give to it, as files in its
host's memory: those of its own host by a link, rows and files of other hosts over the network.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint.peers.hosts import Line
from partialfc.checkpoint.peers.memory import COMMON, Memory, Part
from partialfc.checkpoint.verifying import verify
from partialfc.distributed.agreement import collective_device, largest, words_of_any
from partialfc.distributed.ranks import Ranks, gather_rows

_NOTHING = -2


@dataclass(frozen=True, slots=True)
class Offer:
    """A part that a rank has on its host and that is sound.

    Attributes:
        rank: That would send it.
        number: Its place among the parts of that host.
        origin: Rank that it is of, or ``COMMON``.
    """

    rank: int
    number: int
    origin: int


@dataclass(frozen=True, slots=True)
class Found:
    """A step that is whole on the hosts that are left.

    Attributes:
        start: That made the copies.
        step: Of them.
        world_size: Ranks of that start.
        base: Step of the last checkpoint that was complete then.
        offers: Parts, of which every one is there once at least.
        manifest: Of what is common.
    """

    start: str
    step: int
    world_size: int
    base: int
    offers: tuple[Offer, ...]
    manifest: dict[str, Any]


def find(memory: Memory, line: Line, hosts: Sequence[int], ranks: Ranks) -> Found | None:
    """Return the newest step that is whole. Collective: all-gathers of some numbers a part.

    Args:
        memory: Of this host.
        line: Which copies count.
        hosts: Of each rank.
        ranks: This rank among all.
    """
    beside = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    parts = [
        (line.starts.index(start), number, part)
        for start in line.starts
        for number, part in enumerate(memory.parts(start))
        if line.accepts(start, part.step)
    ]
    mine = parts[beside.index(ranks.rank) :: len(beside)]
    rows = [
        [which, part.step, part.world_size, part.base, part.origin, number]
        for which, number, part in mine
    ]
    every = gathered(rows, 6, ranks)
    while (chosen := _newest(every)) is not None:
        which, step, world = chosen
        base = max(row[3] for _, row in every if _key(row) == chosen)
        sound = [
            [part.origin, number]
            for of, number, part in mine
            if (of, part.step, part.world_size) == chosen and _is_sound(part)
        ]
        offers = [
            Offer(rank, number, origin) for rank, (origin, number) in gathered(sound, 2, ranks)
        ]
        if _is_whole((offer.origin for offer in offers), world):
            common = next(offer for offer in offers if offer.origin == COMMON)
            paths = {number: part.path for of, number, part in mine if of == which}
            manifest = _told(paths.get(common.number), common.rank == ranks.rank, ranks)
            return Found(line.starts[which], step, world, base, tuple(offers), manifest)
        every = [(rank, row) for rank, row in every if _key(row) != chosen]
    return None


def gathered(
    rows: Sequence[Sequence[int]], width: int, ranks: Ranks
) -> list[tuple[int, list[int]]]:
    """Return the rows of all ranks, each with its rank. Collective: two collectives.

    Args:
        rows: Of this rank, as many as it has; no number of them is -2.
        width: Numbers of a row.
        ranks: This rank among all.
    """
    most = largest(len(rows), ranks)
    if not most:
        return []
    own = torch.full((most, width), _NOTHING, dtype=torch.int64)
    if rows:
        own[: len(rows)] = torch.tensor(rows, dtype=torch.int64)
    if ranks.size > 1:
        own = own.to(collective_device(ranks))
    every = gather_rows(own, ranks).tolist()
    return [(at // most, row) for at, row in enumerate(every) if row[0] != _NOTHING]


def _key(row: list[int]) -> tuple[int, int, int]:
    """Place of the start among those that count, step, and ranks."""
    return row[0], row[1], row[2]


def _newest(every: Sequence[tuple[int, list[int]]]) -> tuple[int, int, int] | None:
    """The newest step, of the later start, that is whole by what the parts say."""
    origins: dict[tuple[int, int, int], set[int]] = {}
    for _, row in every:
        origins.setdefault(_key(row), set()).add(row[4])
    whole = [key for key, found in origins.items() if _is_whole(found, key[2])]
    return max(whole, key=lambda key: (-key[0], key[1]), default=None)


def _is_whole(origins: Iterable[int], world: int) -> bool:
    return {*origins} == {COMMON, *range(world)}


def _told(path: Path | None, is_mine: bool, ranks: Ranks) -> dict[str, Any]:
    """The manifest that one rank has, on all."""
    text = json.dumps(checkpoint_folder.read_manifest(path)) if path and is_mine else ""
    told: dict[str, Any] = json.loads(words_of_any(text, ranks))
    return told


def _is_sound(part: Part) -> bool:
    problem = verify(part.path)
    if problem:
        print(f"{part.path}: not a copy: {problem}", flush=True)
    return problem is None
