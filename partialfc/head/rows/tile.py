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

_ENCODED_BYTES = 1 << 20
"""Size of fp32 rows that a CPU rounds at once: with what is computed they stay in its cache."""


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
        for name, value in {CENTERS: self.row_TD, **self.states}.items():
            stored = self._stored[name]
            if FORMATS[stored.dtype] == "fp32":
                self._put(stored, value, self._start, self._stop, skip)
            else:
                self._encode(name, value, key(step_key, name), skip)

    def _encode(self, name: str, value_TD: Tensor, name_key: int, skip: Tensor | None) -> None:
        """Store fp32 rows in fewer bits."""
        stored, workspace = self._stored[name], self._workspace
        dim, device = value_TD.shape[1], value_TD.device
        size = len(value_TD) if value_TD.is_cuda else max(1, _ENCODED_BYTES // (4 * dim))
        for start in range(self._start, self._stop, max(1, size)):
            stop = min(start + size, self._stop)
            bits = noise(name_key, self._rows.numbers(start, stop, device), dim, workspace)
            row_TD = value_TD[start - self._start : stop - self._start]
            short_TD, scale_T1 = encode(row_TD, FORMATS[stored.dtype], bits, workspace)
            self._put(stored, short_TD, start, stop, skip)
            if scale_T1 is not None:
                self._put(self._stored[name + SCALE], scale_T1, start, stop, skip)

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

    def _put(
        self, stored: Tensor, value: Tensor, start: int, stop: int, skip: Tensor | None
    ) -> None:
        """Store rows ``start:stop`` of those meant."""
        if skip is not None:
            value = torch.where(skip, take_rows(stored, self._rows.place_n, start, stop), value)
        if self._rows.place_n is not None:
            put_rows_(stored, self._rows.place_n[start:stop], value)
        elif value.data_ptr() != stored[start:stop].data_ptr():
            stored[start:stop] = value
