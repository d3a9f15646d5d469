"""Where images to be packed come from: folders, a list of files, tar shards, parquet files.

Each gives the names of its identities and, in the order of the pack, images as (number of the
identity, where), where ``where`` is a path inside the source, with ``:offset:size`` inside a tar
and ``:row group:row`` inside a parquet file. Those of parquet files come in their own order.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from partialfc.commands._bad_files import Fault, reason_of
from partialfc.commands._pack import parquet
from partialfc.commands._pack.survey import Survey
from partialfc.commands._pack.tars import tar_images
from partialfc.data.files.index import in_order, is_hidden, is_image
from partialfc.data.files.lists import list_lines
from partialfc.data.images.formats import MOST_BYTES
from partialfc.data.tars.places import expanded
from partialfc.definitions.urls import shown, url_of
from partialfc.writing import read_bytes


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
        try:
            with os.scandir(self.root / name) as entries:
                files = [entry.name for entry in entries]
        except OSError as error:
            survey.faults.append(Fault(name, reason_of(error)))
            return []
        chosen = sorted(file for file in files if is_image(file))
        for file in set(files) - set(chosen):
            survey.ignore(file)
        if not chosen:
            survey.faults.append(Fault(name, "a folder without images"))
        return [f"{name}/{file}" for file in chosen]


def open_source(path: Path, survey: Survey) -> Source:
    """Return what there is at a path: folders, tar shards, parquet files, or a list of files.

    Raises:
        ValueError: If it is none of them.
    """
    if path.is_dir():
        tables = _shards(path, parquet.SUFFIX)
        if tables:
            return _tables(path, tables)
        shards = _shards(path, ".tar")
        return _tars(path, shards, survey) if shards else _folders(path, survey)
    if url_of(path):
        raise ValueError(
            f"{shown(path)}: partialfc pack reads files of this machine. partialfc convert pack "
            "makes a pack of shards at a URL, and training reads them where they are."
        )
    if path.suffix == ".tar":
        names = [path.name] if path.exists() else expanded(path.name)
        return _tars(path.parent, [path.with_name(name) for name in names], survey)
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
        return read_bytes(root / where, most=MOST_BYTES)
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


def _shards(path: Path, suffix: str) -> list[Path]:
    return sorted(file for file in path.glob(f"*{suffix}") if not is_hidden(file.name))


def _folders(path: Path, survey: Survey) -> Source:
    with os.scandir(path) as scan:
        entries = list(scan)
    names = in_order(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    if not names:
        raise ValueError(f"{path} holds no folders, must hold one per identity.")
    for name in {entry.name for entry in entries} - set(names):
        survey.ignore(name)
    return Source(path, names)


def _list(path: Path) -> Source:
    images: dict[str, list[str]] = defaultdict(list)
    for _, file, identity in list_lines(path):
        images[identity].append(file)
    return _listed(path.parent, images, path)


def _tars(root: Path, shards: list[Path], survey: Survey) -> Source:
    images = tar_images(shards, survey)
    if not images and survey.faults:
        raise ValueError(f"{root} holds no images: {': '.join(survey.faults[0])}")
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
