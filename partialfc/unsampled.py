"""Dense SGD on rows that are visited now and then, exactly.

With a zero gradient, a step of SGD takes (w, v) of every element to A·(w, v) with

    A = [[1 - ηλ, -ημ], [λ, μ]]

so the steps that a row has missed are one product of 2×2 matrices, the same for all rows that were
last brought up to date at the same step. The table holds that product for every step so far; a row
holds the step it is at. A row that a step samples is brought up to it before pass 1, so every
forward sees the rows that dense SGD has, to rounding.

Shape suffixes: t = steps so far, D = embedding, T = rows of a tile.
"""

import torch
from torch import Tensor


def new_table(device: torch.device) -> Tensor:
    """Return the table before the first step: fp64 [1, 2, 2], the identity."""
    return torch.eye(2, dtype=torch.float64, device=device).unsqueeze(0)


def extend(
    table_t22: Tensor, *, lr: float, momentum: float, weight_decay: float, skip: Tensor | None
) -> Tensor:
    """Return the table after one more step; entry k takes a row from step k to now.

    Costs 32 bytes and eight multiplications for every step of the run so far.

    Args:
        table_t22: fp64 [t, 2, 2].
        lr: η of the step, likewise the others.
        momentum: μ; 0 for a rule without momentum.
        weight_decay: λ.
        skip: Scalar bool on the device: the step changed nothing. ``None``: it did.
    """
    identity = torch.eye(2, dtype=torch.float64, device=table_t22.device)
    values = [[1 - lr * weight_decay, -lr * momentum], [weight_decay, momentum]]
    step = torch.tensor(values, dtype=torch.float64, device=table_t22.device)
    if skip is not None:
        step = torch.where(skip, identity, step)
    return torch.cat([step @ table_t22, identity.unsqueeze(0)])


def catch_up_(table_t22: Tensor, at_T1: Tensor, row_TD: Tensor, velocity_TD: Tensor | None) -> None:
    """Bring fp32 rows and velocities up to the newest step of the table, in place.

    Args:
        table_t22: From :func:`extend`.
        at_T1: fp32 or integer step that each row is at.
        row_TD: w.
        velocity_TD: v; ``None`` for zero.
    """
    product_T22 = table_t22[at_T1.squeeze(1).long()].float()
    old_TD = row_TD.clone()
    row_TD.mul_(product_T22[:, :1, 0])
    if velocity_TD is not None:
        row_TD.addcmul_(velocity_TD, product_T22[:, :1, 1])
        velocity_TD.mul_(product_T22[:, 1:, 1]).addcmul_(old_TD, product_T22[:, 1:, 0])
