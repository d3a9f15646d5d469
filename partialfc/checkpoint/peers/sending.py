"""What goes between ranks, as pieces: lengths, bytes, texts and rows, from and into mapped files.

The pieces are views of the memory that they come from or go to, so nothing is held beside it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.streams import Pieces

_PIECE = 16 << 20
_LONGEST_TEXT = 256 << 20


def sent(whole: Tensor) -> Pieces:
    """Yield the length of bytes, and the bytes."""
    yield torch.tensor([len(whole)]).view(torch.uint8)
    yield from _pieces(whole)


def received_as(whole: Tensor) -> Pieces:
    """Yield what takes bytes whose length is known.

    Raises:
        ValueError: If another comes.
    """

    def make(length: int) -> Tensor:
        if length != len(whole):
            raise ValueError(f"{length:,} bytes came from another rank, not {len(whole):,}")
        return whole

    return received(make)


def received(make: Callable[[int], Tensor]) -> Pieces:
    """Yield where a length goes, and pieces of the bytes [length] that ``make`` then returns."""
    length = torch.zeros(1, dtype=torch.int64)
    yield length.view(torch.uint8)
    whole = make(int(length))
    yield from _pieces(whole)


def sent_text(text: str) -> Pieces:
    """Yield what :func:`received_text` takes."""
    return sent(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def received_text(take: Callable[[str], None]) -> Pieces:
    """Give a text that comes to ``take``.

    Raises:
        ValueError: If it is longer than any is.
    """
    whole = torch.empty(0, dtype=torch.uint8)

    def make(length: int) -> Tensor:
        nonlocal whole
        if not 0 <= length <= _LONGEST_TEXT:
            raise ValueError(f"a text of {length:,} bytes came from another rank")
        whole = torch.empty(length, dtype=torch.uint8)
        return whole

    yield from received(make)
    take(whole.numpy().tobytes().decode())


def sent_rows(rows: Any, low: int, high: int) -> Pieces:
    """Yield rows [low, high) of a file's slice, as :func:`filled_rows` takes them."""
    width = rows[low : low + 1].nbytes if high > low else 1
    for start, stop in _cut(low, high, width):
        yield _as_bytes(rows[start:stop].contiguous())


def filled_rows(target: Tensor) -> Pieces:
    """Yield where rows go, all those of a contiguous tensor."""
    for start, stop in _cut(0, len(target), target[:1].nbytes):
        yield _as_bytes(target[start:stop])


def _cut(low: int, high: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE // max(1, width))
    return ((start, min(start + step, high)) for start in range(low, high, step))


def _pieces(whole: Tensor) -> Pieces:
    return (whole[start:stop] for start, stop in _cut(0, len(whole), 1))


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)
