"""What a checkpoint does to a disk, one operation a method.

This is the one seam of the fault tests: they hand in a disk that fails, fills or dies.
"""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

Bytes = bytes | memoryview


class Disk:
    """The file system as it is."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it; it must not exist."""
        path.mkdir(parents=True)

    def write(self, file: BinaryIO, data: Bytes) -> None:
        """Append to an open file."""
        file.write(data)

    def sync(self, path: Path) -> None:
        """Return when a file's content, or a folder's names, would survive a power failure."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, at once."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Delete a file or a link, or a folder with all that is in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
