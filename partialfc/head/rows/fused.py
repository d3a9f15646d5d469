"""Pass 2 by the fused kernels: the kernel that makes a tile's gradient updates its rows.

Shape suffixes: B = rows of the gathered batch, C = rows of a shard, D = embedding, n = sampled
rows, P = positives, T = rows of a tile.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from partialfc.head.tiles.fused import keys, tiles
from partialfc.head.tiles.parts import Kept
from partialfc.head.tiles.passes import align, present
from partialfc.head.tiles.positives import Positives
from partialfc.head.tiles.workspace import Workspace


def second_pass(
    rows: Tensor | None,
    kept: Sequence[Kept],
    own: Positives,
    arguments: Mapping[str, Any],
    workspace: Workspace,
) -> None:
    """Update the rows of the sample by the gradient of all micro-batches; no collective.

    Args:
        rows: int64 [n] rows to update, a superset of every micro-batch's, or ``None`` for all.
        kept: The micro-batches.
        own: Their positives.
        arguments: What :func:`partialfc.head.rows.kernels.sgd_` is given, but for the tile.
        workspace: Buffers of the tiles.
    """
    kernels = import_module("partialfc.head.rows.fused_kernels")
    centers_CD: Tensor = arguments["centers_CD"]
    index = None if arguments["compact"] else rows
    total, dim = len(centers_CD) if index is None else len(index), centers_CD.shape[1]
    target = [align(one.target_B, one.row_n, rows) for one in kept]
    present_n = [present(one.row_n, rows) for one in kept]
    largest = max(len(one.query_BD) for one in kept)
    # Kept tiles are those of a micro-batch of the same size with the same rows.
    same = [one.row_n is rows and len(one.query_BD) == largest for one in kept]
    for number, (start, stop) in enumerate(tiles(largest, total)):
        size = stop - start, dim
        gradient_TD = workspace("gradient", size, torch.float32, centers_CD.device)
        earlier_TD: Tensor | None = None
        key_TD: Tensor | None = None
        for i, one in enumerate(kept):
            exp_TB = None
            if same[i] and number < len(one.exponentials):
                exp_TB = one.exponentials[number].exp_TB
            elif key_TD is None:
                dtype = one.query_BD.dtype
                key_TD = keys(centers_CD, index, start, stop, dtype, workspace)
            kernels.update_(
                start=start,
                stop=stop,
                query_BD=one.query_BD,
                key_TD=None if exp_TB is not None else key_TD,
                target_B=target[i],
                factor_B=one.negative_B,
                scale=one.logits.scale,
                maximum_B=one.maximum_B,
                bend=one.logits.bend,
                even_D=one.even_D,
                present_n=present_n[i],
                exp_TB=exp_TB,
                gradient_TD=gradient_TD,
                earlier_TD=earlier_TD,
                last=one is kept[-1],
                place_P=own.target_P,
                **arguments,
            )
            if len(kept) > 1:
                every_TD = workspace("gradients", size, torch.float32, centers_CD.device)
                earlier_TD = torch.add(gradient_TD, 0 if i == 0 else every_TD, out=every_TD)
