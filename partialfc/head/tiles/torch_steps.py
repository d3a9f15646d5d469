"""The steps of a tile in torch operations, on any device.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, I =
identities of a tile, K = positives of a row, N = centers of an identity, n = sampled rows, T = rows
of a tile, 1 = one a row or column.
Tiles lie class by class, [T, B], so that a tile of centers is contiguous in every product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.head.tiles.workspace import Workspace
from partialfc.margins.base import Bend
from partialfc.numerics import reciprocal_norms

LEFT_OUT = -1e6
"""Bent logit of what is left out: exp of it, and of it less any shift above half of it, is 0."""


def unit_rows(
    centers_CD: Tensor, rows: Tensor | None, start: int, stop: int, out_TD: Tensor
) -> None:
    """Write the unit centers of rows ``start:stop`` of the sample to ``out_TD``, any dtype."""
    in_place = rows is not None and out_TD.dtype == centers_CD.dtype
    row_TD = take_rows(centers_CD, rows, start, stop, out=out_TD if in_place else None).float()
    torch.mul(row_TD, reciprocal_norms(row_TD), out=out_TD)


def exponentials(
    logit_TB: Tensor,
    column_KB: Tensor,
    *,
    bend: Bend | None,
    shift_B: Tensor | None,
    sum_B: Tensor | None,
    dtype: torch.dtype,
    workspace: Workspace,
    factor_T1: Tensor | None = None,
) -> Tensor:
    """Return exp(logit - shift) times the bend's slope [T, B], 0 at the positives.

    ``logit_TB`` may be used up.

    Args:
        logit_TB: Scaled products, fp32 or bf16.
        column_KB: int64 rows of the tile that are the positives of each column, or any values
            outside.
        bend: Another logit above a threshold; its slope is 1 below. ``None``: no other.
        shift_B: Subtracted from the logits; ``None`` for 0.
        sum_B: fp32; the sums over the tile's negatives are added to it. ``None``: not wanted.
        dtype: Of the result. The sum is that of the fp32 values.
        workspace: Buffers of what a bend needs.
        factor_T1: fp32 factor of the result, and not of the sum.
    """
    leave_out_(logit_TB, column_KB)
    logit_TB = logit_TB.float()
    slope_TB: Tensor | None = None
    if bend is not None:
        slope_TB = bend_(logit_TB, bend, workspace)
        shift_B = None if shift_B is None else shift_B.clamp(min=LEFT_OUT / 2)
    if shift_B is not None:
        logit_TB.sub_(shift_B)
    exp_TB = logit_TB.exp_()
    if sum_B is not None:
        sum_B.add_(exp_TB.sum(0))
    if slope_TB is not None:
        exp_TB.mul_(slope_TB)
    if factor_T1 is not None:
        exp_TB.mul_(factor_T1)
    return exp_TB.to(dtype)


def sigmoids(
    logit_TB: Tensor,
    column_KB: Tensor,
    offset: Tensor,
    *,
    sums: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    factor_T1: Tensor | None = None,
    log_weight_T1: Tensor | None = None,
) -> Tensor:
    """Return sigmoid(logit - offset) [T, B], 0 at the positives; ``logit_TB`` is used up.

    Args:
        logit_TB: Scaled products, fp32 or bf16.
        column_KB: As in :func:`exponentials`.
        offset: fp32 scalar.
        sums: fp32 [B] each; log(1 + exp(logit - offset)) and the sigmoids over the tile's negatives
            are added to them. ``None``: not wanted.
        dtype: Of the result.
        factor_T1: As in :func:`exponentials`.
        log_weight_T1: fp32, log of a factor of result and sums; ``None`` for 0.
    """
    leave_out_(logit_TB, column_KB)
    logit_TB = logit_TB.float().sub_(offset)
    weight_T1 = None if log_weight_T1 is None else log_weight_T1.exp()
    if sums is not None:
        loss_TB = F.softplus(logit_TB)
        sums[0].add_((loss_TB if weight_T1 is None else loss_TB.mul_(weight_T1)).sum(0))
    logit_TB.sigmoid_()
    if weight_T1 is not None:
        logit_TB.mul_(weight_T1)
    if sums is not None:
        sums[1].add_(logit_TB.sum(0))
    if factor_T1 is not None:
        logit_TB.mul_(factor_T1)
    return logit_TB.to(dtype)


def bend_(logit: Tensor, bend: Bend, workspace: Workspace) -> Tensor:
    """Bend fp32 logits [..., B] in place; return the slope of the bend, 1 below it.

    A logit of -inf becomes ``LEFT_OUT``. By arithmetic: a choice between two tensors takes a CPU
    longer than all of this.
    """
    constant, linear, quadratic = bend.coefficient_3.unbind()
    above, slope = (
        workspace(name, (*logit.shape,), torch.float32, logit.device) for name in ("above", "slope")
    )
    logit.clamp_(min=LEFT_OUT)  # inf * 0 would be NaN
    torch.sub(logit, bend.threshold_B, out=above).sign_().clamp_(min=0)
    torch.mul(logit, 2 * quadratic, out=slope).add_(linear - 1).mul_(above).add_(1)
    # z + above * (a + (b - 1) z + c z²)
    rise = workspace("rise", (*logit.shape,), torch.float32, logit.device)
    torch.mul(logit, quadratic, out=rise).add_(linear - 1).mul_(logit).add_(constant)
    logit.add_(rise.mul_(above))
    return slope


def keep_nearest_(logit_TB: Tensor, column_KB: Tensor, per_identity: int) -> None:
    """Set all but the largest of every ``per_identity`` logits to -inf, and the positives' all.

    Args:
        logit_TB: T is a multiple of ``per_identity``.
        column_KB: As in :func:`exponentials`, of any row of a positive's identity.
        per_identity: N.
    """
    logit_INB = logit_TB.view(-1, per_identity, logit_TB.shape[1])
    largest_I1B, which_I1B = logit_INB.max(1, keepdim=True)
    own_KB = column_KB.div(per_identity, rounding_mode="floor")
    leave_out_(largest_I1B.squeeze(1), own_KB)
    logit_INB.fill_(-torch.inf).scatter_(1, which_I1B, largest_I1B)


def leave_out_(logit_TB: Tensor, column_KB: Tensor) -> None:
    """Set the positives that lie in the tile to -inf; no host synchronisation."""
    inside_KB = (column_KB >= 0) & (column_KB < len(logit_TB))
    row_KB = column_KB.clamp(0, len(logit_TB) - 1)
    if len(column_KB) == 1:
        kept_1B = logit_TB.gather(0, row_KB)
        logit_TB.scatter_(0, row_KB, torch.where(inside_KB, -torch.inf, kept_1B))
        return
    # A positive that is outside falls on a row at the edge, which may be another's: the smaller.
    limit_KB = torch.where(inside_KB, -torch.inf, torch.inf).to(logit_TB.dtype)
    logit_TB.scatter_reduce_(0, row_KB, limit_KB, "amin")


def take_rows(
    tensor: Tensor, rows: Tensor | None, start: int, stop: int, *, out: Tensor | None = None
) -> Tensor:
    """Return rows ``start:stop`` of the sample: a view where the sample is the whole shard.

    ``out`` is a buffer for the rows where they are copied.
    """
    if rows is None:
        return tensor[start:stop]
    out = None if out is None else _movable(out)
    return torch.index_select(_movable(tensor), 0, rows[start:stop], out=out).view(tensor.dtype)


def put_rows_(tensor: Tensor, place_n: Tensor, rows: Tensor) -> None:
    """Put rows at int64 places.

    A CPU moves words of 16 bytes, in torch complex ones, up to three times as fast as elements.
    """
    to, given = _movable(tensor), _movable(rows)
    if _has_words(to) and _has_words(given):
        to, given = to.view(torch.complex128), given.view(torch.complex128)
    to.index_copy_(0, place_n, given)


def _has_words(row_TD: Tensor) -> bool:
    """Whether rows on a CPU are words of 16 bytes, at addresses that are multiples of it."""
    size = row_TD.element_size()
    addresses = row_TD.shape[-1] * size, row_TD.storage_offset() * size, row_TD.data_ptr()
    on_cpu = row_TD.device.type == "cpu" and row_TD.is_contiguous()
    return on_cpu and all(address % 16 == 0 for address in addresses)


def _movable(tensor: Tensor) -> Tensor:
    """Rows of fp8 as bytes, which torch moves on every device."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def project_(
    gradient_TD: Tensor, row_TD: Tensor, scratch_TD: Tensor, factor_T1: Tensor | None = None
) -> None:
    """Turn the gradient by the unit centers into that by the fp32 rows, in place.

    ``factor_T1`` are the reciprocal norms of the rows, if the gradient was multiplied by them.
    """
    if factor_T1 is None:
        factor_T1 = reciprocal_norms(row_TD)
        gradient_TD.mul_(factor_T1)
    torch.mul(gradient_TD, row_TD, out=scratch_TD)
    along_T1 = scratch_TD.sum(1, keepdim=True)
    gradient_TD.addcmul_(row_TD, along_T1 * factor_T1.square(), value=-1)
