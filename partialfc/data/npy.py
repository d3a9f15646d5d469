"""Arrays in ``.npy`` files: mapped, never read whole, and no longer than their files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.writing import opened


def mapped_array(path: Path) -> NDArray[Any]:
    """Return the array of an ``.npy``, mapped for reading; its rows lie one after the other.

    Raises:
        ValueError: If it is none, empty, of Python's objects, or not as long as its header says.
        OSError: If it cannot be read.
    """
    os.close(opened(path, os.O_RDONLY))
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    # A header may say more than there can be.
    except (ValueError, EOFError, OverflowError, TypeError) as error:
        why = str(error).rstrip(".")
        raise ValueError(
            f"is no .npy file of numbers ({why}). Write it with numpy.save, or name another."
        ) from None
    if not array.flags.c_contiguous:
        raise ValueError(f"holds {array.dtype} {list(array.shape)} in columns, must be row by row.")
    if not array.size or path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(
            f"{path.stat().st_size:,} bytes, and its header says {array.offset + array.nbytes:,}."
        )
    return array
