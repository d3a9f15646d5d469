"""Checkpoints behind the training: a copy in memory, which a thread writes and commits.

Training stands still for the copy only, or, where the machine has no room for one, until the files
are written, straight from what is trained. The ranks agree by links of their own, so that no
collective of the training waits for a disk.
"""

import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint.content import about, content_of, parts_of_model
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import free_bytes, path_of, write_note
from partialfc.checkpoint.local_disks.disks import LocalDisks
from partialfc.checkpoint.parts import ENDING, is_part
from partialfc.checkpoint.pieces import Note
from partialfc.checkpoint.tensor_file import size_of, write_tensors
from partialfc.distributed.agreement import from_leader
from partialfc.errors import CheckpointError
from partialfc.model.build import Model
from partialfc.model.fsdp import Shards
from partialfc.runtime.process import Runtime

_AT_ONCE = 60_000
"""Letters of a message between ranks."""

Staged = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        step: Its step.
        seconds: From the copy to the commit.
        bytes: That this rank wrote.
    """

    step: int
    seconds: float
    bytes: int


class Saver:
    """Writes a run's checkpoints; leaving it waits until the last one is complete. Collective.

    Args:
        folder: The run's ``checkpoints`` folder, on a file system that all ranks share, or of each
            host.
        facts: JSON values that :func:`partialfc.checkpoint.load` compares: seed, data, settings.
        runtime: This rank.
        keep: Newest checkpoints to keep, >= 1.
        keep_every_steps: Those of multiples of it are never deleted; 0 for none.
        settings: All settings of the run, as text for people.
        disk: Where to write.
        disks: Of the hosts, if they share none.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        runtime: Runtime,
        *,
        keep: int,
        keep_every_steps: int = 0,
        settings: str = "",
        disk: Disk | None = None,
        disks: LocalDisks | None = None,
    ) -> None:
        self._folder, self._facts, self._settings = folder, dict(facts), settings
        self._runtime, self._disk, self._disks = runtime, disk or Disk(), disks
        self._leads = runtime.leads if disks is None else disks.leads
        self._retain = partial(
            checkpoint_folder.retain, keep=keep, keep_every_steps=keep_every_steps, disk=self._disk
        )
        self._ranks, self._links = runtime.ranks, runtime.links()
        self._mark = from_leader(secrets.randbits(62), runtime.ranks)
        self._copies: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Future[Saved] | None = None
        self.last: Saved | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            raise  # it explains why other ranks are gone, where that is the error
        except Exception:
            if error is None:
                raise
        finally:
            self._pool.shutdown()
            self._links.close()

    def save(self, step: int, model: Model) -> None:
        """Copy the model, and write it while training goes on.

        Waits for the save before. What is changed after the return does not reach the checkpoint.
        Collective: one all-reduce of BatchNorm's statistics, and one of their averages.

        Raises:
            CheckpointError: If the save before failed.
        """
        self.wait()
        began = time.monotonic()
        files = self._files(model)
        copied = self._has_room(files)
        staged = self._copies_of(files) if copied else _contiguous(files)
        manifest = {
            **about(step, model, self._ranks, self._facts, self._settings),
            "mark": f"{self._mark:016x}.{step}",
            "parts": parts_of_model(model, self._ranks),
            **(self._disks.described(model.heads) if self._disks else {}),
        }
        self._pending = self._pool.submit(self._write, step, staged, manifest, began)
        if not copied:
            self.wait()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def check(self) -> None:
        """Raise what went wrong in the background, as soon as it is known; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when all that was saved is on the disk.

        Raises:
            CheckpointError: On every rank, if any rank's part failed; no earlier checkpoint is
                touched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self.last = pending.result()

    def _files(self, model: Model) -> Staged:
        """The files of this rank, of the live tensors. Collective."""
        found = content_of(model, self._runtime.ranks)
        files, backbone = found.own, found.backbone
        if model.shards:
            backbone = self._whole(backbone, model.shards)
        if self._runtime.leads:
            files = {**files, **backbone, **found.heads}
        return {
            f"{file}{ENDING}": {name: tensor.detach() for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }

    def _whole(self, files: Staged, shards: Shards) -> Staged:
        """Rank 0's copies of what is divided, gathered one tensor at a time. Collective."""
        found: Staged = {}
        for file, tensors in files.items():
            found[file] = {}
            for name, own in tensors.items():
                whole = shards.whole(name, own)
                if whole is not own and self._runtime.leads:
                    found[file][name] = self._copy(f"{file}{ENDING}/{name}", whole)
                elif whole is own:
                    found[file][name] = own
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()  # host sync: the copies are complete
        return found

    def _has_room(self, files: Staged) -> bool:
        """Whether the copies that are missing take at most half of the memory that is free."""
        needed = sum(
            _bytes_of_copy(tensor.nbytes, pinned=tensor.is_cuda)
            for file, tensors in files.items()
            for name, tensor in tensors.items()
            if f"{file}/{name}" not in self._copies
        )
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every rank of this host copies
        free = available_bytes()
        if not needed or free is None or needed <= free // 2:
            return True
        print(
            f"{self._folder}: copies of {needed:,} bytes have no room in {free:,} free ones, so "
            "training stands still while a checkpoint is written.",
            flush=True,
        )
        return False

    def _copies_of(self, files: Staged) -> Staged:
        """Copies on the CPU, which the next save uses again."""
        copies = {
            file: {name: self._copy(f"{file}/{name}", tensor) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()  # host sync: the copies are complete
        return copies

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[key] = copy
        return copy.copy_(tensor, non_blocking=True)

    def _write(self, step: int, staged: Staged, manifest: dict[str, Any], began: float) -> Saved:
        yield_to_training()
        final = path_of(self._folder, step)
        temporary = final.with_name(f".{final.name}.partial")
        lead, notes = self._leads, {}
        shared = self._disks is None

        def write() -> None:
            notes.update(self._write_files(temporary, staged, manifest["mark"]))

        def commit() -> None:
            checkpoint_folder.commit(temporary, final, manifest, notes, self._disk, shared=shared)

        try:
            self._together(final, partial(self._begin, final, temporary) if lead else None)
            self._together(final, write)
            if not shared:
                manifest, notes = self._told(manifest, notes)
            self._together(final, commit if lead else None)
        except CheckpointError:
            if lead:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if lead:
            try:
                self._retain(self._folder)
            except OSError as error:
                print(f"{self._folder}: an old checkpoint stays: {error}", flush=True)
        written = sum(size_of(tensors) for tensors in staged.values())
        return Saved(step, time.monotonic() - began, written)

    def _told(
        self, manifest: dict[str, Any], notes: dict[str, Note]
    ) -> tuple[dict[str, Any], dict[str, Note]]:
        """Rank 0's manifest and notes, for every host's disk: a few messages of 60 kB a rank."""
        own, text = self._runtime.leads, ""
        if own:
            text = json.dumps([manifest, {name: note.as_json() for name, note in notes.items()}])
        count = int(self._links.words_of_any(str(len(text)) if own else ""))
        told = [
            self._links.words_of_any(text[at : at + _AT_ONCE])  # others have none
            for at in range(0, count, _AT_ONCE)
        ]
        manifest, said = json.loads("".join(told))
        return manifest, {name: Note.of(note) for name, note in said.items()}

    def _begin(self, final: Path, temporary: Path) -> None:
        if os.path.lexists(final):
            raise FileExistsError("it exists already, and no checkpoint is ever overwritten")
        if os.path.lexists(temporary):
            self._disk.remove(temporary)
        self._disk.make_folder(temporary)

    def _write_files(self, folder: Path, staged: Staged, mark: str) -> dict[str, Note]:
        """Write this rank's files; return the notes of those that are no part."""
        notes = {}
        try:
            for name, tensors in staged.items():
                path = folder / name
                if is_part(name):
                    write_note(path, write_tensors(path, tensors, self._disk), mark, self._disk)
                else:
                    notes[name] = write_tensors(path, tensors, self._disk)
        except OSError as error:
            needed = sum(size_of(tensors) for tensors in staged.values())
            raise OSError(
                f"{error}; {needed:,} bytes needed by rank {self._ranks.rank}, "
                f"{free_bytes(folder):,} free"
            ) from error
        return notes

    def _together(self, final: Path, action: Callable[[], None] | None) -> None:
        """Do this rank's part, if it has one; raise on all ranks if any rank's part failed."""
        problem: Exception | None = None
        try:
            if action is not None:
                action()
        except Exception as error:  # whatever it is, the other ranks wait for the verdict
            problem = error
        own = "" if problem is None else str(problem) or type(problem).__name__
        if reason := self._links.words_of_any(own):
            raise CheckpointError(f"{final} was not written: {reason}") from problem


def yield_to_training() -> None:
    """Hash and write in the time that training leaves over; Linux alone has threads with ranks."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _contiguous(files: Staged) -> Staged:
    """As files have them; of the class centers and their states, which are so, no copy."""
    return {
        file: {name: tensor.contiguous() for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def _bytes_of_copy(size: int, *, pinned: bool) -> int:
    """Memory of a copy: torch locks the next power of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size


def available_bytes() -> int | None:
    """Memory that can be had without swapping; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return next(found, None)
