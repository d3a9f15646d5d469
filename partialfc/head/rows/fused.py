"""Pass 2 by the fused kernels: the kernel that makes a tile's gradient updates its rows.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, n =
rows of pass 2, N = n + 1, T = rows of a tile.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from partialfc.head.rows.stored import SgdStep, Stored
from partialfc.head.tiles.fused import keys, tiles
from partialfc.head.tiles.parts import Kept, MicroBatch
from partialfc.head.tiles.positives import Positives
from partialfc.head.tiles.workspace import Workspace


def second_pass(
    stored: Stored, kept: Sequence[Kept], own: Positives, step: SgdStep, workspace: Workspace
) -> None:
    """Update rows by the gradient of all micro-batches; no collective.

    Args:
        stored: Centers and momentum; its rows are a superset of every micro-batch's.
        kept: The micro-batches.
        own: Their positives.
        step: Rates, keys of the rounding, and whether anything is written.
        workspace: Buffers of the tiles.
    """
    kernels = import_module("partialfc.head.rows.fused_kernels")
    centers_CD, rows = stored.centers, stored.rows
    first_N, device = own.first(stored.count), centers_CD.device
    parts = [MicroBatch.of(one, rows.row_n) for one in kept]
    largest = max(len(one.query_BD) for one in kept)
    for number, (start, stop) in enumerate(tiles(largest, stored.count)):
        size = stop - start, centers_CD.shape[1]
        gradient_TD = workspace("gradient", size, torch.float32, device)
        earlier_TD: Tensor | None = None
        key_TD: Tensor | None = None
        for i, part in enumerate(parts):
            exp_TB = None
            # Kept tiles are those of a micro-batch of the same size with the same rows.
            same = part.present_n is None and len(part.kept.query_BD) == largest
            if same and number < len(part.kept.exponentials):
                exp_TB = part.kept.exponentials[number].exp_TB
            elif key_TD is None:
                dtype = part.kept.query_BD.dtype
                key_TD = keys(centers_CD, rows.place_n, start, stop, dtype, workspace)
            tile = kernels.TileGradient(
                start=start,
                stop=stop,
                key_TD=None if exp_TB is not None else key_TD,
                exp_TB=exp_TB,
                gradient_TD=gradient_TD,
                earlier_TD=earlier_TD,
                last=part is parts[-1],
            )
            kernels.update_(stored, part, tile, own, first_N, step)
            if len(kept) > 1:
                every_TD = workspace("gradients", size, torch.float32, device)
                earlier_TD = torch.add(gradient_TD, 0 if i == 0 else every_TD, out=every_TD)
