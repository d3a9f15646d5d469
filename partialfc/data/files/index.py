"""Which image files there are in a folder of folders, or in a list, and of whom they are.

Identities are 0...C-1 in the order of their names, or of their numbers if all names are numbers;
images are sorted by identity, then by name, or in the order of the list. So they are those of the
pack that ``partialfc pack`` makes of the same source.

Shape suffixes: N = images, C = identities.
"""

import hashlib
import os
import stat
import warnings
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.data.files.lists import list_lines
from partialfc.data.found_whole import found_whole, is_whole
from partialfc.data.packs import index_cache
from partialfc.data.packs.index_cache import alone, cache_places, read_kept, write_kept

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm"}
)
"""Ends of the names of files that are taken for images, in either case."""
NO_FILE = -1
"""The size of what is no regular file, or not there."""

_FORMAT = "partialfc files 2"
_NOTES = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_THREADS = 16  # they wait for the file system, not for a core
_CHUNK = 4096
_SORTED = 1 << 20  # names that are moved at a time: it takes 16 bytes for each of theirs


@dataclass(frozen=True, eq=False)
class FileIndex:
    """The images of a source; the arrays may be mapped from a file.

    Attributes:
        num_identities: C.
        start_N: int64 [N + 1], where the name of each image begins in ``names``, and the end.
        identity_N: int32, in [0, C); it does not decrease.
        size_N: int32, bytes of each file, or ``NO_FILE``.
        names: uint8, paths below the root, one after the other.
    """

    num_identities: int
    start_N: NDArray[np.int64]
    identity_N: NDArray[np.int32]
    size_N: NDArray[np.int32]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.identity_N)

    def name(self, image: int) -> str:
        """Return the path of an image below the root."""
        start, end = self.start_N[image : image + 2].tolist()
        return os.fsdecode(self.names[start:end].tobytes())

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of paths, identities and sizes."""
        digest = hashlib.blake2b(str(self.num_identities).encode(), digest_size=8)
        for column in self.columns:
            digest.update(column.data)
        return digest.hexdigest()

    @property
    def columns(self) -> list[NDArray[Any]]:
        """The arrays, in their order in a file."""
        return [self.start_N, self.identity_N, self.size_N, self.names]


def open_file_index(path: Path) -> FileIndex:
    """Return the images of a folder or a list, from the kept index if it still holds.

    That of ``KEPT_FROM`` images or more is kept as a pack's is. A folder is listed again when one
    of the folders in it has another time, a list is read again when its size or time changes.

    Raises:
        ValueError: If there is no image, or a line of the list breaks a rule.
        OSError: If a folder or the list cannot be read.
    """
    index = _kept(path, None)
    if index is not None:
        return index
    stamp: dict[str, Any] = {
        "format": _FORMAT,
        "source": _folder_stamp(path) if path.is_dir() else _stamp(path),
    }
    index = _kept(path, stamp)
    if index is not None:
        return index
    with alone(path):  # of several ranks one looks, the others take what it kept
        index = _kept(path, stamp)
        if index is not None:
            return index
        names, found = list_folder(path) if path.is_dir() else read_list(path)
        if not any(files.names for files in found):
            raise ValueError(f"{path} holds no images (named {', '.join(sorted(SUFFIXES))}).")
        index = _sorted(names, found)
        if len(index) >= index_cache.KEPT_FROM:
            header = stamp | {
                "count": len(index),
                "identities": index.num_identities,
                "names": len(index.names),
                "fingerprint": index.fingerprint,
            }
            if write_kept(cache_places(path, "index"), header, index.columns):
                return _kept(path, stamp) or index
        return index


class Files(NamedTuple):
    """Files of some identities, as they were found: names one after the other."""

    names: bytes
    length_N: "array[int]"
    size_N: "array[int]"
    identity_N: "array[int]"


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of identities in the order of their numbers if all are numbers."""
    names = list(names)
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a note of another program by its name, and never a person."""
    return name.startswith(".") or name in _NOTES


def is_image(name: str) -> bool:
    """Whether a file is taken for an image by its name."""
    return Path(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def list_folder(root: Path) -> tuple[list[str], list[Files]]:
    """Return the names of the folders in a folder, and the image files in each."""
    names = in_order(name for name, _ in _folders(root))
    if not names:
        raise ValueError(f"{root} holds no folders, must hold one per identity.")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda item: _images(root, *item), enumerate(names)))
    ignored = sum(other for _, other in found)
    if ignored:
        warnings.warn(
            f"{root}: {ignored:,} files and folders below the identities are no images (named "
            f"{', '.join(sorted(SUFFIXES))}) and are left out.",
            stacklevel=5,
        )
    return names, [files for files, _ in found]


def read_list(path: Path) -> tuple[list[str], list[Files]]:
    """Return the identities of a list, and its files; paths must lead to below its folder."""
    number_of: dict[str, int] = {}
    identities = array("i")
    names, lengths = bytearray(), array("q")
    for _, name, label in list_lines(path):
        encoded = os.fsencode(name)
        names += encoded
        lengths.append(len(encoded))
        identities.append(number_of.setdefault(label, len(number_of)))
    ends = np.cumsum(lengths)
    place = ends - lengths
    root = os.fsencode(path.parent)

    def sizes(start: int) -> list[int]:
        chunk = slice(start, start + _CHUNK)
        pairs = zip(place[chunk].tolist(), ends[chunk].tolist(), strict=True)
        return [_size(root + b"/" + names[a:b]) for a, b in pairs]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = array("i")
        for chunk in pool.map(sizes, range(0, len(lengths), _CHUNK)):
            found.extend(chunk)
    return list(number_of), [Files(bytes(names), lengths, found, identities)]


def _sorted(names: list[str], found: list[Files]) -> FileIndex:
    """The index of what was found: identities in order and without gaps, images by identity."""
    identity_N = np.concatenate([np.asarray(files.identity_N, np.int32) for files in found])
    size_N = np.concatenate([np.asarray(files.size_N, np.int32) for files in found])
    length_N = np.concatenate([np.asarray(files.length_N, np.int64) for files in found])
    text = np.frombuffer(b"".join(files.names for files in found), np.uint8)
    rank = {name: place for place, name in enumerate(in_order(names))}
    place_C = np.array([rank[name] for name in names], np.int64)
    some, identity_N = np.unique(place_C[identity_N], return_inverse=True)
    identity_N = identity_N.astype(np.int32)
    if (identity_N[1:] < identity_N[:-1]).any():
        order_N = np.argsort(identity_N, kind="stable")
        start_N = (np.cumsum(length_N) - length_N)[order_N]
        identity_N, size_N, length_N = identity_N[order_N], size_N[order_N], length_N[order_N]
        chunks = [slice(at, at + _SORTED) for at in range(0, len(order_N), _SORTED)]
        text = np.concatenate([_texts(text, start_N[part], length_N[part]) for part in chunks])
    return FileIndex(
        len(some), np.concatenate([[0], np.cumsum(length_N)]), identity_N, size_N, text
    )


def _texts(
    text: NDArray[np.uint8], start_N: NDArray[np.int64], length_N: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Pieces of a text, one after the other."""
    first_N = np.cumsum(length_N) - length_N
    pieces: NDArray[np.uint8] = text[
        np.repeat(start_N - first_N, length_N) + np.arange(length_N.sum())
    ]
    return pieces


def _folders(root: Path) -> list[tuple[str, int]]:
    """Names and times of the folders in a folder; a link is none, and is refused."""
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if not is_hidden(entry.name)]
    for entry in entries:
        if entry.is_symlink():
            raise ValueError(
                f"{root}: {entry.name!r} is a symbolic link, which is not followed. Put the "
                f"folder itself there, or make a list of its images."
            )
    folders = [entry for entry in entries if entry.is_dir()]
    chunks = [folders[start : start + _CHUNK] for start in range(0, len(folders), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda part: [(e.name, e.stat().st_mtime_ns) for e in part], chunks)
        return [pair for part in found for pair in part]


def _images(root: Path, number: int, folder: str) -> tuple[Files, int]:
    """The image files of one identity by name, and how much else there is."""
    with os.scandir(root / folder) as scan:
        entries = [entry for entry in scan if not is_hidden(entry.name)]
    chosen = sorted((e for e in entries if is_image(e.name)), key=lambda e: e.name)
    names = [os.fsencode(f"{folder}/{entry.name}") for entry in chosen]
    files = Files(
        b"".join(names),
        array("q", map(len, names)),
        array("i", [_size(entry.path) for entry in chosen]),
        array("i", [number]) * len(chosen),
    )
    return files, len(entries) - len(chosen)


def _size(path: str | bytes) -> int:
    """Bytes of a regular file, at most 2^31 - 1; ``NO_FILE`` of anything else."""
    try:
        status = os.lstat(path)
    except OSError:
        return NO_FILE
    return min(status.st_size, 2**31 - 1) if stat.S_ISREG(status.st_mode) else NO_FILE


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _folder_stamp(root: Path) -> str:
    """A file that comes, goes or gets another name changes the time of its folder."""
    digest = hashlib.blake2b(digest_size=8)
    for name, time in sorted(_folders(root)):
        digest.update(os.fsencode(f"{name}/{time}/"))
    return digest.hexdigest()


def _kept(path: Path, stamp: dict[str, Any] | None) -> FileIndex | None:
    for place in cache_places(path, "index"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return _load(place, stamp)
    return None


def _load(place: Path, stamp: dict[str, Any] | None) -> FileIndex:
    """The index that is kept at a place; ValueError and the like if it is not what it should be.

    Without a stamp that which another rank of this host has found whole, and of its source.
    """
    header, content = read_kept(place)
    if stamp is None and not is_whole(place):
        raise ValueError("not looked at")
    if stamp is not None and {name: header[name] for name in stamp} != stamp:
        raise ValueError("of another source")
    count, identities, names = (header[name] for name in ("count", "identities", "names"))
    if not all(type(number) is int and number > 0 for number in (count, identities, names)):
        raise ValueError("no index")
    if len(content) != 8 * (count + 1) + 8 * count + names:
        raise ValueError("not whole")
    at, parts = 0, []
    for number, dtype in ((count + 1, "<i8"), (count, "<i4"), (count, "<i4"), (names, "u1")):
        size = number * np.dtype(dtype).itemsize
        parts.append(content[at : at + size].view(dtype))
        at += size
    index = FileIndex(identities, *parts)
    if stamp is None:
        vars(index)["fingerprint"] = str(header["fingerprint"])
    elif index.fingerprint != header["fingerprint"] or not _is_sound(index):
        raise ValueError("damaged")
    found_whole(place)
    return index


def _is_sound(index: FileIndex) -> bool:
    """Whether an index can be used without a look outside its arrays."""
    start_N, identity_N = index.start_N, index.identity_N
    return bool(
        start_N[0] == 0
        and start_N[-1] == len(index.names)
        and (start_N[1:] > start_N[:-1]).all()
        and identity_N[0] == 0
        and identity_N[-1] == index.num_identities - 1
        and np.isin(np.diff(identity_N), (0, 1)).all()
    )
