"""Where every image of some shards is and whose: made once by reading them, kept, and checked.

Images are numbered in the order in which they lie: neighbours are neighbours in a shard. Identities
are 0...C-1 in the order of their names, or of their numbers if all are numbers, as those that
``partialfc pack`` makes.

Shape suffixes: N = images, S = shards, B = images asked for, C = identities.
"""

import hashlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.data.files.index import in_order
from partialfc.data.found_whole import found_whole, is_whole
from partialfc.data.packs.index_cache import alone, cache_places, read_kept, write_kept
from partialfc.data.tars.listing import Listing, list_shard
from partialfc.data.tars.store import ShardError, ShardFile, Stamp, Store, named
from partialfc.definitions.urls import shown, url_of

HEADER = 512
"""Bytes of a tar before those of a file; the last of its blocks says how many these are."""

_FORMAT = "partialfc tars 1"
_THREADS = 16
_AT_ONCE = 1 << 23
_PATIENCE = 24 * 3600.0
"""Seconds that ranks wait for the one of them that reads the shards."""
_COLUMNS: tuple[tuple[str, str], ...] = (
    ("first", "<i8"), ("offset", "<i8"), ("size", "<i4"), ("identity", "<i4"), ("text", "u1"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The images of some shards; the arrays may be mapped from a file.

    Attributes:
        shards: Their names, paths or URLs.
        stamps: What each was when it was read.
        names: Of the identities [C].
        first_S: int64 [S + 1], the first image of each shard, and N.
        offset_N: int64, where the bytes of an image begin in its shard; grows within one.
        size_N: int32, how many they are, >= 0.
        identity_N: int32, in [0, C).
    """

    shards: list[str]
    stamps: list[Stamp]
    names: list[str]
    first_S: NDArray[np.int64]
    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int32]
    identity_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offset_N)

    @property
    def num_identities(self) -> int:
        """C."""
        return len(self.names)

    def shard(self, image: int) -> int:
        """Return the number of the shard that an image is in."""
        return int(np.searchsorted(self.first_S, image, side="right")) - 1

    def extent(self, image: int) -> tuple[int, int]:
        """Return where an image with its header begins in its shard, and ends."""
        offset = int(self.offset_N[image])
        return offset - HEADER, offset + int(self.size_N[image])

    def extents(
        self, image_B: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return shards, begins and ends [B] of images [B], as :meth:`extent`."""
        shard_B = np.searchsorted(self.first_S, image_B, side="right") - 1
        offset_B = self.offset_N[image_B]
        return shard_B, offset_B - HEADER, offset_B + self.size_N[image_B]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shards' sizes, and of places and identities of all images.

        Not of the shards' names or times: a copy is the same.
        """
        sizes = [size for size, _ in self.stamps]
        digest = hashlib.blake2b(json.dumps([sizes, self.names]).encode(), digest_size=8)
        for column in (self.first_S, self.offset_N, self.size_N, self.identity_N):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


def open_tar_index(path: Path, store: Store) -> TarIndex:
    """Return the images of the shards at a path, from the kept index if it still holds.

    It is beside the shards, or of a URL in the user's cache folder. All shards are read again when
    one of them has another size, time or ETag.

    Raises:
        ShardError: If a shard is missing, cannot be reached, is damaged or cut, or there is no
            image with a label; it is named, with the byte.
    """
    shards = store.shards()
    index = _kept(path, shards, None)
    if index is not None:
        return index
    with ThreadPoolExecutor(64 if store.is_far else _THREADS) as pool:
        stamps = list(pool.map(store.stamp, shards))
    index = _kept(path, shards, stamps)
    if index is not None:
        return index
    with _alone(path, shards):  # of several ranks one reads, the others take what it kept
        index = _kept(path, shards, stamps)
        if index is None:
            index = _read(path, store, shards, stamps)
            if not _keep(path, index):
                warnings.warn(
                    f"{shown(path)}: its index could be kept nowhere, so every process reads all "
                    "shards. Set XDG_CACHE_HOME to a folder that can be written to.",
                    stacklevel=4,
                )
        return index


def _read(path: Path, store: Store, shards: list[str], stamps: list[Stamp]) -> TarIndex:
    total = sum(size for size, _ in stamps)
    if store.is_far or total > 1 << 32:
        print(
            f"{shown(path)}: {len(shards):,} shards of {total / 2**30:,.1f} GiB are read once, to "
            "find their images.",
            file=sys.stderr,
            flush=True,
        )

    def listed(number: int) -> Listing:
        (size, _), shard = stamps[number], shards[number]
        file = io.BufferedReader(ShardFile(store, shard, size), min(_AT_ONCE, max(size, 1)))
        found = list_shard(file, size)
        if found.broken:
            raise ShardError(f"{shard}: {found.broken}.")
        if not (found.images or found.faults or found.ignored):
            raise ShardError(
                f"{shard}: it is empty, of {size:,} bytes. Fetch it again, or name the others."
            )
        found.images.sort(key=lambda image: image.offset)
        return found

    offsets, sizes, whose, counts = [], [], [], [0]
    number_of: dict[str, int] = {}
    ignored, faults = 0, []
    with ThreadPoolExecutor(_THREADS) as pool, _none_left(pool):
        for shard, found in zip(shards, pool.map(listed, range(len(shards))), strict=True):
            counts.append(len(found.images))
            offsets.append(np.array([image.offset for image in found.images], np.int64))
            sizes.append(np.array([image.size for image in found.images], np.int32))
            numbers = [number_of.setdefault(i.identity, len(number_of)) for i in found.images]
            whose.append(np.array(numbers, np.int32))
            ignored += found.ignored.total()
            faults += [f"{shard}: {name}: {why}" for name, why in found.faults]
    if not number_of:
        raise named(path, f"{len(shards):,} shards, and no image with a label. {_first(faults)}")
    if faults:
        warnings.warn(f"{len(faults):,} members cannot be used. {_first(faults)}", stacklevel=5)
    if ignored:
        warnings.warn(
            f"{shown(path)}: {ignored:,} members are neither images nor labels.", stacklevel=5
        )
    names = in_order(number_of)
    rank = {name: number for number, name in enumerate(names)}
    place_C = np.array([rank[name] for name in number_of], np.int32)
    return TarIndex(
        shards,
        stamps,
        names,
        np.cumsum(counts),
        np.concatenate(offsets),
        np.concatenate(sizes),
        place_C[np.concatenate(whose)],
    )


@contextmanager
def _none_left(pool: ThreadPoolExecutor) -> Iterator[None]:
    """An error does not wait for the shards that nobody has begun to read."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _first(faults: list[str]) -> str:
    return f"The first: {faults[0]}." if faults else "x.jpg must lie beside x.cls or x.json."


@contextmanager
def _alone(path: Path, shards: list[str]) -> Iterator[None]:
    places = _places(path)
    if url_of(path) is None:
        place = path if path.exists() else Path(shards[0])
    elif places:
        place = places[0].parent
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
    if not places or not place.exists():
        yield
        return
    with alone(place, _PATIENCE):
        yield


def _places(path: Path) -> list[Path]:
    if url_of(path) is None:
        return cache_places(path, "index")
    return cache_places(Path("/", path), "index")[1:]  # never a folder named after a URL


def _keep(path: Path, index: TarIndex) -> bool:
    text = json.dumps([index.names, index.shards, index.stamps]).encode()
    columns = [
        np.ascontiguousarray(column, kind)
        for column, (_, kind) in zip(
            (
                index.first_S, index.offset_N, index.size_N, index.identity_N,
                np.frombuffer(text, np.uint8),
            ),
            _COLUMNS, strict=True,
        )
    ]  # fmt: skip
    header = {
        "format": _FORMAT,
        "lengths": [len(column) for column in columns],
        "fingerprint": index.fingerprint,
    }
    return write_kept(_places(path), header, columns)


def _kept(path: Path, shards: list[str], stamps: list[Stamp] | None) -> TarIndex | None:
    for place in _places(path):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return _load(place, shards, stamps)
    return None


def _load(place: Path, shards: list[str], stamps: list[Stamp] | None) -> TarIndex:
    """The index that is kept at a place; ValueError and the like if it is not what it should be.

    Without stamps that which another rank of this host has found whole, and of these shards.
    """
    header, content = read_kept(place)
    whole = stamps is None
    if whole and not is_whole(place):
        raise ValueError("not looked at")
    lengths: Any = header["lengths"]
    if header["format"] != _FORMAT or len(lengths) != len(_COLUMNS):
        raise ValueError("of another kind")
    if not all(type(length) is int and length > 0 for length in lengths):
        raise ValueError("no index")
    sizes = [n * np.dtype(kind).itemsize for n, (_, kind) in zip(lengths, _COLUMNS, strict=True)]
    if sum(sizes) != len(content):
        raise ValueError("not whole")
    ends = np.cumsum([0, *sizes]).tolist()
    first_S, offset_N, size_N, identity_N, text = (
        content[start:end].view(kind)
        for start, end, (_, kind) in zip(ends[:-1], ends[1:], _COLUMNS, strict=True)
    )
    names, of_shards, of_stamps = json.loads(text.tobytes())
    found = [tuple(stamp) for stamp in of_stamps]
    if of_shards != shards or found != (found if stamps is None else stamps):
        raise ValueError("of other shards")
    index = TarIndex(shards, found, names, first_S, offset_N, size_N, identity_N)
    if whole:
        vars(index)["fingerprint"] = str(header["fingerprint"])
    elif index.fingerprint != header["fingerprint"] or not _is_sound(index):
        raise ValueError("damaged")
    found_whole(place)
    return index


def _is_sound(index: TarIndex) -> bool:
    """Whether an index can be used without a look outside its arrays or its shards."""
    count = len(index.offset_N)
    first_S = index.first_S
    if not (
        len(index.size_N) == len(index.identity_N) == count
        and len(first_S) == len(index.shards) + 1
        and all(isinstance(name, str) for name in index.names)
        and first_S[0] == 0
        and first_S[-1] == count
        and (np.diff(first_S) >= 0).all()
        and 0 <= index.identity_N.min() <= index.identity_N.max() < index.num_identities
        and index.size_N.min() >= 0
        and index.offset_N.min() >= HEADER
    ):
        return False
    end_S = np.repeat([size for size, _ in index.stamps], np.diff(first_S))
    return bool((index.offset_N + index.size_N <= end_S).all())
