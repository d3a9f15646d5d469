"""Images in files of their own: a folder with a folder of each identity, or a list of files.

They stand beside packs in a data set. A file is opened below the root folder by folder and no link
is followed on the way, so whatever a downloaded list or index says, nothing outside is read; what
is no regular file is refused before it is read.

Shape suffixes: N = images of the source, B = images asked for.
"""

import errno
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.files.index import NO_FILE, FileIndex, open_file_index
from partialfc.data.images.formats import MOST_BYTES
from partialfc.data.indexed import IndexedImages
from partialfc.data.packs.recordio import RecordError

_BELOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = _BELOW | os.O_DIRECTORY
_FILE = _BELOW | os.O_NONBLOCK  # a pipe would wait for somebody to write
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file


def open_image_files(path: str | Path) -> "ImageFiles":
    """Open a folder of folders, or a list with lines ``path<TAB>identity``.

    Raises:
        ValueError: If there is no image, or the list breaks a rule; images are checked when read.
        OSError: If it cannot be read.
    """
    path = Path(path).absolute()
    return ImageFiles(path, open_file_index(path))


class ImageFiles(IndexedImages):
    """The images of a folder or a list by image index, 0...N-1; as :class:`~.records.Pack`.

    Methods raise IndexError if an index is not in [0, N), and RecordError if a file cannot be used.

    Args:
        path: The folder, or the list; paths are relative to the folder that it is in.
        index: Its images.

    Attributes:
        root: The folder that the paths of the images begin at.

    Raises:
        ValueError: If none of the files is there.
    """

    def __init__(self, path: Path, index: FileIndex) -> None:
        super().__init__(path, index)
        self.index = index
        self.root = path if path.is_dir() else path.parent
        if not (index.size_N != NO_FILE).any():
            raise ValueError(
                f"{path}: of {len(index)} images the first is {index.name(0)!r}, and none is a "
                f"regular file that can be read: paths are relative to {self.root}, and links "
                f"are not followed."
            )
        self._root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._root)

    def __reduce__(self) -> tuple[Callable[[Path], "ImageFiles"], tuple[Path]]:
        return open_image_files, (self.path,)

    def jpeg(self, index: int) -> bytes:
        """Return the bytes of one image, as they are stored."""
        name = self.index.name(self.key(index))
        try:
            return self._read(name)
        except OSError as error:
            if error.errno in _OURS:
                raise
            link = error.errno in (errno.ELOOP, errno.ENOTDIR)
            why = "it is below a symbolic link, or is one" if link else error.strerror
            raise self._error(name, f"the file cannot be read: {why}") from error

    def jpeg_view(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of one image as uint8 [bytes]."""
        return np.frombuffer(self.jpeg(index), np.uint8)

    def offset(self, index: int) -> int:
        """Return where an image begins in its file: 0."""
        return 0 * self.key(index)

    def file_name(self, index: int) -> str:
        """Return the path of an image below the root, as it may be printed."""
        return repr(self.index.name(self.key(index)))[1:-1]

    def _read(self, name: str) -> bytes:
        """The bytes of a file below the root."""
        *folders, last = name.split("/")
        if ".." in folders or "" in folders[:1] or "\0" in name:
            raise self._error(name, "the path leads out of its folder")
        at = self._root
        try:
            for folder in folders:
                below = os.open(folder, _FOLDER, dir_fd=at)
                if at != self._root:
                    os.close(at)
                at = below
            file = os.open(last, _FILE, dir_fd=at)
        finally:
            if at != self._root:
                os.close(at)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise self._error(name, "it is not a regular file")
            if not 0 < status.st_size <= MOST_BYTES:
                raise self._error(
                    name, f"the file has {status.st_size} bytes, must be in [1, {MOST_BYTES}]"
                )
            data = os.read(file, status.st_size)
            while len(data) < status.st_size and (more := os.read(file, MOST_BYTES)):
                data += more  # some network file systems give less than is asked for
            return data
        finally:
            os.close(file)

    def _error(self, name: str, problem: str) -> RecordError:
        error = RecordError(f"{self.path}: {name!r}: {problem}.")
        error.problem = problem
        return error
