"""One step of the sampled rows: pass 2 tile by tile, and the rule on what it leaves.

Shape suffixes: T = rows of a tile, D = embedding, n = rows meant, N = n + 1, 1 = one a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.ranks import Ranks, sum_over_ranks
from partialfc.head.plan import Plan
from partialfc.head.rows import fused
from partialfc.head.rows.catch_up import Moves, move_
from partialfc.head.rows.rules import RowRule
from partialfc.head.rows.stored import RoundingKeys, SgdStep, Stored
from partialfc.head.rows.tile import Tile, pieces
from partialfc.head.tiles.parts import Kept
from partialfc.head.tiles.passes import positives, second_pass
from partialfc.head.tiles.torch_steps import project_
from partialfc.head.tiles.workspace import Workspace


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one step does to a row, besides its gradient.

    Attributes:
        rule: Of the update.
        settings: ``param_groups[0]``: the rule's fields as they are at this step.
        step_key: Of the stochastic rounding.
        skip: Scalar bool on a GPU: if true, nothing is written. ``None``: false.
        across: The ranks that hold the same rows, whose gradients are added up.
        moves: What rows have missed, if nobody has brought them up to the step: not for kernels.
    """

    rule: RowRule
    settings: dict[str, Any]
    step_key: int
    skip: Tensor | None
    across: Ranks
    moves: Moves | None

    @property
    def sgd(self) -> SgdStep:
        """The same for the kernels, which know SGD."""
        return SgdStep(
            lr=self.settings["lr"],
            weight_decay=self.settings["weight_decay"],
            momentum=self.settings["momentum"],
            keys=RoundingKeys.of(self.step_key),
            skip=self.skip,
        )


def update_(
    stored: Stored, kept: Sequence[Kept], step: RowStep, plan: Plan, workspace: Workspace
) -> None:
    """Update rows by the micro-batches that sampled them.

    Collective where other ranks hold the same rows: one all-reduce of each tile's gradient.

    Args:
        stored: Centers and states; its rows are a superset of every micro-batch's.
        kept: The micro-batches.
        step: What happens to a row.
        plan: Which code does it.
        workspace: Buffers of the tiles.
    """
    own = positives(stored.rows.row_n, kept)
    if plan.path == "fused":
        fused.second_pass(stored, kept, own, step.sgd, workspace)
        return
    tiles = second_pass(stored.centers, stored.rows, kept, workspace)
    if plan.row_kernel:
        sgd_ = import_module("partialfc.head.rows.kernels").sgd_
        sgd, first_N = step.sgd, own.first(stored.count)
        for start, stop, gradient_TD, _ in tiles:
            sgd_(stored, start, stop, gradient_TD, own, first_N, sgd)
        return
    for start, stop, gradient_TD, factor_T1 in tiles:
        own.add_(gradient_TD, start, factor_T1)
        gradient_TD = sum_over_ranks(gradient_TD, step.across)
        for low, high in pieces(start, stop, stored.centers):
            tile, part = Tile(stored, low, high, workspace), slice(low - start, high - start)
            if step.moves is not None:
                move_(step.moves, tile, workspace)
            if kept[0].logits.unit:
                # Pass 2 is done with the keys of this tile.
                size, device = (*tile.row_TD.shape,), gradient_TD.device
                scratch_TD = workspace("key", size, torch.float32, device)
                factor = None if factor_T1 is None else factor_T1[part]
                project_(gradient_TD[part], tile.row_TD, scratch_TD, factor)
            step.rule.update_(step.settings, tile.row_TD, gradient_TD[part], tile.states)
            tile.write(step.step_key, skip=step.skip)
