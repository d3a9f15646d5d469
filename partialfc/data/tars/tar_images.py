"""Images in tar shards, by index, as packs and files have them; see :func:`open_tar_images`.

Of a shard at a URL, the batches to come are asked for many ranges at a time. Before an image stands
the header that the shard had when its index was made: where it does not, the shard has changed.

Shape suffixes: N = images of the shards, B = images asked for.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.indexed import IndexedImages
from partialfc.data.packs.recordio import RecordError
from partialfc.data.tars.ahead import Ahead
from partialfc.data.tars.index import HEADER, TarIndex, open_tar_index
from partialfc.data.tars.store import ShardError, Store, open_store
from partialfc.definitions.urls import shown

_SIZE = slice(124, 136)
"""Where the header of a tar says how many bytes follow, in octal digits."""


def open_tar_images(path: str | Path) -> "TarImages":
    """Open the shards at a path: one, several as in ``{0000..0012}.tar``, a folder, a URL of any.

    Raises:
        ShardError: As :func:`~partialfc.data.tars.index.open_tar_index`.
        ValueError: If the pattern or the URL is none.
        ModuleNotFoundError: If it is a URL, and fsspec is not installed.
    """
    path = Path(path)
    store = open_store(path)
    return TarImages(path, store, open_tar_index(path, store))


class TarImages(IndexedImages):
    """The images of some shards by image index, 0...N-1, in the order in which they lie.

    Methods raise IndexError if an index is not in [0, N), RecordError if an image cannot be used,
    and ShardError if a shard is gone, changed or cannot be reached.

    Args:
        path: As it was opened.
        store: Of the shards.
        index: Their images.
    """

    def __init__(self, path: Path, store: Store, index: TarIndex) -> None:
        super().__init__(path, index)
        self.index, self._store = index, store
        self._ahead = Ahead(store, index) if store.is_far else None

    def __reduce__(self) -> tuple[Callable[[Path], "TarImages"], tuple[Path]]:
        return open_tar_images, (self.path,)

    @property
    def is_far(self) -> bool:
        """Whether images are requests, which should be made before they are needed."""
        return self._ahead is not None

    def jpeg(self, index: int) -> bytes:
        """Return a copy of the bytes of one image."""
        return self.jpeg_view(index).tobytes()

    def jpeg_view(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of one image as uint8 [bytes]."""
        start, end = self.index.extent(self.key(index))
        data = self._ahead.bytes_of(index) if self._ahead is not None else None
        if data is None:
            shard = self.index.shards[self.index.shard(index)]
            data = memoryview(self._store.read(shard, start, end))
        size = end - start - HEADER
        if len(data) != end - start or _size_in(data) != size:
            raise self._changed(index)
        if not size:
            error = RecordError(f"{shown(self.path)}: {self.file_name(index)}: 0 bytes.")
            error.problem = "0 bytes, must have some"
            raise error
        return np.frombuffer(data, np.uint8, offset=HEADER)

    def will_need(self, indices: NDArray[np.int64], stretch: int = 1) -> None:
        """Begin to read images [B]; at a URL the whole stretches of neighbours that they are in."""
        if self._ahead is not None:
            self._ahead.begin(indices, stretch)
            return
        columns = self.index.extents(indices)
        for shard, start, end in zip(*(column.tolist() for column in columns), strict=True):
            self._store.will_need(self.index.shards[shard], start, end)

    def offset(self, index: int) -> int:
        """Return where the bytes of one image begin in its shard."""
        return int(self.index.offset_N[self.key(index)])

    def file_name(self, index: int) -> str:
        """Return the name of the shard that one image is in, as it may be printed."""
        shard = self.index.shards[self.index.shard(self.key(index))]
        return repr(shard.rpartition("/")[2])[1:-1]

    def _changed(self, index: int) -> ShardError:
        number, (start, end) = self.index.shard(index), self.index.extent(index)
        shard, (size, _) = self.index.shards[number], self.index.stamps[number]
        now, _ = self._store.stamp(shard)  # says so if it is gone
        return ShardError(
            f"{shard}: bytes {start} to {end} are not the file of {end - start - HEADER} bytes "
            f"that was there when the shard was read (then {size:,} bytes, now {now:,}): it has "
            "changed. Leave shards alone while a run reads them, and start it again: they are "
            "read anew."
        )


def _size_in(header: memoryview) -> int:
    """The size that a header gives, or -1."""
    digits = bytes(header[_SIZE]).strip(b"\0 ")
    return int(digits, 8) if digits and not digits.translate(None, b"01234567") else -1
