"""Some rows of the centers with their states, from how they are stored to fp32 and back.

Shape suffixes: C = rows at hand, D = embedding, n = rows meant, T = rows of a tile, 1 = one a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from partialfc.head.rows.formats import FORMATS, decode, encode, noise
from partialfc.head.rows.stored import AT_STEP, CENTERS, SCALE, Stored
from partialfc.head.tiles.torch_steps import put_rows_, take_rows
from partialfc.head.tiles.workspace import Workspace
from partialfc.keyed import key

_PIECE_BYTES = 2 << 20
"""Size of fp32 rows that a CPU changes at once: with their states and what is computed they stay in
its last cache, and Python's part is small beside it."""


def pieces(start: int, stop: int, centers_CD: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the rows to change at once; a GPU changes all."""
    on_gpu = centers_CD.is_cuda
    size = max(1, stop - start if on_gpu else _PIECE_BYTES // (4 * centers_CD.shape[1]))
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


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

    @property
    def at_T(self) -> Tensor:
        """int64 step that each row is at, where rows move unsampled."""
        at_C1 = self._stored[AT_STEP]
        return take_rows(at_C1, self._rows.place_n, self._start, self._stop)[:, 0].long()

    def write(self, step_key: int, *, skip: Tensor | None) -> None:
        """Store rows and states; nothing where ``skip`` is true, a scalar or [T, 1], which a GPU
        decides by itself."""
        for name, value in {CENTERS: self.row_TD, **self.states}.items():
            stored = self._stored[name]
            if FORMATS[stored.dtype] == "fp32":
                self._put(stored, value, skip)
            else:
                self._encode(name, value, key(step_key, name), skip)

    def _encode(self, name: str, value_TD: Tensor, name_key: int, skip: Tensor | None) -> None:
        """Store fp32 rows in fewer bits."""
        stored, workspace = self._stored[name], self._workspace
        number_T = self._rows.numbers(self._start, self._stop, value_TD.device)
        bits = noise(name_key, number_T, value_TD.shape[1], workspace)
        short_TD, scale_T1 = encode(value_TD, FORMATS[stored.dtype], bits, workspace)
        self._put(stored, short_TD, skip)
        if scale_T1 is not None:
            self._put(self._stored[name + SCALE], scale_T1, skip)

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
        out_TD = None
        if stored.dtype != torch.float32:
            out_TD = self._workspace(name, size, torch.float32, stored.device)
        value_TD = decode(stored_TD, scale, out_TD)
        # A GPU may have to keep the old value, so it works on a copy.
        is_view = self._rows.place_n is None and value_TD.data_ptr() == stored_TD.data_ptr()
        return value_TD.clone() if is_view and value_TD.is_cuda else value_TD

    def _put(self, stored: Tensor, value: Tensor, skip: Tensor | None) -> None:
        start, stop = self._start, self._stop
        if skip is not None:
            old = take_rows(stored, self._rows.place_n, start, stop)
            if self._rows.place_n is None:
                torch.where(skip, old, value, out=old)
                return
            value = torch.where(skip, old, value)
        if self._rows.place_n is not None:
            put_rows_(stored, self._rows.place_n[start:stop], value)
        elif value.data_ptr() != stored[start:stop].data_ptr():
            stored[start:stop] = value
