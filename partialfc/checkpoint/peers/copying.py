"""Copies made behind the training: a rank's part in its host's memory, and in that of another host.

Training stands still while live tensors are copied into mapped files. A thread then sends them to
the rank that keeps them, and takes the part that this rank keeps. Of two generations the older is
written over, and only once all ranks have said that the newer is whole.
"""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.checkpoint.content import Content, Files, about, content_of
from partialfc.checkpoint.peers.memory import ABOUT, COMMON, Memory, Slot, name_of, note_of
from partialfc.checkpoint.peers.sending import (
    received_as,
    received_text,
    sent,
    sent_text,
)
from partialfc.checkpoint.pieces import THREADS, Note, PieceSums
from partialfc.checkpoint.saving import yield_to_training
from partialfc.distributed.links import Links
from partialfc.distributed.streams import Pieces
from partialfc.model.build import Model
from partialfc.runtime.process import Runtime

Notes = dict[str, Note]
"""What each file of a part is like."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Who keeps what.

    Attributes:
        keeper: Rank that keeps this rank's part; ``None`` where no other host can.
        kept: Rank whose part this rank keeps.
        has_common: Whether this rank writes what is the same on all, for its host.
    """

    keeper: int | None
    kept: int | None
    has_common: bool


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that is complete on all ranks.

    Attributes:
        step: Of it.
        paused: Seconds that training stood still for it.
        seconds: From the copy in memory to the last rank's word.
        bytes: That this rank sent.
    """

    step: int
    paused: float
    seconds: float
    bytes: int


class Copier:
    """Makes the copies of one start.

    Collective: streams are made.

    Args:
        memory: Of this host.
        start: Token of the start.
        runtime: This rank.
        links: For a thread of the copier, from :meth:`copy` to :meth:`wait`.
        ring: Who keeps what.
    """

    def __init__(
        self, memory: Memory, start: str, runtime: Runtime, links: Links, ring: Ring
    ) -> None:
        self._runtime, self._links, self._ring, self._start = runtime, links, ring, start
        ranks, to, from_ = runtime.ranks, ring.keeper, ring.kept
        self._streams = runtime.streams(
            [] if to is None else [to], [] if from_ is None else [from_]
        )
        self._on_gpu = runtime.device.type == "cuda"
        origins = {"own": ranks.rank}
        if ring.kept is not None:
            origins["kept"] = ring.kept
        if ring.has_common:
            origins["common"] = COMMON
        self._slots: list[dict[str, Slot]] = [
            {
                what: memory.slot(
                    start,
                    name_of(ranks.rank, origin, generation),
                    pinned=self._on_gpu and what != "kept",  # that comes from the network
                )
                for what, origin in origins.items()
            }
            for generation in (0, 1)
        ]
        self._next = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="peers")
        self._pending: Future[Copied | str] | None = None
        self.last: Copied | None = None

    def copy(
        self, step: int, model: Model, facts: Mapping[str, Any], settings: str, base: int
    ) -> None:
        """Copy a step into memory, and send it while training goes on; waits for the copy before.

        Collective: as :func:`~partialfc.checkpoint.content.content_of`.

        Args:
            step: Done.
            model: Copied.
            facts: As of a checkpoint.
            settings: As of a checkpoint.
            base: Step of the last checkpoint that is complete.

        Raises:
            OSError: On every rank, if the copy before has failed on any.
        """
        self.wait()
        began = time.monotonic()
        content = content_of(model, self._runtime.ranks)
        manifest = about(step, model, self._runtime.ranks, facts, settings)
        manifest[ABOUT] = {"start": self._start, "base": base}
        problem = ""
        try:
            self._fill(content)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch cannot map a file
            problem = str(error)
        if self._on_gpu:
            torch.cuda.synchronize()  # host sync: the copies are complete
        paused = time.monotonic() - began
        self._pending = self._pool.submit(self._share, manifest, problem, began, paused)

    def wait(self) -> None:
        """Return when all copies are complete.

        Raises:
            OSError: On every rank, if one has failed on any.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        done = pending.result()
        if isinstance(done, str):
            raise OSError(done)
        self.last = done

    def close(self) -> None:
        """Let go of the thread and its connections."""
        self._pool.shutdown(wait=False)
        self._streams.close()

    def _fill(self, content: Content) -> None:
        slots = self._slots[self._next]
        files = {"own": content.own}
        if "common" in slots:
            files["common"] = content.backbone | content.heads
        for what, tensors in files.items():
            live = _named(tensors)
            for file, targets in slots[what].begin(live).items():
                for name, target in targets.items():
                    target.copy_(live[file][name], non_blocking=True)

    def _share(
        self, manifest: dict[str, Any], problem: str, began: float, paused: float
    ) -> Copied | str:
        """Send, take and commit; return what any rank says went wrong."""
        yield_to_training()
        slots, ring = self._slots[self._next], self._ring
        sizes: dict[str, int] = {}
        own = slots["own"].mapped
        told = json.dumps({name: len(whole) for name, whole in own.items()})
        self._exchange(sent_text(told), received_text(lambda text: sizes.update(json.loads(text))))
        if "kept" in slots and not problem:
            try:
                slots["kept"].begin({}, sizes)
            except (OSError, RuntimeError) as error:
                problem = str(error)
        if problem := self._links.words_of_any(problem):
            return problem
        kept = slots["kept"].mapped if "kept" in slots else {}
        with ThreadPoolExecutor(THREADS, thread_name_prefix="sums") as pool:
            sums = {name: PieceSums(pool) for name in own}
            bytes_sent = self._exchange(
                (piece for name in sorted(own) for piece in _hashed(own[name], sums[name])),
                (piece for name in sorted(kept) for piece in received_as(kept[name])),
            )
            notes = {name: sums[name].note(slots["own"].tensors[name]) for name in own}
        theirs: Notes = {}

        def take(text: str) -> None:
            theirs.update((name, Note.of(said)) for name, said in json.loads(text).items())

        told = json.dumps({name: note.as_json() for name, note in notes.items()})
        self._exchange(sent_text(told), received_text(take))
        try:
            self._commit("own", self._runtime.ranks.rank, manifest, notes)
            if ring.kept is not None:
                self._commit("kept", ring.kept, manifest, theirs)
            if "common" in slots:
                self._commit("common", COMMON, manifest, _notes(slots["common"]))
        except OSError as error:
            problem = str(error)
        if problem := self._links.words_of_any(problem):
            return problem
        self._next = 1 - self._next
        return Copied(manifest["step"], paused, time.monotonic() - began, bytes_sent)

    def _commit(self, what: str, origin: int, manifest: Mapping[str, Any], notes: Notes) -> None:
        said = {**manifest[ABOUT], "origin": origin}
        self._slots[self._next][what].commit({**manifest, ABOUT: said}, notes)

    def _exchange(self, out: Pieces, back: Pieces) -> int:
        keeper, kept = self._ring.keeper, self._ring.kept
        if keeper is None or kept is None:
            for piece in out:  # its checksum is made on the way
                del piece
            return 0
        return self._streams.exchange({keeper: out}, {kept: back})


def _named(files: Files) -> dict[str, dict[str, Tensor]]:
    return {
        f"{file}.safetensors": {name: tensor.detach() for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def _hashed(whole: Tensor, sums: PieceSums) -> Iterator[Tensor]:
    """What :func:`sent` yields, hashed on the way: bytes are looked at once."""
    pieces = sent(whole)
    yield next(pieces)
    for piece in pieces:
        sums.update(piece.numpy().data)
        yield piece


def _notes(slot: Slot) -> Notes:
    return {name: note_of(whole, slot.tensors[name]) for name, whole in slot.mapped.items()}
