"""Dense SGD on rows that are visited now and then, exactly.

With a zero gradient, a step of SGD takes (w, v) of every element to A·(w, v) with

    A = [[1 - ηλ, -ημ], [λ, μ]]

so the steps that a row has missed are one product of 2×2 matrices, the same for all rows that were
last brought up to date at the same step. :class:`Moves` holds these products; a row holds the step
it is at. Every forward sees the rows that dense SGD has, to rounding. On a CPU both passes multiply
what they read of a row that a step samples, and its update writes it; a GPU, which has a kernel for
it, writes what a row has missed before pass 1, and the update writes it once more.

Shape suffixes: t = steps so far, C = rows of the tensors at hand, n = rows to bring up to date, D =
embedding, T = rows of a tile, 22 = two rows and columns of a matrix.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from partialfc.head.plan import Path
from partialfc.head.rows.stored import AT_STEP, MOMENTUM, RoundingKeys, Stored
from partialfc.head.rows.tile import Tile, pieces
from partialfc.head.tiles.workspace import Workspace

_BLOCK = 1024
"""Steps whose products every step multiplies. A constant: products are rounded by it."""
_KEPT = 64 * _BLOCK
"""Steps whose products are kept: a row that none of them sampled is brought up to date, and a run
of any length keeps 2 MiB. A constant: such a row is rounded once more."""


class Moves:
    """What the steps so far do to a row that none of them samples, from any of them on.

    The newest block of steps has the products up to now, all earlier steps those up to the start of
    that block, so that a step costs no more in a long run; a step takes 32 bytes. Steps that no row
    is at are dropped (:attr:`due`), and the others counted from the first that is left.

    Args:
        device: Where the rows are brought up to date.

    Attributes:
        steps: t.
    """

    def __init__(self, device: torch.device) -> None:
        self._products = torch.empty(_BLOCK + 1, 2, 2, dtype=torch.float64, device=device)
        self._identity = torch.eye(2, dtype=torch.float64, device=device)
        self._products[0] = self._identity
        self.steps = 0

    @property
    def products(self) -> Tensor:
        """fp64 [t + 1, 2, 2], all there is to save; a view that the next step changes."""
        return self._products[: self.steps + 1]

    @property
    def block(self) -> int:
        """The step that the newest block starts at."""
        return self.steps // _BLOCK * _BLOCK

    @property
    def due(self) -> int:
        """How many of the oldest steps are to be dropped, when no row is at them; whole blocks."""
        return max(0, self.steps - _KEPT) // _BLOCK * _BLOCK

    def drop(self, steps: int) -> None:
        """Forget the oldest steps; rows must count theirs from there."""
        self._products = self._products[steps:].clone()
        self.steps -= steps

    def load(self, products: Tensor) -> None:
        """Take over what :attr:`products` was.

        Raises:
            ValueError: If it cannot have been that.
        """
        if products.dtype != torch.float64 or not len(products) or products.shape[1:] != (2, 2):
            raise ValueError(
                f"moves must be float64 [steps + 1, 2, 2], got {products.dtype} "
                f"{list(products.shape)}."
            )
        self.steps = len(products) - 1
        self._products = products.new_empty(
            self.block + _BLOCK + 1, 2, 2, device=self._products.device
        )
        self.products.copy_(products)

    def extend(self, settings: Mapping[str, Any], skip: Tensor | None) -> None:
        """Take one more step; no host synchronisation.

        Args:
            settings: ``lr``, ``momentum`` and ``weight_decay`` of the step: η, μ and λ.
            skip: Scalar bool on the device: the step changed nothing. ``None``: it did.
        """
        lr, momentum, weight_decay = (settings[n] for n in ("lr", "momentum", "weight_decay"))
        began = self.block
        newest = self._products[began : self.steps + 1]
        row, velocity = newest[:, 0], newest[:, 1]
        moved = torch.stack(
            [
                (row * (1 - lr * weight_decay)).add_(velocity, alpha=-lr * momentum),
                (row * weight_decay).add_(velocity, alpha=momentum),
            ],
            dim=1,
        )
        if skip is None:
            newest.copy_(moved)
        else:
            torch.where(skip, newest, moved, out=newest)
        self.steps += 1
        self._products[self.steps] = self._identity
        if self.block > began:
            earlier = self._products[:began]
            earlier.copy_(_times(self._products[began], earlier))
            longer = self._products.new_empty(self.steps + _BLOCK + 1, 2, 2)
            longer[: self.steps + 1] = self._products
            self._products = longer

    def since(self, at_T: Tensor) -> Tensor:
        """Return the product [T, 2, 2] that takes a row from a step to now, in fp64.

        Args:
            at_T: int64 steps, each in [0, t].
        """
        product_T22 = self._products.index_select(0, at_T)
        if not self.block:
            return product_T22
        whole_T22 = _times(self._products[self.block], product_T22)
        return torch.where((at_T < self.block).view(-1, 1, 1), whole_T22, product_T22)


def _times(later_22: Tensor, earlier_T22: Tensor) -> Tensor:
    """The matrix product, element by element: a kernel that does the same has the same bits."""
    return later_22[:, :1] * earlier_T22[:, :1] + later_22[:, 1:] * earlier_T22[:, 1:]


def catch_up_(
    moves: Moves, stored: Stored, step_key: int, *, path: Path, workspace: Workspace
) -> None:
    """Bring rows and their momentum up to the newest step, in place.

    A row that is at it already is left as it is stored.

    Args:
        moves: Of the steps so far.
        stored: Centers and states, with the step that each row is at.
        step_key: Of the stochastic rounding.
        path: Which code does it.
        workspace: Buffers of the tiles.
    """
    if path != "torch":
        import_module("partialfc.head.rows.kernels").catch_up_(
            stored, moves.products, moves.block, RoundingKeys.of(step_key)
        )
        return
    at_C, place_n = stored.states[AT_STEP], stored.rows.place_n
    at_n = (at_C if place_n is None else at_C.index_select(0, place_n))[:, 0]
    on_gpu = at_n.is_cuda  # it leaves rows as they are without telling the host which
    if not on_gpu:
        (behind,) = (at_n < moves.steps).nonzero(as_tuple=True)
        if len(behind) < len(at_n):
            at_n = at_n[behind]
            stored = replace(stored, rows=stored.rows.some(behind))
    for start, stop in pieces(0, len(at_n), stored.centers):
        tile = Tile(stored, start, stop, workspace)
        move_(moves, tile, workspace)
        newest_T1 = (at_n[start:stop] == moves.steps).unsqueeze(1)
        tile.write(step_key, skip=newest_T1 if on_gpu else None)
    mark_newest_(moves, stored)


def mark_newest_(moves: Moves, stored: Stored) -> None:
    """Note that rows are at the newest step."""
    if stored.rows.place_n is None:
        stored.states[AT_STEP].fill_(moves.steps)
    else:
        stored.states[AT_STEP].index_fill_(0, stored.rows.place_n, moves.steps)


def newest(moves: Moves, stored: Stored, workspace: Workspace, place_T: Tensor) -> Tensor:
    """Return the rows at some places as they are at the newest step; nothing is written.

    They are fp32 [T, D], in a buffer that the next tile has too.
    """
    rows = stored.rows.some(place_T)
    tile = Tile(replace(stored, rows=rows), 0, len(place_T), workspace)
    product_T22 = moves.since(tile.at_T).float()
    row_TD, velocity_TD = tile.row_TD, tile.states.get(MOMENTUM)
    if velocity_TD is None:
        return row_TD.mul_(product_T22[:, 0, :1])
    to_row_TD = velocity_TD.mul_(product_T22[:, 0, 1:])
    return torch.addcmul(to_row_TD, row_TD, product_T22[:, 0, :1], out=row_TD)


def move_(moves: Moves, tile: Tile, workspace: Workspace) -> None:
    """Bring fp32 rows and velocities up to the newest step; the gradient's buffer stays."""
    row_TD, velocity_TD = tile.row_TD, tile.states.get(MOMENTUM)
    product_T22 = moves.since(tile.at_T).float()
    by_row_T2, by_velocity_T2 = product_T22[:, :, :1], product_T22[:, :, 1:]
    if velocity_TD is None:
        row_TD.mul_(by_row_T2[:, 0])
        return
    size = (*row_TD.shape,)
    to_velocity_TD, to_row_TD = (
        workspace(name, size, torch.float32, row_TD.device) for name in ("key", "to row")
    )
    torch.mul(row_TD, by_row_T2[:, 1], out=to_velocity_TD)
    torch.mul(velocity_TD, by_velocity_T2[:, 0], out=to_row_TD)
    torch.addcmul(to_row_TD, row_TD, by_row_T2[:, 0], out=row_TD)
    torch.addcmul(to_velocity_TD, velocity_TD, by_velocity_T2[:, 1], out=velocity_TD)
