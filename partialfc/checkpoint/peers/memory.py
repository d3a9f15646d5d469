"""Where copies lie: a folder in the memory of a host, which outlives the processes of a run.

    /dev/shm/partialfc-<run>/<start>/
        000003_of_000001_0/        the part of rank 1, written by rank 3; generation 0
            centers_0000000000.safetensors, statistics_000001.safetensors, manifest.json
        000000_common_0/           what is the same on every rank: once a host
        .000003_of_000001_1.partial/  being written

A part is a checkpoint's folder with the files of one rank, and is whole under the same conditions:
it gets its name when its manifest is in it. Only the time that bytes take to a disk is not waited
for. Files are reserved before they are mapped, and mapped once.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.pieces import THREADS, Note, PieceSums
from partialfc.checkpoint.tensor_file import layout_of
from partialfc.errors import CheckpointError
from partialfc.writing import opened

COMMON = -1
"""In the place of a rank: what is the same on every rank."""
ABOUT = "peers"
"""What a part's manifest says of it: start, origin, and the last complete checkpoint."""

_PART = re.compile(r"\d{6,}_(?:(common)|of_(\d{6,}))_[01]")
_RUN = re.compile(r"[0-9a-f]{32}")


class InMemory(Disk):
    """Memory needs no power to be lost: nothing is gained by a wait for a disk."""

    def sync(self, path: Path) -> None:
        """Return at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is on this host, as its manifest says.

    Attributes:
        path: Of its folder.
        start: Of the run that wrote it.
        origin: Rank that it is of, or ``COMMON``.
        step: Of the copy.
        world_size: Ranks of that start.
        base: Step of the last checkpoint that was complete then; 0 for none.
    """

    path: Path
    start: str
    origin: int
    step: int
    world_size: int
    base: int


def name_of(holder: int, origin: int, generation: int) -> str:
    """The name of a part that a rank writes."""
    of = "common" if origin == COMMON else f"of_{origin:06d}"
    return f"{holder:06d}_{of}_{generation}"


class Memory:
    """The copies of a run on this host.

    Args:
        folder: In memory, such as /dev/shm, or of a local disk.
        run: 32 hexadecimal digits that no other run has.

    Raises:
        ValueError: If ``run`` is none.
        OSError: If the folder cannot be made, or somebody else made or may open it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        if not is_token(run):
            raise ValueError(f"{run!r:.50} is not 32 hexadecimal digits")
        self.root = folder / f"partialfc-{run}"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = self.root.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise PermissionError(f"{self.root}: it is not a folder of this user alone")

    def parts(self, start: str) -> list[Part]:
        """Return what a start left, by name; what is torn, foreign or not as it says is left out.

        The content of files is not looked at: see :func:`partialfc.checkpoint.verifying.verify`.
        """
        found = []
        for path in sorted((self.root / start).glob("*_[01]")):
            match = _PART.fullmatch(path.name)
            if match is None or path.is_symlink():
                continue
            try:
                manifest = checkpoint_folder.read_manifest(path)
                part = _part(path, manifest)
            except CheckpointError as error:
                print(f"{path}: not a copy: {error}", flush=True)
                continue
            named = COMMON if match[1] else int(match[2])
            if part.start == start and part.origin == named:
                found.append(part)
        return found

    def slot(self, start: str, name: str, *, pinned: bool = False) -> "Slot":
        """Return where a part is to be written."""
        return Slot(self.root / start / name, pinned=pinned)

    def keep_only(self, paths: Sequence[Path], *starts: str) -> None:
        """Remove all but some parts, and all of some starts."""
        kept = {*paths, *(path.parent for path in paths), *(self.root / one for one in starts)}
        for start in self.root.iterdir():
            if start not in kept:
                InMemory().remove(start)
            elif start.name not in starts:
                for part in start.iterdir():
                    if part not in kept:
                        InMemory().remove(part)

    def forget(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)


class Slot:
    """Where one generation of a part lies; written over and over, in the same mapped files.

    Attributes:
        path: Where it is as soon as it is whole.
        folder: Where it is until then.
        mapped: Bytes of its files by name.
        tensors: Names of the tensors in each, where they were not given as bytes.
    """

    def __init__(self, path: Path, *, pinned: bool = False) -> None:
        self.path, self._pinned = path, pinned
        self.folder = path.with_name(f".{path.name}.partial")
        self.mapped: dict[str, Tensor] = {}
        self.tensors: dict[str, list[str]] = {}

    def begin(
        self,
        files: Mapping[str, Mapping[str, Tensor]],
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Return tensors that lie in files, to be filled. What was there is no part any more.

        Args:
            files: Tensors like these, which may be on the meta device.
            sizes: Of files whose bytes come from elsewhere, into ``mapped``.

        Raises:
            OSError: If there is no room.
        """
        layouts = {name: layout_of(tensors) for name, tensors in files.items()}
        self._reserve(
            {
                **{
                    name: len(beginning) + max((stop for _, stop in places.values()), default=0)
                    for name, (beginning, places) in layouts.items()
                },
                **(sizes or {}),
            }
        )
        self.tensors = {name: sorted(tensors) for name, tensors in files.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for name, (beginning, places) in layouts.items():
            whole, data = self.mapped[name], len(beginning)
            whole[:data] = torch.frombuffer(bytearray(beginning), dtype=torch.uint8)
            found[name] = {
                key: whole[data + start : data + stop]
                .view(files[name][key].dtype)
                .view(files[name][key].shape)
                for key, (start, stop) in places.items()
            }
        return found

    def _reserve(self, sizes: Mapping[str, int]) -> None:
        self.discard()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in self.mapped or path.name not in sizes:
                self._let_go(path.name)
                path.unlink()
        for name, size in sizes.items():
            if name not in self.mapped or len(self.mapped[name]) != size:
                self._let_go(name)
                self.mapped[name] = _mapped(self.folder / name, size, pinned=self._pinned)

    def _let_go(self, name: str) -> None:
        """Forget a mapping; the driver first, who would take another at its address for it."""
        whole = self.mapped.pop(name, None)
        if whole is not None and self._pinned:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(whole.data_ptr())

    def discard(self) -> None:
        """Let what is here be no copy any more; its memory is kept for the next."""
        if os.path.lexists(self.path):
            (self.path / checkpoint_folder.MANIFEST).unlink(missing_ok=True)
            self.path.rename(self.folder)

    def commit(self, manifest: Mapping[str, Any], notes: Mapping[str, Note]) -> None:
        """Make it a part, of which ``notes`` say what each file is like."""
        checkpoint_folder.commit(self.folder, self.path, manifest, notes, InMemory())

    def link(self, file: Path) -> None:
        """Let a file be here under its name, too, without a copy."""
        os.link(file, self.folder / file.name)


def whole_file(path: Path) -> Tensor:
    """Return the bytes of a file that was verified, mapped."""
    size = path.stat().st_size
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def note_of(whole: Tensor, tensors: Iterable[str]) -> Note:
    """Return what a file of bytes [n] is like.

    Args:
        whole: The bytes.
        tensors: Names of those in it.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        sums = PieceSums(pool)
        sums.update(whole.numpy().data)
        return sums.note(tensors)


def is_token(word: object) -> bool:
    """Whether it is what runs and starts are called."""
    return isinstance(word, str) and _RUN.fullmatch(word) is not None


def _part(path: Path, manifest: Mapping[str, Any]) -> Part:
    about = manifest.get(ABOUT)
    about = about if isinstance(about, dict) else {}
    start, origin, base = (about.get(key) for key in ("start", "origin", "base"))
    numbers = all(type(one) is int and -1 <= one < 2**62 for one in (origin, base))
    if not is_token(start) or not numbers:
        raise CheckpointError(f"manifest.json: {ABOUT} is {about!r:.80}")
    step, world = manifest["step"], manifest["world_size"]
    if not origin < world < 2**24:
        raise CheckpointError(f"manifest.json: of rank {origin} of {world}")
    return Part(path, str(start), int(origin or 0), step, world, int(base or 0))


def _mapped(path: Path, size: int, *, pinned: bool) -> Tensor:
    """A file's bytes [size], in memory that is reserved: a write to a hole could end the process.

    Page-locked, where a GPU copies to it and the driver can.
    """
    path.unlink(missing_ok=True)
    descriptor = opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    if pinned:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostRegister(mapped.data_ptr(), size, 0)
    return mapped
