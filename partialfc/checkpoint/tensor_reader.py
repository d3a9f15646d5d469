"""Tensors out of a safetensors file, read by pieces whose checksums are compared on the way.

One open a file. Threads read pieces of 64 MiB and compute their checksums, a few ahead of what is
copied out of them; pieces that nobody asked for are not read. Nothing that a file says of itself is
believed before it fits into the file.
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from partialfc.checkpoint.pieces import THREADS, Note, compare_pieces, opened_as_noted
from partialfc.checkpoint.tensor_file import DTYPES
from partialfc.errors import CheckpointError, DamagedError

_LONGEST_HEADER = 100 << 20
_READ_AT_ONCE = 8 << 20
"""Where no checksums are compared: who wants some rows reads little around them."""
_KINDS = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        dtype: Of its elements.
        shape: Of it.
        start: Its first byte, in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def width(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Elements that are read: their first byte, the one behind the last, and where they go."""

    start: int
    stop: int
    dtype: torch.dtype
    into: Tensor


class TensorReader:
    """A file that is open.

    Attributes:
        places: Its tensors by name.
    """

    def __init__(
        self, name: str, descriptor: int, note: Note, *, compare: bool, pool: ThreadPoolExecutor
    ) -> None:
        self._name, self._descriptor, self._note, self._pool = name, descriptor, note, pool
        self._compare = compare
        try:
            self.places = _places(descriptor, note.bytes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{name} is no file of tensors: {error}") from error

    def fill(self, targets: Mapping[str, tuple[Tensor, int]]) -> None:
        """Fill tensors with rows of those in the file, rounded where theirs have fewer bits.

        Args:
            targets: By name, contiguous tensors [rows, ...] on any device, each with the number of
                its first row in the file. A scalar is one row.

        Raises:
            DamagedError: If a piece is not as it was written.
            CheckpointError: If a tensor has other rows, or ends before.
        """
        wanted = [self._wanted(name, *target) for name, target in targets.items()]
        for start, data in self._pieces(wanted):
            stop = start + len(data)
            for one in wanted:
                low, high = max(start, one.start), min(stop, one.stop)
                if low < high:
                    size = one.dtype.itemsize
                    count, first = (high - low) // size, (low - one.start) // size
                    found = torch.frombuffer(data, dtype=one.dtype, count=count, offset=low - start)
                    one.into[first : first + count].copy_(found)

    def read(self, rows: Mapping[str, slice | None]) -> dict[str, Tensor]:
        """Return tensors by name on the CPU: the rows of a slice, or all."""
        found, targets = {}, {}
        for name, some in rows.items():
            place, first = self.places[name], 0
            shape = place.shape
            if some is not None:
                first, stop, _ = some.indices(shape[0])
                shape = (max(0, stop - first), *shape[1:])
            found[name] = torch.empty(shape, dtype=place.dtype)
            targets[name] = found[name], first
        self.fill(targets)
        return found

    def _wanted(self, name: str, into: Tensor, first: int) -> _Wanted:
        place = self.places[name]
        start = place.start + first * place.width * place.dtype.itemsize
        stop = start + into.numel() * place.dtype.itemsize
        whole = place.start + prod(place.shape) * place.dtype.itemsize
        if first < 0 or stop > whole or tuple(into.shape[1:]) != place.shape[1:]:
            raise CheckpointError(
                f"{self._name}: {name} is {[*place.shape]}, and {[*into.shape]} from row "
                f"{first} on are wanted"
            )
        return _Wanted(start, stop, place.dtype, into.view(-1))

    def _pieces(self, wanted: list[_Wanted]) -> Iterator[tuple[int, bytearray]]:
        """Yield the bytes of all pieces that are wanted, each with its place in the file.

        Where checksums are compared the first is always one, since it says where tensors lie.
        """
        size = self._note.piece if self._compare else _READ_AT_ONCE
        numbers = {0} if self._compare else set()
        for one in wanted:
            if one.start < one.stop:
                numbers |= {*range(one.start // size, -(-one.stop // size))}
        ahead: deque[Future[tuple[int, bytearray]]] = deque()
        for number in sorted(numbers):
            ahead.append(self._pool.submit(self._piece, number, size))
            if len(ahead) == THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _piece(self, number: int, size: int) -> tuple[int, bytearray]:
        start = number * size
        data = bytearray(min(size, self._note.bytes - start))
        _fill(self._descriptor, data, start)
        if self._compare:
            self._note.compare(self._name, number, sha256(data).hexdigest())
        return start, data


@contextmanager
def opened_tensors(path: Path, note: Note, *, compare: bool) -> Iterator[TensorReader]:
    """Open a file of tensors.

    Args:
        path: Of the file.
        note: What it was when it was written.
        compare: Whether checksums are compared with the note: of the pieces that are read, or here
            of the whole file where the note has no pieces.

    Raises:
        DamagedError: If it is not as it was written, or cannot be read.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
        if compare and note.is_whole:
            compare_pieces(path, note, range(len(note.sha256)), pool)
            compare = False
        with opened_as_noted(path, note) as descriptor:
            yield TensorReader(path.name, descriptor, note, compare=compare, pool=pool)


def _places(descriptor: int, size: int) -> dict[str, Place]:
    """Where the tensors of a file lie, as it says."""
    beginning = bytearray(min(8, size))
    _fill(descriptor, beginning, 0)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or not 0 < length <= min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"its header has {length:,} bytes")
    header = bytearray(length)
    _fill(descriptor, header, 8)
    data, found = 8 + length, {}
    for name, about in json.loads(header).items():
        if name == "__metadata__":
            continue
        dtype, shape = _KINDS[about["dtype"]], tuple(about["shape"])
        start, stop = about["data_offsets"]
        numbers = (*shape, start, stop)
        if not all(type(one) is int and 0 <= one < 2**62 for one in numbers):
            raise ValueError(f"{name[:80]!a} has a shape or a place that is none")
        if stop - start != prod(shape) * dtype.itemsize or data + stop > size:
            raise ValueError(f"{name[:80]!a} is not where it should be")
        if (data + start) % dtype.itemsize:
            raise ValueError(f"{name[:80]!a} does not lie at a multiple of its elements")
        found[name] = Place(dtype, shape, data + start)
    return found


def _fill(descriptor: int, data: bytearray, start: int) -> None:
    """Read until the memory is full.

    Raises:
        DamagedError: If the file ends before that.
    """
    view = memoryview(data)
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise DamagedError(f"the file ends at byte {start:,}")
        view, start = view[count:], start + count
