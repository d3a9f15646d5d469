"""Make a pack from a folder with a folder of images per identity, a list, tar or parquet files.

A list is a text file with a line ``path<TAB>identity`` for each image, paths relative to it. Tar
shards (a .tar, {0000..0012}.tar, or a folder of them) are as WebDataset writes them: the identity
of ``x.jpg`` is in ``x.cls``, or is the ``label`` in ``x.json``, or the folder that it is in.
Parquet files (one, or a folder of them) have a column of images and one of labels, as Hugging
Face's datasets. The identities are 0, 1, ... in the order of their names, or of their numbers if
all are numbers; OUT.identities.json lists them in that order. A JPEG image that is SIZE x SIZE and
upright is stored byte for byte; any other is turned as its EXIF says, made RGB, resized to a square
and stored as JPEG. The same images give the same bytes with any number of workers. With --align the
largest face of each is found and cut out instead, as partialfc align does, which has other rules
and other detectors; with --landmarks by the points of a file.

A file that cannot be used is left out, told, and listed by --bad. Exit status: 0 all images are in
the pack, 1 all but those, 2 there is no pack. Finished work is kept in OUT.parts until the pack is
complete: start a stopped run again with the same words and it goes on from there.
"""

# Shape suffix: N = images.

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import count, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from partialfc.alignment.aligner import Aligner, open_detector
from partialfc.alignment.landmarks import Points, points_of, read_landmarks
from partialfc.commands._bad_files import HELP, Fault, ends_in_words, reason_of, tell_faults
from partialfc.commands._command import command_parser, in_pieces
from partialfc.commands._pack.sources import (
    Source,
    file_of,
    open_source,
    read,
)
from partialfc.commands._pack.survey import Survey
from partialfc.cores import usable_cores
from partialfc.data.files.index import SUFFIXES
from partialfc.data.images.formats import check_image, decode_image
from partialfc.data.images.jpeg import START
from partialfc.data.names import names_path
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import PackWriter, write_insightface_pack
from partialfc.writing import write_text

CHUNK = 1024
"""Images of one piece of work, and at most so many per worker are done again after a kill."""
RULES = 2
"""Counts changes of what an image becomes, so that no piece of an older program is kept."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Task(NamedTuple):
    """One piece of work: images as (number of the folder, place in the source)."""

    number: int
    images: list[tuple[int, str]]


class Piece(NamedTuple):
    """What became of a task: which folders have images in its pack, how many, and the faults."""

    folders: list[int]
    images: int
    faults: list[Fault]


@dataclass(frozen=True)
class Conversion:
    """Where the images come from and how they are stored; ``parts`` keeps the finished pieces."""

    source: Path
    parts: Path
    size: int
    quality: int
    aligner: Aligner | None = None
    landmarks: Path | None = None

    def digest(self, task: Task) -> str:
        """Return what a piece depends on, hashed; a file that changed changes it."""
        stamps = [
            (folder, path, *_stamp(file_of(self.source, path))) for folder, path in task.images
        ]
        rules = [RULES, PIL.__version__, self.size, self.quality, stamps]
        if self.aligner is not None:
            rules += [repr(self.aligner), _stamp(self.landmarks) if self.landmarks else 0]
        text = json.dumps(rules)
        return hashlib.sha256(text.encode()).hexdigest()

    def jpeg(self, path: str) -> bytes:
        """Return an image as it is stored."""
        data = read(self.source, path)
        view = np.frombuffer(data, np.uint8)
        if self.aligner is not None:
            points = points_of(_landmarks(self.landmarks), path) if self.landmarks else None
            square = Image.fromarray(self.aligner.one(decode_image(view), points))
        else:
            frame, pixels = check_image(view), decode_image(view, self.size)
            size = (self.size, self.size)
            if data.startswith(START) and frame.plain and (frame.height, frame.width) == size:
                return data
            square = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        stored = BytesIO()
        square.save(stored, "JPEG", quality=self.quality)
        return stored.getvalue()


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("pack", __doc__)
    parser.add_argument("source", type=Path, help="folder of folders, list, tar or parquet files")
    parser.add_argument("out", type=Path, help="the pack to write, a name that ends with .rec")
    parser.add_argument("--size", type=int, default=112, help="width and height in pixels")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG images made here, 1...100")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes")
    parser.add_argument("--align", action="store_true", help="cut out the largest face of each")
    parser.add_argument("--landmarks", type=Path, help="cut out faces by their five points")
    parser.add_argument("--bad", type=Path, help=HELP)
    parser.add_argument(
        "--skip-broken", action="store_true", help="exit with 0 though files were left out"
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=True, markup=False)
    return in_pieces(
        "pack", lambda: int(bool(make_pack(options, console)) and not options.skip_broken)
    )


def make_pack(arguments: argparse.Namespace, console: Console) -> list[Fault]:
    """Make the pack that the arguments ask for; return what had to be left out.

    Raises:
        ValueError: If an argument is out of range, or no image is left.
    """
    out, source = arguments.out, arguments.source
    check_arguments(arguments)
    survey = Survey()
    opened = open_source(source, survey)
    names = opened.names
    conversion = Conversion(
        opened.root,
        out.with_suffix(".parts"),
        arguments.size,
        arguments.quality,
        _aligner(arguments),
        arguments.landmarks,
    )
    conversion.parts.mkdir(parents=True, exist_ok=True)

    pieces: list[Piece] = []
    work = partial(make_piece, conversion)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        row = bar.add_task("identities read", total=None if opened.rows else len(names))
        for task, piece in run(work, tasks(opened, survey), arguments.workers):
            pieces.append(piece)
            bar.update(row, completed=task.images[-1][0] + 1)

        faults = survey.faults + [fault for piece in pieces for fault in piece.faults]
        tell_faults(faults, arguments.bad)
        folders = sorted({folder for piece in pieces for folder in piece.folders})
        total = sum(piece.images for piece in pieces)
        if not total:
            raise ValueError(
                f"{source} holds no images (files named {', '.join(sorted(SUFFIXES))})."
            )
        text = json.dumps([names[folder] for folder in folders], indent=0) + "\n"
        write_text(names_path(out), text)
        images = stored_images(conversion.parts, pieces, folders)
        row = bar.add_task("images written", total=total)
        write_insightface_pack(out, bar.track(images, task_id=row), len(folders))
    remove_parts(conversion.parts)
    if survey.ignored:
        console.print(ends_in_words(survey.ignored))
    left_out = f", {len(faults):,} left out" if faults else ""
    console.print(
        f"{out}: {total} images of {len(folders)} identities, {out.stat().st_size} bytes{left_out}"
    )
    return faults


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for an argument that cannot be used."""
    out, source = arguments.out, arguments.source
    if not source.exists():
        raise ValueError(f"{source} is not a folder, a .tar or a list: there is no such file.")
    if out.suffix != ".rec":
        raise ValueError(f"{out}: the name of a pack must end with .rec.")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} must not be inside {source}, whose folders are identities.")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or choose another name.")
    for name, low, high in (("size", 8, 4096), ("quality", 1, 100), ("workers", 1, 1024)):
        value = getattr(arguments, name)
        if not low <= value <= high:
            raise ValueError(f"--{name} must be in [{low}, {high}], got {value}.")


def _aligner(arguments: argparse.Namespace) -> Aligner | None:
    """What cuts faces out, if that is asked for; what is wrong with it is said at once."""
    if arguments.landmarks:
        if arguments.align:
            raise ValueError("--landmarks has the points of the faces; leave --align out.")
        _landmarks(arguments.landmarks)
        return Aligner(size=arguments.size, smallest=0, blurred=0)  # whoever gave them has chosen
    if not arguments.align:
        return None
    open_detector(None)
    return Aligner(size=arguments.size)


def tasks(source: Source, survey: Survey) -> Iterator[Task]:
    """Cut the images, in the order of the pack, into pieces of work; ``survey`` notes the rest."""
    images = source.images(survey)
    for number in count():
        piece = list(islice(images, CHUNK))
        if not piece:
            return
        yield Task(number, piece)


def run(
    work: Callable[[Item], Result], tasks: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Do the tasks in processes; yield them with their results, in order."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, task)))
                if len(waiting) > 4 * workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Let the parent process answer an interrupt, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def make_piece(conversion: Conversion, task: Task) -> Piece:
    """Store the images of one task as a small pack, or find that an earlier run did."""
    digest = conversion.digest(task)
    pack = conversion.parts / f"{task.number:06d}.rec"
    piece = finished_piece(pack, digest)
    if piece is not None:
        return piece
    folders, kept, faults = set(), 0, []
    with PackWriter(pack) as writer:
        for folder, path in task.images:
            try:
                jpeg = conversion.jpeg(path)
            except Exception as error:  # decoders raise anything on broken files
                faults.append(Fault(path, reason_of(error)))
            else:
                writer.write(kept, folder, jpeg)
                folders.add(folder)
                kept += 1
    piece = Piece(sorted(folders), kept, faults)
    report = {"inputs": digest, "pack": _hash(pack), "piece": piece}
    write_text(pack.with_suffix(".json"), json.dumps(report))
    return piece


def finished_piece(pack: Path, digest: str) -> Piece | None:
    """Return the piece that an earlier run made of the same files, if its pack is still whole."""
    try:
        report = json.loads(pack.with_suffix(".json").read_text(encoding="utf-8"))
        if report["inputs"] != digest or report["pack"] != _hash(pack):
            return None
        folders, images, faults = report["piece"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Piece(folders, images, [Fault(*fault) for fault in faults])


def stored_images(
    parts: Path, pieces: list[Piece], folders: list[int]
) -> Iterator[tuple[int, bytes]]:
    """Yield (identity, JPEG) of all pieces; identities are numbered without gaps."""
    identity_of = np.zeros(max(folders) + 1, np.int64)
    identity_of[folders] = np.arange(len(folders))
    part = lru_cache(maxsize=256)(lambda number: open_pack(parts / f"{number:06d}.rec"))
    counts = np.array([piece.images for piece in pieces])
    of_pieces = [
        identity_of[part(number).identities(range(count))]
        for number, count in enumerate(counts.tolist())
        if count
    ]
    identity_N = np.concatenate(of_pieces)
    piece_N = np.repeat(np.arange(len(pieces)), counts)
    first_N = np.repeat(np.cumsum(counts) - counts, counts)
    for image in np.argsort(identity_N, kind="stable").tolist():
        yield int(identity_N[image]), part(int(piece_N[image])).jpeg(image - int(first_N[image]))


def remove_parts(parts: Path) -> None:
    """Remove the finished pieces and their folder, but nothing else that is in it."""
    for file in parts.glob("[0-9]" * 6 + ".*"):
        file.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _landmarks(path: Path) -> dict[str, Points]:
    """The points of a file, read once in a process."""
    return read_landmarks(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    wait([parent.sentinel])
    os._exit(1)
