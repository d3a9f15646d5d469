"""Some rows of the centers with their states, from how they are stored to fp32 and back.

Shape suffixes: D = embedding, n = rows meant, T = rows of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from partialfc.head.rows.formats import FORMATS, decode, encode, noise
from partialfc.head.rows.stored import AT_STEP, CENTERS, SCALE, Stored
from partialfc.head.tiles.torch_steps import put_rows_, take_rows
from partialfc.head.tiles.workspace import Workspace
from partialfc.keyed import key


class Tile:
    """Some rows and their states in fp32: views of what is stored where that is possible."""

    def __init__(self, stored: Stored, start: int, stop: int, workspace: Workspace) -> None:
        """Read rows ``start:stop`` of those meant.

        Args:
            stored: Centers and states.
            start: First place among the rows meant.
            stop: Place behind the last.
            workspace: Buffers of copies.
        """
        self._rows, self._start, self._stop = stored.rows, start, stop
        self._stored = {CENTERS: stored.centers.detach(), **stored.states}
        self._workspace = workspace
        values = {name: self._value(name) for name in self._names()}
        self.row_TD = values.pop(CENTERS)
        self.states = values

    def write(self, step_key: int, *, skip: Tensor | None) -> None:
        """Store rows and states; nothing where ``skip`` is true, a scalar or [T, 1], which a GPU
        decides by itself."""
        number_T = self._rows.numbers(self._start, self._stop, self.row_TD.device)
        for name, value in {CENTERS: self.row_TD, **self.states}.items():
            stored = self._stored[name]
            scale = None
            if FORMATS[stored.dtype] != "fp32":
                bits = noise(key(step_key, name), number_T, value.shape[1])
                value, scale = encode(value, FORMATS[stored.dtype], bits)
            self._put(stored, value, skip)
            if scale is not None:
                self._put(self._stored[name + SCALE], scale, skip)

    def _names(self) -> Iterator[str]:
        """All but the scales, which belong to another state, and the counter of missed steps."""
        return (n for n in self._stored if not n.endswith(SCALE) and n != AT_STEP)

    def _value(self, name: str) -> Tensor:
        stored = self._stored[name]
        size = (self._stop - self._start, *stored.shape[1:])
        buffer = self._workspace(name, size, stored.dtype, stored.device)
        stored_TD = take_rows(stored, self._rows.place_n, self._start, self._stop, out=buffer)
        scale = self._stored.get(name + SCALE)
        if scale is not None:
            scale = take_rows(scale, self._rows.place_n, self._start, self._stop)
        value_TD = decode(stored_TD, scale)
        # A GPU may have to keep the old value, so it works on a copy.
        is_view = self._rows.place_n is None and value_TD.data_ptr() == stored_TD.data_ptr()
        return value_TD.clone() if is_view and value_TD.is_cuda else value_TD

    def _put(self, stored: Tensor, value: Tensor, skip: Tensor | None) -> None:
        if skip is not None:
            old = take_rows(stored, self._rows.place_n, self._start, self._stop)
            value = torch.where(skip, old, value)
        if self._rows.place_n is not None:
            put_rows_(stored, self._rows.place_n[self._start : self._stop], value)
        elif value.data_ptr() != stored[self._start : self._stop].data_ptr():
            stored[self._start : self._stop] = value
