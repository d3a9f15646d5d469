"""Safetensors files, written piece by piece from tensors in memory, with the checksums of pieces.

The library writes through no file object, and a checkpoint needs one: to hash what it writes in
the same pass, without a second copy in memory. They are read by
:mod:`partialfc.checkpoint.tensor_reader`, or by the library.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.checkpoint.disk import Bytes, Disk
from partialfc.checkpoint.pieces import THREADS, Note, PieceSums

_WRITTEN_AT_ONCE = 16 << 20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class MadeRows:
    """Rows that are made while they are written, so that they are never in memory together.

    Attributes:
        shape: Of all of them.
        pieces: fp32 [n, D], one after the other; what is given is not changed afterwards.
    """

    shape: tuple[int, int]
    pieces: Iterable[Tensor]
    dtype: ClassVar[torch.dtype] = torch.float32
    itemsize: ClassVar[int] = 4

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return 4 * self.shape[0] * self.shape[1]


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors themselves."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor | MadeRows], disk: Disk) -> Note:
    """Write a safetensors file and sync it. The tensors are contiguous, on any device, and stay as
    they are meanwhile: threads compute checksums beside this one, which writes."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="sums") as pool, path.open("xb") as file:
        sums = PieceSums(pool)
        for data in _whole(tensors):
            sums.update(data)
            disk.write(file, data)
        note = sums.note(tensors)
    disk.sync(path)
    return note


def layout_of(tensors: Mapping[str, Tensor | MadeRows]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the beginning of a file, and where behind it each tensor starts and stops, in order.

    There is no hole between them. Wide elements come first, so that all are aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, places, stop = {}, {}, 0
    for name, tensor in ordered:
        start, stop = stop, stop + tensor.nbytes
        places[name] = start, stop
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _whole(tensors: Mapping[str, Tensor | MadeRows]) -> Iterator[Bytes]:
    """The file: its beginning and the tensors."""
    beginning, places = layout_of(tensors)
    yield beginning
    for name in places:
        whole = tensors[name]
        written = 0
        for tensor in whole.pieces if isinstance(whole, MadeRows) else (whole,):
            assert tensor.is_contiguous()
            assert tensor.dtype == whole.dtype
            written += tensor.nbytes
            if not tensor.numel():
                continue
            data = tensor.reshape(-1).view(torch.uint8)
            for start in range(0, len(data), _WRITTEN_AT_ONCE):
                yield data[start : start + _WRITTEN_AT_ONCE].cpu().numpy().data
        assert written == whole.nbytes
