"""Where images to be packed come from: folders, a list of files, tar shards, parquet files.

Each gives the names of its identities and, in the order of the pack, images as (number of the
identity, where), where ``where`` is a path inside the source, with ``:offset:size`` inside a tar
and ``:row group:row`` inside a parquet file. Those of parquet files come in their own order.
"""

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from partialfc.commands._command import tracked
from partialfc.commands._pack import parquet
from partialfc.data.files.index import in_order, list_lines

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
_LONGEST_LABEL = 256


class Fault(NamedTuple):
    """A file or folder that cannot be used, and why."""

    path: str
    why: str


@dataclass
class Survey:
    """What was seen of the source besides its images."""

    ignored: int = 0
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Identities and their images.

    Attributes:
        root: Paths of images are relative to it.
        names: Of the identities, in the order of the pack.
        listed: Images of each identity by number; ``None`` lists the folders as they are reached.
        rows: Parquet files, whose rows are read as they lie there.
    """

    root: Path
    names: list[str]
    listed: dict[int, list[str]] | None = None
    rows: tuple[Path, ...] = ()

    def images(self, survey: Survey) -> Iterator[tuple[int, str]]:
        """Yield the images, sorted by identity but for ``rows``; ``survey`` notes the rest."""
        if self.rows:
            yield from self._rows(survey)
            return
        for number, name in enumerate(self.names):
            chosen = self._folder(name, survey) if self.listed is None else self.listed[number]
            for image in chosen:
                yield number, image

    def _rows(self, survey: Survey) -> Iterator[tuple[int, str]]:
        number_of = {name: number for number, name in enumerate(self.names)}
        for label, where in parquet.rows_of(list(self.rows)):
            if label in number_of:
                yield number_of[label], where
            else:
                survey.faults.append(Fault(where, "the row has no identity"))

    def _folder(self, name: str, survey: Survey) -> list[str]:
        with os.scandir(self.root / name) as entries:
            files = [entry.name for entry in entries]
        chosen = sorted(file for file in files if is_image(file))
        survey.ignored += len(files) - len(chosen)
        if not chosen:
            survey.faults.append(Fault(name, "a folder without images"))
        return [f"{name}/{file}" for file in chosen]


def open_source(path: Path, survey: Survey) -> Source:
    """Return what there is at a path: folders, tar shards, parquet files, or a list of files.

    Raises:
        ValueError: If it is none of them.
    """
    if path.is_dir():
        tables = sorted(path.glob(f"*{parquet.SUFFIX}"))
        if tables:
            return _tables(path, tables)
        shards = sorted(path.glob("*.tar"))
        return _tars(path, shards, survey) if shards else _folders(path, survey)
    if path.suffix == ".tar":
        return _tars(path.parent, [path], survey)
    if path.suffix == parquet.SUFFIX:
        return _tables(path.parent, [path])
    if path.is_file():
        return _list(path)
    raise ValueError(
        f"{path} is not a folder, a .tar, a .parquet or a list: it must be a folder of folders, of "
        f"tar shards or of parquet files, or a text file of lines path<TAB>identity."
    )


def read(root: Path, where: str) -> bytes:
    """Return the bytes of an image."""
    if f"{parquet.SUFFIX}:" in where:
        return parquet.read_row(root, where)
    path, _, place = where.partition(".tar:")
    if not place:
        return (root / where).read_bytes()
    offset, size = map(int, place.split(":"))
    with (root / f"{path}.tar").open("rb") as file:
        file.seek(offset)
        return file.read(size)


def file_of(root: Path, where: str) -> Path:
    """Return the file that an image is in."""
    for suffix in (".tar", parquet.SUFFIX):
        path, _, place = where.partition(f"{suffix}:")
        if place:
            return root / f"{path}{suffix}"
    return root / where


def is_image(name: str) -> bool:
    """Whether a file is taken for an image; hidden ones are notes of other programs."""
    return Path(name).suffix.lower() in SUFFIXES and not Path(name).name.startswith(".")


def _folders(path: Path, survey: Survey) -> Source:
    with os.scandir(path) as scan:
        entries = list(scan)
    names = in_order(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(f"{path} holds no folders, must hold one per identity.")
    survey.ignored = len(entries) - len(names)
    return Source(path, names)


def _list(path: Path) -> Source:
    images: dict[str, list[str]] = defaultdict(list)
    for _, file, identity in list_lines(path):
        images[identity].append(file)
    return _listed(path.parent, images, path)


def _tars(root: Path, shards: list[Path], survey: Survey) -> Source:
    """Of every shard the index is read; nothing is extracted.

    An image's identity is in the member of the same name that ends with ``.cls``, as WebDataset has
    it; without one it is the folder that the image is in.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for shard in tracked(shards, "shards listed"):
        found: dict[str, str] = {}
        labels: dict[str, str] = {}
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                stem = str(path.with_suffix(""))
                if path.suffix == ".cls" and member.isreg() and member.size <= _LONGEST_LABEL:
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file"
                    labels[stem] = content.read().decode(errors="replace").strip()
                elif member.isreg() and is_image(member.name):
                    found[stem] = f"{shard.name}:{member.offset_data}:{member.size}"
                elif not member.isdir():
                    survey.ignored += 1
        for stem, where in found.items():
            identity = labels.get(stem) or str(PurePosixPath(stem).parent).strip(".")
            if identity:
                images[identity].append(where)
            else:
                name = f"{shard.name}: {stem}"
                survey.faults.append(Fault(name, "no .cls beside it, and in no folder"))
    return _listed(root, images, root)


def _tables(root: Path, shards: list[Path]) -> Source:
    names = in_order(parquet.labels_of(shards))
    if not names:
        raise ValueError(f"{root} holds no images.")
    return Source(root, names, rows=tuple(shards))


def _listed(root: Path, images: dict[str, list[str]], source: Path) -> Source:
    """Identities in the order of their numbers if all are numbers, else of their names."""
    if not images:
        raise ValueError(f"{source} holds no images.")
    names = in_order(images)
    return Source(root, names, {number: images[name] for number, name in enumerate(names)})
