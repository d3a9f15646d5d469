"""Where the records of a pack are: read from its ``.idx``, or found in the ``.rec``.

An ``.idx`` has lines of ``key<TAB>offset``, one per record, in any order. Without one the ``.rec``
itself tells: a writer leaves no magic at an aligned place but where a part begins, and every record
carries its key. Keys say in which order images are numbered, offsets where they lie; packs of mxnet
whose list was shuffled, or whose header was written last, have them in different orders.

Shape suffixes: M = records of the pack, images and others; N = some of them; P = parts of records.
"""

import hashlib
import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.cores import usable_cores
from partialfc.data.packs.recordio import PART_HEADER, RecordError, RecordFile

_BLOCK = 1 << 24
_REMEDY = "Copy it again, or remove it: the pack is then scanned for its records."
_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, eq=False)
class RecordIndex:
    """The records of a pack, sorted by key.

    Attributes:
        key_M: Their keys; a ``range`` where they are consecutive, which costs nothing.
        offset_M: int64, where each begins in the ``.rec``; may be mapped from a file.
        sorted_M: The offsets in the order of the file; ``None`` where that is the order of the
            keys, which may begin anywhere in the file and go on at its start.
    """

    key_M: Sequence[int] | NDArray[np.int64]
    offset_M: NDArray[np.int64]
    sorted_M: NDArray[np.int64] | None
    _prints: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.offset_M)

    def stops(self, at_N: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Return where records [N], places in [M], stop: where the next in the file begins.

        Args:
            at_N: int64, in [0, M).
            size: Bytes of the ``.rec``, where its last record stops.
        """
        if self.sorted_M is None:
            next_N = self.offset_M[(at_N + 1) % len(self)]
            return np.where(next_N > self.offset_M[at_N], next_N, size)
        after_N = np.searchsorted(self.sorted_M, self.offset_M[at_N], side="right")
        next_N = self.sorted_M[np.minimum(after_N, len(self) - 1)]
        return np.where(after_N < len(self), next_N, size)

    def by_offset(self) -> Callable[[int, int], NDArray[np.int64]]:
        """Return what gives places start...stop - 1 in the order of the file, for one look at all.

        Where that is not the order of the keys, they are sorted here: 8 bytes for each.
        """
        if self.sorted_M is None:
            return np.arange
        order_M = np.argsort(self.offset_M)
        return lambda start, stop: order_M[start:stop]

    def fingerprint(self, size: int) -> str:
        """Return 16 hexadecimal digits, a function of the offsets and the size of the file."""
        if size not in self._prints:
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            digest.update(np.ascontiguousarray(self.offset_M, "<i8").data)
            self._prints[size] = digest.hexdigest()
        return self._prints[size]

    def note_fingerprint(self, fingerprint: str, size: int) -> None:
        """Take it from one who has looked."""
        self._prints[size] = fingerprint


def read_index(file: RecordFile) -> RecordIndex:
    """Return the records of a pack, from the ``.idx`` beside the ``.rec``.

    Without one, the whole ``.rec`` is read by all cores, with a warning because a large pack takes
    long; the keys are those that the records carry, or 0...M-1 in the order of the file where some
    carry none or two the same.

    Raises:
        RecordError: If a line is not two integers, an offset is not a multiple of 4 or lies outside
            the ``.rec``, or a key or an offset comes twice.
    """
    path = file.path.with_suffix(".idx")
    if not path.exists():
        warnings.warn(
            f"{path} does not exist, so all of {file.path} is read to find its records. "
            f"Put the pack's .idx there to open it at once.",
            stacklevel=4,
        )
        offset_M = scan(file)
        key_M = file.keys(offset_M)
        if key_M is None or not (_grows(key_M) or len(np.unique(key_M)) == len(key_M)):
            return RecordIndex(range(len(offset_M)), offset_M, None)
        return _by_key(key_M, offset_M)
    if not path.is_file():  # a pipe would wait for somebody to write
        raise RecordError(f"{path}: it is no regular file, must be one. {_REMEDY}")
    keys, offsets = [], []
    line = 1
    for block in _blocks(path):
        key, offset = _parse(block, path, line)
        _check_offsets(offset, file.size, path, line)
        keys.append(key)
        offsets.append(offset)
        line += len(key)
    if not keys:
        raise RecordError(f"{path}: line 1: the index is empty. {_REMEDY}")
    # One list at a time: for 42 million records each is 340 MB.
    key_M = np.concatenate(keys)
    del keys
    offset_M = np.concatenate(offsets)
    del offsets
    _check_unique(offset_M, "offset", path)
    _check_unique(key_M, "key", path)
    return _by_key(key_M, offset_M)


def _by_key(key_M: NDArray[np.int64], offset_M: NDArray[np.int64]) -> RecordIndex:
    """The index of records in any order, none of them twice."""
    if not _grows(key_M):
        order_M = np.argsort(key_M)
        key_M, offset_M = key_M[order_M], offset_M[order_M]
    first, last = int(key_M[0]), int(key_M[-1])
    consecutive = last - first + 1 == len(key_M)
    falls = np.count_nonzero(offset_M[1:] < offset_M[:-1])
    goes_round = falls == 0 or (falls == 1 and offset_M[-1] < offset_M[0])
    return RecordIndex(
        range(first, last + 1) if consecutive else key_M,
        offset_M,
        None if goes_round else np.sort(offset_M),
    )


def _grows(value_M: NDArray[np.int64]) -> bool:
    return bool((value_M[1:] > value_M[:-1]).all())


def scan(file: RecordFile) -> NDArray[np.int64]:
    """Return the offsets [M] of all records, found without an index.

    Every magic at an aligned place is looked for by all cores. Where the parts that they begin do
    not follow one another without a gap to the end of the file, somebody wrote a magic into an
    image, or damaged the file: then it is walked from record to record.

    Raises:
        RecordError: If a record breaks the format.
    """
    starts = range(0, max(file.num_words, 1), _BLOCK // 4)
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = pool.map(lambda start: file.magics(start, start + _BLOCK // 4), starts)
        offset_P = np.concatenate(list(found))
    kind_P, end_P = file.parts(offset_P)
    goes_on_P = np.isin(kind_P, (1, 2))
    follows_P = np.isin(kind_P, (2, 3))
    if (
        len(offset_P)
        and offset_P[0] == 0
        and (end_P[:-1] == offset_P[1:]).all()
        and end_P[-1] == file.size
        and not (follows_P[0] or goes_on_P[-1])
        and (goes_on_P[:-1] == follows_P[1:]).all()
    ):
        return offset_P[~follows_P]
    offsets = array("q")
    offset = 0
    while offset < file.size:
        offsets.append(offset)
        offset = file.next_offset(offset)
    return np.frombuffer(offsets, np.int64)


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, about 16 MiB of them at a time."""
    rest = b""
    with path.open("rb") as file:
        while data := file.read(_BLOCK):
            # A block without the end of a line is one line that is far too long: refused as it is.
            cut = data.rfind(b"\n") + 1 or len(data)
            yield rest + data[:cut]
            rest = data[cut:]
    if rest:
        yield rest


def _parse(block: bytes, path: Path, line: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not block.endswith(b"\n"):
        block += b"\n"
    num_lines = block.count(b"\n")
    if block.translate(None, b"0123456789") == b"\t\n" * num_lines:
        number = np.fromstring(block, np.int64, sep=" ")  # an int64 that overflows saturates
        if len(number) == 2 * num_lines and number.max() < _LARGEST:
            return number[0::2].copy(), number[1::2].copy()
    for text in block.split(b"\n"):
        if (
            not re.fullmatch(rb"\d{1,19}\t\d{1,19}", text)
            or max(map(int, text.split())) >= _LARGEST
        ):
            raise RecordError(
                f"{path}: line {line}: {text[:60]!r} must be two integers in [0, 2^63 - 1), the "
                f"key and the offset, with a tab between them. {_REMEDY}"
            )
        line += 1
    raise AssertionError("a block that does not parse has a line that does not")


def _check_offsets(offset: NDArray[np.int64], size: int, path: Path, line: int) -> None:
    wrong = np.flatnonzero((offset % 4 != 0) | (offset > size - PART_HEADER.size))
    if len(wrong):
        raise RecordError(
            f"{path}: line {line + wrong[0]}: offset {offset[wrong[0]]} must be a multiple of 4 "
            f"and at most {size - PART_HEADER.size}, inside the .rec of {size} bytes. {_REMEDY}"
        )


def _check_unique(value_M: NDArray[np.int64], name: str, path: Path) -> None:
    if _grows(value_M):
        return
    order_M = np.argsort(value_M, kind="stable")
    same = np.flatnonzero(np.diff(value_M[order_M]) == 0)
    if len(same):
        first, second = order_M[same[0] : same[0] + 2]
        raise RecordError(
            f"{path}: line {second + 1}: {name} {value_M[second]} is on line {first + 1} already, "
            f"must be there once. {_REMEDY}"
        )
