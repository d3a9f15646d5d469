"""Cut the faces out of photos, turned and sized as arcface's images are.

    partialfc align photos aligned
    partialfc align photos aligned --face central --detector scrfd_10g_bnkps.onnx

PHOTOS is a folder, as a rule with a folder of each person; ALIGNED gets the same folders with a
JPEG for each face. MTCNN finds faces and five points in them, or a detector of your own: an ONNX
file of SCRFD with points or of YuNet. A similarity transform brings eyes, nose and mouth to their
places at 112 x 112 pixels. A photo is turned as its EXIF says first.

A photo that has no face, one that is too small or blurred, or that cannot be read stops nothing: it
is listed with the reason in ALIGNED.rejects.csv. ALIGNED.align.jsonl remembers what is done: start
a stopped run again with the same words and it goes on, and so it does with new photos.

Points from elsewhere come with --landmarks: a line for each face, the path of its photo below
PHOTOS and x y of left eye, right eye, nose, left and right corner of the mouth, in pixels of the
photo that is turned upright. --write-landmarks writes such a file.
"""

import argparse
import csv
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from partialfc.alignment.aligner import BLURRED, CHOICES, SMALLEST, Aligner, open_detector
from partialfc.alignment.landmarks import Points, points_of, read_landmarks, write_landmarks
from partialfc.commands._align.journal import FORMAT, Entry, append, begin, face_file, read_journal
from partialfc.commands._bad_files import reason_of
from partialfc.commands._command import command_parser, in_pieces
from partialfc.commands.pack import run
from partialfc.cores import usable_cores
from partialfc.data.files.index import is_hidden, is_image
from partialfc.data.images.formats import MOST_BYTES, decode_image
from partialfc.data.images.jpeg import encode
from partialfc.writing import atomic_write, read_bytes

CHUNK = 8
"""Photos of one piece of work, and at most so many per worker are done again after a kill."""


class Photo(NamedTuple):
    """A photo that is to be done: path below the folder, stamp, and points if they are given."""

    name: str
    stamp: list[int]
    points: Points | None


@dataclass(frozen=True, slots=True)
class Folders:
    """Where photos are and where their faces go, and how these are made."""

    photos: Path
    out: Path
    aligner: Aligner


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status: 1 if no photo has a face."""
    options = _parser().parse_args(arguments)
    return in_pieces("align", lambda: _align(options, Console(stderr=True, markup=False)))


def _align(options: argparse.Namespace, console: Console) -> int:
    _check(options)
    aligner = Aligner(
        detector=options.detector,
        face=options.face,
        size=options.size,
        smallest=options.smallest,
        blurred=options.blurred,
    )
    landmarks = read_landmarks(options.landmarks) if options.landmarks else None
    if landmarks is None:
        open_detector(options.detector)  # what is wrong with it is said before anything is done
    out = options.out
    journal = out.with_name(f"{out.name}.align.jsonl")
    made = _made(options)
    known = read_journal(journal, made, out)
    photos = photos_of(options.photos, landmarks)
    left = [photo for photo in photos if not _is_done(out, known.get(photo.name), photo)]
    out.mkdir(parents=True, exist_ok=True)
    begin(journal, made)
    if len(left) < len(photos):
        console.print(f"{len(photos) - len(left):,} of {len(photos):,} photos were done before")
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    work = partial(align_photos, Folders(options.photos, out, aligner))
    pieces = (left[start : start + CHUNK] for start in range(0, len(left), CHUNK))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        row = bar.add_task("photos", total=len(left))
        for piece, entries in run(work, pieces, options.workers):
            append(journal, entries)
            known.update({entry.photo: entry for entry in entries})
            bar.advance(row, len(piece))
    seconds = time.monotonic() - started
    entries = [known[photo.name] for photo in photos]
    rejects = options.rejects or out.with_name(f"{out.name}.rejects.csv")
    write_rejects(rejects, entries)
    if options.write_landmarks:
        rows = ((entry.photo, points) for entry in entries for points in entry.landmarks)
        write_landmarks(options.write_landmarks, rows)
    return _say(options, entries, rejects, f"{len(left) / seconds:.1f} photos/s" if left else "")


def align_photos(folders: Folders, photos: list[Photo]) -> list[Entry]:
    """Write the faces of some photos; return what became of each."""
    return [_align_photo(folders, photo) for photo in photos]


def _align_photo(folders: Folders, photo: Photo) -> Entry:
    try:
        data = read_bytes(folders.photos / photo.name, most=MOST_BYTES)
        pixels = decode_image(np.frombuffer(data, np.uint8))
    except (OSError, ValueError) as error:
        return Entry(photo.name, photo.stamp, [], [f"cannot be read: {reason_of(error)}"])
    taken, reasons = folders.aligner(pixels, photo.points)
    for number, face in enumerate(taken):
        path = folders.out / face_file(photo.name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{path.name}.partial")  # a kill leaves one, and it is used
        partial_file.write_bytes(encode(face.pixels))
        partial_file.replace(path)
    return Entry(photo.name, photo.stamp, [f.points.ravel().tolist() for f in taken], reasons)


def photos_of(root: Path, landmarks: Mapping[str, Points] | None) -> list[Photo]:
    """Return the photos below a folder, by name.

    Raises:
        OSError: If the folder cannot be read.
        ValueError: If there are none, or the faces of two would be one file.
    """
    names = sorted(_names(root))
    if not names:
        raise ValueError(f"{root}: no photo is in it (.jpg, .jpeg, .png and the like).")
    of_face: dict[str, str] = {}
    photos = []
    for name in names:
        other = of_face.setdefault(face_file(name, 0), name)
        if other != name:
            raise ValueError(
                f"{root}: the face of {name} would be the same file as that of {other}: rename it."
            )
        points = None if landmarks is None else points_of(landmarks, name)
        photos.append(Photo(name, _stamp(root / name, points), points))
    return photos


def write_rejects(path: Path, entries: list[Entry]) -> None:
    """Write a row ``photo, reason`` for everything that was not taken."""
    with (
        atomic_write(path) as partial_file,
        partial_file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["photo", "reason"])
        writer.writerows((entry.photo, why) for entry in entries for why in entry.rejected)


def _names(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=fail):
        below[:] = [name for name in below if not is_hidden(name)]
        relative = Path(folder).relative_to(root)
        yield from ((relative / file).as_posix() for file in files if is_image(file))


def _stamp(path: Path, points: Points | None) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1, 0]
    given = hashlib.blake2b(b"" if points is None else points.tobytes(), digest_size=6).digest()
    return [status.st_size, status.st_mtime_ns, int.from_bytes(given)]


def _is_done(out: Path, entry: Entry | None, photo: Photo) -> bool:
    return (
        entry is not None
        and entry.stamp == photo.stamp
        and all((out / file).is_file() for file in entry.files)
    )


def _made(options: argparse.Namespace) -> dict[str, Any]:
    """How the faces are made, as the journal has it."""
    detector = "mtcnn"
    if options.landmarks:
        detector = "landmarks"
    elif options.detector:
        with options.detector.open("rb") as file:
            detector = hashlib.file_digest(file, "sha256").hexdigest()
    words = ("face", "size", "smallest", "blurred")
    return {"format": FORMAT, "detector": detector, **{w: getattr(options, w) for w in words}}


def _say(options: argparse.Namespace, entries: list[Entry], rejects: Path, speed: str) -> int:
    faces = sum(len(entry.points) for entry in entries)
    found = sum(bool(entry.points) for entry in entries)
    print(f"{options.out}: {faces:,} faces of {found:,} of {len(entries):,} photos {speed}".strip())
    if listed := sum(len(entry.rejected) for entry in entries):
        print(f"{rejects}: {listed:,} that were not taken, with the reason")
    return 0 if faces else 1


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for words that cannot be used."""
    photos, out = options.photos, options.out
    if not photos.is_dir():
        raise ValueError(f"{photos}: there is no such folder; it must be a folder of photos.")
    if out.resolve().is_relative_to(photos.resolve()):
        raise ValueError(f"{out} must not be inside {photos}, whose images are taken for photos.")
    if options.landmarks and options.detector:
        raise ValueError("--landmarks has the points; leave --detector out.")
    for name, low, high in (("size", 16, 1024), ("workers", 1, 1024)):
        value = getattr(options, name)
        if not low <= value <= high:
            raise ValueError(f"--{name} must be in [{low}, {high}], got {value}.")
    for name in ("smallest", "blurred"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name} must be >= 0, got {getattr(options, name)}.")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("align", __doc__)
    parser.add_argument("photos", type=Path, help="folder of photos, at any depth")
    parser.add_argument("out", type=Path, metavar="aligned", help="folder of the faces")
    parser.add_argument("--size", type=int, default=112, help="side of a face in pixels (112)")
    parser.add_argument(
        "--face",
        choices=CHOICES,
        default="largest",
        help="which of several; only: none of several (largest)",
    )
    parser.add_argument("--detector", type=Path, help="ONNX file of SCRFD or YuNet (MTCNN)")
    parser.add_argument("--landmarks", type=Path, help="five points of each face, from elsewhere")
    parser.add_argument("--write-landmarks", type=Path, help="write the points to this file")
    parser.add_argument("--rejects", type=Path, help="the list (ALIGNED.rejects.csv)")
    parser.add_argument(
        "--smallest",
        type=float,
        default=SMALLEST,
        help=f"pixels of the photo that a face must be cut from, across ({SMALLEST})",
    )
    parser.add_argument(
        "--blurred",
        type=float,
        default=BLURRED,
        help=f"variance of the Laplacian that a face must have; 0 takes all ({BLURRED:g})",
    )
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (all cores)")
    return parser
