"""RecordIO, the file of an mxnet image pack: offsets in, records out, nothing believed unchecked.

A record is one part, or several, each ``magic | part kind (3 bits), length (29 bits) | bytes``,
little-endian and padded with zeros to 4 bytes. The writer takes every magic at a 4-byte-aligned
place out of the bytes and cuts there: kind 0 is a whole record, kinds 1, 2..., 3 are the first, the
middle and the last part of a cut one, and the reader puts the magics back. The bytes of a record
of a pack are ``flag u32 | label f32 | number u64 | 0 u64``, then ``flag`` more float32 labels, then
the JPEG image.

Shape suffixes: N = records asked for, P = parts of records, L = labels of one record, R = ranges of
bytes.
"""

import mmap
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_LENGTH = (1 << 29) - 1
"""Bytes of the largest record, the header with its labels included."""
PART_HEADER = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IfQQ")
LABEL_LIMIT = 1 << 24
"""Labels are float32, which is exact for integers below this."""

_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_DAMAGED = "The file is damaged, or its .idx belongs to another pack: copy both again."
_CHUNK = 1 << 16
_MOST_AHEAD = 1 << 26


class RecordError(ValueError):
    """A pack or its index breaks a rule; the message names the file and the offset or line.

    Attributes:
        problem: The rule and the value, without the file and the offset; "" of an index.
    """

    problem = ""


class Record(NamedTuple):
    """One record: its flag, its labels [L] float32 (one if the flag is 0) and its JPEG bytes."""

    flag: int
    label_L: NDArray[np.float32]
    image: NDArray[np.uint8]


class Headers(NamedTuple):
    """Of N records: the flag (int64), the first label (float32) and the image's bytes (int64)."""

    flag_N: NDArray[np.int64]
    label_N: NDArray[np.float32]
    image_bytes_N: NDArray[np.int64]


class RecordFile:
    """A ``.rec`` file mapped into memory, read-only; forked processes share it.

    Raises:
        RecordError: If the file is empty, and from every method if a record breaks the format.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        if self.size == 0:
            raise RecordError(f"{path}: offset 0: the file is empty. {_DAMAGED}")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._buffer = self._bytes.data
        self._words = self._bytes[: self.size // 4 * 4].view("<u4")

    def error(self, offset: int, problem: str) -> RecordError:
        """Return the error that says ``problem`` of what is at ``offset``."""
        error = RecordError(f"{self.path}: offset {offset}: {problem}. {_DAMAGED}")
        error.problem = problem
        return error

    def read(self, offset: int) -> Record:
        """Return the record at ``offset``; its image is a view of the file unless it was cut."""
        content = self._content(offset)
        if len(content) < RECORD_HEADER.size:
            raise self.error(
                offset, f"a record of {len(content)} bytes, must be >= {RECORD_HEADER.size}"
            )
        flag = int(content[:4].view("<u4")[0])
        image = RECORD_HEADER.size + 4 * flag
        if image > len(content):
            raise self.error(
                offset, f"flag {flag} needs as many labels, the record has {len(content)} bytes"
            )
        labels = content[RECORD_HEADER.size : image] if flag else content[4:8]
        return Record(flag, labels.view("<f4"), content[image:])

    def headers(self, offset_N: NDArray[np.int64]) -> Headers:
        """Return what :meth:`read` says of many records, without a Python loop over them."""
        chunks = [
            self._headers(offset_N[start : start + _CHUNK])
            for start in range(0, len(offset_N), _CHUNK)
        ] or [self._headers(offset_N)]
        return Headers(*(np.concatenate(column) for column in zip(*chunks, strict=True)))

    def keys(self, offset_N: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the numbers that records [N] carry, or ``None`` if one is damaged or has none.

        A writer gives each record its key as its number, whatever the order in which it writes.
        """
        number_N = np.empty(len(offset_N), np.uint64)
        for start in range(0, len(offset_N), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            word_N = offset_N[chunk] // 4
            near_N = word_N < self.num_words - 5
            word_N = np.where(near_N, word_N, 0)
            head_N = self._words[word_N + 1]
            plain_N = (
                near_N & (head_N >> 29 == _WHOLE) & (head_N & MAX_LENGTH >= RECORD_HEADER.size)
            )
            low_N, high_N = self._words[word_N + 4], self._words[word_N + 5].astype(np.uint64)
            number_N[chunk] = low_N | high_N << np.uint64(32)
            for at in (start + np.flatnonzero(~plain_N)).tolist():
                try:
                    content = self._content(int(offset_N[at]))
                except RecordError:
                    return None
                if len(content) < RECORD_HEADER.size:
                    return None
                number_N[at] = int(content[8:16].view("<u8")[0])
        return number_N.astype(np.int64) if number_N.max(initial=0) < 1 << 63 else None

    def will_need(self, start_R: NDArray[np.int64], stop_R: NDArray[np.int64]) -> None:
        """Ask the system to read ranges [R] of the file now, all at once and nothing around them.

        Left alone, the first look at a page of a file that is not in memory waits for it and for as
        much around it as the disk is set to read ahead, which may be a thousand images.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for start, stop in zip(start_R.tolist(), stop_R.tolist(), strict=True):
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            if 0 <= start < stop <= self.size and stop - start <= _MOST_AHEAD:
                with suppress(OSError):
                    self._map.madvise(mmap.MADV_WILLNEED, page, stop - page)

    def next_offset(self, offset: int) -> int:
        """Return where the record after the one at ``offset`` begins; ``size`` after the last."""
        stop: int = self._parts(offset)[-1].stop
        return min(self.size, stop + -stop % 4)

    @property
    def num_words(self) -> int:
        """Places in the file where a part may begin."""
        return len(self._words)

    def magics(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the offsets of the magics among the words [start, stop) of the file."""
        offsets: NDArray[np.int64] = 4 * (np.flatnonzero(self._words[start:stop] == MAGIC) + start)
        return offsets

    def parts(self, offset_P: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the kinds [P] of parts and where they end with their padding, unchecked.

        One that has no length any more ends at -1.
        """
        word_P = offset_P // 4 + 1
        head_P = self._words[np.minimum(word_P, self.num_words - 1)].astype(np.int64)
        end_P = offset_P + PART_HEADER.size + (head_P & MAX_LENGTH)
        end_P += -end_P % 4
        return head_P >> 29, np.where(word_P < self.num_words, end_P, -1)

    def whole(self, offset_N: NDArray[np.int64], end_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which records [N] are one whole part, labels and all, from offset to end.

        Any other is cut into parts, or damaged: :meth:`read` tells.
        """
        room = PART_HEADER.size + RECORD_HEADER.size
        near_N = (offset_N >= 0) & (offset_N <= self.size - room) & (offset_N % 4 == 0)
        word_N = np.where(near_N, offset_N, 0) // 4
        kind_N, part_end_N = self.parts(4 * word_N)
        flag_N = self._words[word_N + 2].astype(np.int64)
        length_N = (self._words[word_N + 1] & MAX_LENGTH).astype(np.int64)
        fits_N = length_N >= RECORD_HEADER.size + 4 * flag_N
        is_whole_N = (self._words[word_N] == MAGIC) & (kind_N == _WHOLE) & fits_N
        return np.asarray(near_N & is_whole_N & (part_end_N == end_N))

    def _headers(self, offset_N: NDArray[np.int64]) -> Headers:
        # Four words tell almost every record; one that is cut, damaged or short is read alone.
        room = PART_HEADER.size + RECORD_HEADER.size + 4
        near = np.flatnonzero((offset_N >= 0) & (offset_N <= self.size - room))
        word = offset_N[near] // 4
        head, flag = self._words[word + 1], self._words[word + 2].astype(np.int64)
        image_bytes = (head & MAX_LENGTH).astype(np.int64) - RECORD_HEADER.size - 4 * flag
        end = offset_N[near] + PART_HEADER.size + (head & MAX_LENGTH)
        plain = (self._words[word] == MAGIC) & (head >> 29 == _WHOLE) & (image_bytes >= 0)
        plain &= (end <= self.size) & (offset_N[near] % 4 == 0)
        label_word = word + np.where(flag > 0, (PART_HEADER.size + RECORD_HEADER.size) // 4, 3)

        known, shape = near[plain], offset_N.shape
        headers = Headers(
            np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int64)
        )
        headers.flag_N[known] = flag[plain]
        headers.label_N[known] = self._words[label_word[plain]].view("<f4")
        headers.image_bytes_N[known] = image_bytes[plain]
        alone = np.ones(shape, bool)
        alone[known] = False
        for i in np.flatnonzero(alone):
            record = self.read(int(offset_N[i]))
            headers.flag_N[i] = record.flag
            headers.label_N[i] = record.label_L[0]
            headers.image_bytes_N[i] = len(record.image)
        return headers

    def _content(self, offset: int) -> NDArray[np.uint8]:
        """The bytes of a record, its parts joined again by the magics between them."""
        parts = self._parts(offset)
        if len(parts) == 1:
            return self._bytes[parts[0]]
        magic = np.frombuffer(MAGIC_BYTES, np.uint8)
        joined = [piece for part in parts for piece in (magic, self._bytes[part])]
        return np.concatenate(joined[1:])

    def _parts(self, offset: int) -> list[slice]:
        """Where the bytes of each part of the record at ``offset`` are."""
        parts: list[slice] = []
        at, kind, total = offset, _WHOLE, 0
        while not parts or kind in (_FIRST, _MIDDLE):
            kind, part = self._part(at, (_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST))
            total += part.stop - part.start + (4 if parts else 0)
            if total > MAX_LENGTH:
                raise self.error(offset, f"parts of {total} bytes, at most {MAX_LENGTH} allowed")
            parts.append(part)
            at = part.stop + -part.stop % 4
        return parts

    def _part(self, at: int, allowed: tuple[int, int]) -> tuple[int, slice]:
        if at < 0 or at % 4 or at > self.size - PART_HEADER.size:
            raise self.error(
                at,
                f"a part must begin at a multiple of 4 in [0, {self.size - PART_HEADER.size}], "
                f"so that it ends inside the file of {self.size} bytes",
            )
        magic, head = PART_HEADER.unpack_from(self._buffer, at)
        if magic != MAGIC:
            raise self.error(at, f"magic 0x{magic:08x}, must be 0x{MAGIC:08x}")
        kind, length = head >> 29, head & MAX_LENGTH
        if kind not in allowed:
            where = "a record begins" if allowed[0] == _WHOLE else "a cut record goes on"
            raise self.error(
                at, f"part kind {kind}, must be {allowed[0]} or {allowed[1]} where {where}"
            )
        start = at + PART_HEADER.size
        if length > self.size - start:
            raise self.error(
                at, f"length {length}, but only {self.size - start} bytes are left in the file"
            )
        return kind, slice(start, start + length)
