"""What each rank gets of a step that is found: from its own host, or by global rows from others."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.parts import ENDING, centers_of, statistics_of
from partialfc.checkpoint.peers.memory import COMMON, Memory, Slot, note_of, whole_file
from partialfc.checkpoint.peers.recovery import Found, Offer, gathered
from partialfc.checkpoint.peers.sending import filled_rows, received_as, sent, sent_rows
from partialfc.checkpoint.pieces import Note
from partialfc.distributed.agreement import words_of_any
from partialfc.distributed.ranks import moved
from partialfc.distributed.streams import Pieces
from partialfc.errors import CheckpointError
from partialfc.head import PartialFC
from partialfc.model.heads import Heads
from partialfc.runtime.process import Runtime

_STATISTICS = -1
"""In the place of a head's number: the file of a rank's BatchNorm statistics."""


@dataclass(frozen=True, slots=True)
class Want:
    """What a rank gets of a part: all of what is common, or rows [low, high) of one file.

    Attributes:
        offer: Where it comes from.
        head: Number of the head; ``_STATISTICS`` for a whole file of ``high`` bytes.
        first: First row in the file.
        low: First row that is wanted.
        high: Behind the last.
    """

    offer: Offer
    head: int = 0
    first: int = 0
    low: int = 0
    high: int = 0


class Fetching:
    """Who gets what, as all ranks know it. Collective: a few all-gathers of some numbers a part.

    Args:
        found: What all go on from.
        memory: Of this host.
        hosts: Of each rank.
        heads: Of the model that is filled.
        runtime: This rank.

    Raises:
        CheckpointError: On every rank, if the rows of any part are not as the settings want.
    """

    def __init__(
        self, found: Found, memory: Memory, hosts: Sequence[int], heads: Heads, runtime: Runtime
    ) -> None:
        self._found, self._hosts, self._runtime = found, hosts, runtime
        self._ranks = ranks = runtime.ranks
        self._names, self._heads = [*heads], [*heads.values()]
        self._paths = [part.path for part in memory.parts(found.start)]
        self._offers: dict[int, list[Offer]] = {}
        for offer in found.offers:
            self._offers.setdefault(offer.origin, []).append(offer)
        self._manifest = found.manifest
        self._statistics: dict[int, int] = {}
        self._cut: list[list[tuple[int, int, int]]] = [[] for _ in heads]
        self._look_at_parts()
        owned = [
            [number, head.owned_rows.start, head.owned_rows.stop]
            for number, head in enumerate(self._heads)
        ]
        self._owned: list[dict[int, tuple[int, int]]] = [{} for _ in hosts]
        for rank, (number, start, stop) in gathered(owned, 3, ranks):
            self._owned[rank][number] = start, stop

    def into(self, slot: Slot) -> int:
        """Make a folder as of a checkpoint, with what this rank reads of it; return the bytes that
        came from other hosts.

        Collective: streams are made. Files of this host are linked, so they take no memory.

        Raises:
            CheckpointError: On every rank, if one has no room.
        """
        me = self._ranks.rank
        wants = [*self._wants(me)]
        here = [want for want in wants if self._is_near(want, me)]
        away = [want for want in wants if not self._is_near(want, me)]
        sizes: dict[str, int] = {}
        for want in away:
            if want.offer.origin == COMMON:
                sizes |= {file: about["bytes"] for file, about in self._manifest["files"].items()}
            elif want.head == _STATISTICS:
                sizes[self._file(want)] = want.high
        rows = {self._file(want): self._like(want) for want in away if self._is_of_rows(want)}
        problem, targets = "", {}
        try:
            targets = slot.begin(rows, sizes)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch cannot map a file
            problem = f"rank {me} has no room for what it reads: {error}"
        if problem := words_of_any(problem, self._ranks):  # before others wait in an exchange
            raise CheckpointError(
                f"copies in the memory of hosts: {problem}. Make room in checkpoint.peers_folder, "
                "or remove peers.json from the run's folder to go on from its checkpoint."
            )
        receives: dict[int, list[Pieces]] = {}
        for want in away:
            receives.setdefault(want.offer.rank, []).append(self._filled(want, slot, targets))
        sends = {
            rank: chain.from_iterable(map(self._sent, wanted))
            for rank in range(len(self._hosts))
            if (wanted := [*self._wanted_of_me(rank)])
        }
        chained = {rank: chain.from_iterable(pieces) for rank, pieces in receives.items()}
        with self._runtime.streams(sends, chained) as streams:
            streams.exchange(sends, chained, tell=moved)
        notes = {file: _note(slot.folder / file, whole) for file, whole in slot.mapped.items()}
        for want in here:
            path = self._paths[want.offer.number]
            about = read_manifest(path)["files"]
            for file in [*about] if want.offer.origin == COMMON else [self._file(want, here=True)]:
                slot.link(path / file)
                notes[file] = Note.of(about[file])
        slot.commit(self._manifest, notes)
        return sum(map(len, slot.mapped.values()))

    def _look_at_parts(self) -> None:
        """Learn which rows are in which part."""
        rows, problem = [], ""
        try:
            for offer in self._found.offers:
                if offer.rank == self._ranks.rank and offer.origin != COMMON:
                    path = self._paths[offer.number]
                    rows += [[offer.origin, *one] for one in self._rows_in(path)]
        except CheckpointError as error:
            problem = str(error)
        if problem := words_of_any(problem, self._ranks):
            raise CheckpointError(problem)
        for _, (origin, number, first, stop) in gathered(rows, 4, self._ranks):
            if number == _STATISTICS:
                self._statistics[origin] = stop
            elif (first, stop, origin) not in self._cut[number]:
                self._cut[number].append((first, stop, origin))
        for cut in self._cut:
            cut.sort()

    def _rows_in(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Number of the head, first row and the one behind the last of each file of a part."""
        for file, about in read_manifest(path)["files"].items():
            begin, _, digits = file.removesuffix(ENDING).rpartition("_")
            if begin == "statistics":
                yield _STATISTICS, 0, about["bytes"]
                continue
            name = begin.removeprefix("centers").removeprefix("_")
            if name not in self._names:
                raise CheckpointError(f"{path}: {file} is of a head that the settings have not")
            number = self._names.index(name)
            with safe_open(path / file, framework="pt", device="cpu") as opened:
                wanted = _likes(self._heads[number], 1)
                found = {key: opened.get_slice(key)[:1] for key in opened.keys()}  # noqa: SIM118
                for key, like in wanted.items():
                    got = found.get(key)
                    if got is None or got.dtype != like.dtype or got.shape[1:] != like.shape[1:]:
                        raise CheckpointError(
                            f"{path}/{file}: {key} is {_said(got)}, and the settings want "
                            f"{_said(like)}. Go on with the settings of before."
                        )
                rows = opened.get_slice("centers").get_shape()[0]
            yield number, int(digits), int(digits) + rows

    def _wants(self, rank: int) -> Iterator[Want]:
        """What a rank gets, in an order that all ranks know."""
        yield Want(self._choose(COMMON, rank))
        if self._found.world_size == len(self._hosts) and rank in self._statistics:
            yield Want(self._choose(rank, rank), _STATISTICS, high=self._statistics[rank])
        for number, (start, stop) in sorted(self._owned[rank].items()):
            cut = self._cut[number]
            for first, behind, origin in cut[max(0, bisect_right(cut, (start,)) - 1) :]:
                if first >= stop:
                    break
                if behind > start:
                    low, high = max(first, start), min(behind, stop)
                    yield Want(self._choose(origin, rank), number, first, low, high)

    def _wanted_of_me(self, rank: int) -> Iterator[Want]:
        me = self._ranks.rank
        if self._hosts[rank] != self._hosts[me]:
            for want in self._wants(rank):
                if want.offer.rank == me and not self._is_near(want, rank):
                    yield want

    def _choose(self, origin: int, rank: int) -> Offer:
        """The part that a rank reads of: on its own host, or one of those elsewhere."""
        offers = self._offers[origin]
        near = (one for one in offers if self._hosts[one.rank] == self._hosts[rank])
        return next(near, offers[rank % len(offers)])

    def _is_near(self, want: Want, rank: int) -> bool:
        return self._hosts[want.offer.rank] == self._hosts[rank]

    def _is_of_rows(self, want: Want) -> bool:
        return want.offer.origin != COMMON and want.head != _STATISTICS

    def _file(self, want: Want, *, here: bool = False) -> str:
        """The file of a part here, or what rows from elsewhere are put into."""
        if want.head == _STATISTICS:
            return statistics_of(want.offer.origin) + ENDING
        first = want.first if here else want.low
        return centers_of(self._names[want.head], first) + ENDING

    def _like(self, want: Want) -> dict[str, Tensor]:
        return _likes(self._heads[want.head], want.high - want.low)

    def _filled(
        self, want: Want, slot: Slot, targets: Mapping[str, Mapping[str, Tensor]]
    ) -> Pieces:
        if want.offer.origin == COMMON:
            for file in sorted(self._manifest["files"]):
                yield from received_as(slot.mapped[file])
        elif want.head == _STATISTICS:
            yield from received_as(slot.mapped[self._file(want)])
        else:
            for _, target in sorted(targets[self._file(want)].items()):
                yield from filled_rows(target)

    def _sent(self, want: Want) -> Pieces:
        path = self._paths[want.offer.number]
        if want.offer.origin == COMMON:
            for file in sorted(self._manifest["files"]):
                yield from sent(whole_file(path / file))
        elif want.head == _STATISTICS:
            yield from sent(whole_file(path / self._file(want)))
        else:
            file = path / self._file(want, here=True)
            with safe_open(file, framework="pt", device="cpu") as opened:
                for key in sorted(_likes(self._heads[want.head], 1)):
                    low, high = want.low - want.first, want.high - want.first
                    yield from sent_rows(opened.get_slice(key), low, high)


def _likes(head: PartialFC, rows: int) -> dict[str, Tensor]:
    """What a file of a head's rows has, without memory."""
    live = {"centers": head.centers, **head.optimizer.states(), **head.lists()}
    return {
        name: torch.empty(rows, *one.shape[1:], dtype=one.dtype, device="meta")
        for name, one in live.items()
    }


def _said(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"{tensor.dtype} [rows, {[*tensor.shape[1:]]}]"


def _note(path: Path, whole: Tensor) -> Note:
    with safe_open(path, framework="pt", device="cpu") as opened:
        return note_of(whole, opened.keys())
