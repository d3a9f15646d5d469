"""The two passes by the fused kernels, in place of the steps of a tile.

Nothing of a tile is written but its keys, what is kept of its exponentials and, in pass 2, its
gradient, which the kernel that wrote it turns into the update. So tiles are large here.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, n =
sampled rows, P = positives, S = splits of a tile, T = rows of a tile.
"""

from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor

from partialfc.head.machine import card_of
from partialfc.head.row_set import RowSet
from partialfc.head.tiles.cards import Card
from partialfc.head.tiles.limits import STATIONARY
from partialfc.head.tiles.parts import FirstPass, KeptTile, Logits
from partialfc.head.tiles.workspace import Workspace

_NO_LOGIT = -1e30
"""Row maximum of a tile without negatives, as the kernel writes it."""

_TILE_ROWS = 132 * 4 * STATIONARY
"""Four blocks of classes for each multiprocessor of an H200; keys of 33 MiB at D = 512."""

_LARGEST_INDEX = 2**31
"""Places in [T, B] that the kernels count in 32 bits."""


def first_pass(
    query_BD: Tensor,
    centers_CD: Tensor,
    rows: RowSet,
    target_P: Tensor,
    logits: Logits,
    *,
    want_pull: bool,
    want_key_sum: bool,
    keep_bytes: int,
    workspace: Workspace,
) -> FirstPass:
    """Return what :func:`partialfc.head.tiles.passes.first_pass` returns; no collective.

    Exponentials are kept where they need no row maximum. A row has one positive.
    """
    kernels = import_module("partialfc.head.tiles.fused_kernels")
    (batch, dim), device = query_BD.shape, query_BD.device
    splits = splits_of(batch, card_of(device))

    def partial(name: str, *more: int) -> Tensor:
        return workspace(name, (splits, batch, *more), torch.float32, device)

    sum_B = torch.zeros(batch, device=device)
    pull_BD = torch.zeros(batch, dim, device=device) if want_pull else None
    key_sum_D = torch.zeros(dim, device=device) if want_key_sum else None
    maximum_B = torch.full_like(sum_B, _NO_LOGIT) if logits.needs_maximum else None
    kept: list[KeptTile] = []
    total = rows.count(centers_CD)
    for start, stop in tiles(batch, total):
        key_TD = keys(centers_CD, rows.place_n, start, stop, query_BD.dtype, workspace)
        if key_sum_D is not None:
            key_sum_D.add_(key_TD.sum(0, dtype=torch.float32))
        exp_TB = None
        keep_bytes -= (stop - start) * batch * query_BD.element_size()
        if keep_bytes >= 0 and maximum_B is None:
            exp_TB = query_BD.new_empty(stop - start, batch)
            kept.append(KeptTile(exp_TB, None, None))
        sum_SB, pull_SBD = partial("sums"), partial("pull", dim) if want_pull else None
        maximum_SB = None if maximum_B is None else partial("maximum")
        kernels.pull_(
            query_BD,
            key_TD,
            target_P - start,
            scale=logits.scale,
            bend=logits.bend,
            sum_SB=sum_SB,
            maximum_SB=maximum_SB,
            pull_SBD=pull_SBD,
            exp_TB=exp_TB,
        )
        if maximum_B is not None and maximum_SB is not None:
            larger_B = torch.maximum(maximum_B, maximum_SB.amax(0))
            shrink_B, shrink_SB = (maximum_B - larger_B).exp(), (maximum_SB - larger_B).exp()
            maximum_B = larger_B
            sum_B.mul_(shrink_B)
            sum_SB.mul_(shrink_SB)
            if pull_BD is not None and pull_SBD is not None:
                pull_BD.mul_(shrink_B.unsqueeze(1))
                pull_SBD.mul_(shrink_SB.unsqueeze(2))
        sum_B.add_(sum_SB.sum(0))
        if pull_BD is not None and pull_SBD is not None:
            pull_BD.add_(pull_SBD.sum(0))
    return FirstPass(sum_B, None, maximum_B, pull_BD, key_sum_D, total, kept)


def splits_of(batch: int, card: Card) -> int:
    """Return S, into how many ranges pass 1 cuts the classes of a tile."""
    return max(1, card.multiprocessors // -(-batch // STATIONARY))


def tiles(batch: int, total: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the tiles of a sample: a place in [T, B] fits in 32 bits."""
    size = max(64, min(_TILE_ROWS, _LARGEST_INDEX // max(1, batch) // 64 * 64))
    for start in range(0, total, size):
        yield start, min(start + size, total)


def keys(
    centers_CD: Tensor,
    rows: Tensor | None,
    start: int,
    stop: int,
    dtype: torch.dtype,
    workspace: Workspace,
) -> Tensor:
    """Return the unit centers of rows ``start:stop`` of the sample [T, D], in a buffer."""
    key_TD = workspace("key", (stop - start, centers_CD.shape[1]), dtype, centers_CD.device)
    import_module("partialfc.head.tiles.triton_steps").unit_rows(
        centers_CD, rows, start, stop, key_TD
    )
    return key_TD
