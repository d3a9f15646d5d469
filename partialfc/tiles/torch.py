"""The steps of a tile in torch operations, on any device.

Shape suffixes: B = rows of the gathered batch, D = embedding, n = sampled rows, T = rows of a tile.
Tiles lie class by class, [T, B], so that a tile of centers is contiguous in every product.
"""

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-12
"""A shorter vector has no direction: its unit vector and its gradient are zero."""


def unit_rows(
    centers_CD: Tensor, rows: Tensor | None, start: int, stop: int, out_TD: Tensor
) -> None:
    """Write the unit centers of rows ``start:stop`` of the sample to ``out_TD``, any dtype."""
    in_place = rows is not None and out_TD.dtype == centers_CD.dtype
    row_TD = take_rows(centers_CD, rows, start, stop, out=out_TD if in_place else None).float()
    torch.mul(row_TD, _reciprocal_norms(row_TD), out=out_TD)


def exponentials(
    logit_TB: Tensor,
    column_B: Tensor,
    *,
    limit: float | None,
    shift_B: Tensor | None,
    sum_B: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return exp(logit - shift) [T, B], 0 at the positives; ``logit_TB`` may be used up.

    Args:
        logit_TB: Scaled cosines, fp32 or bf16.
        column_B: int64 row of the tile that is the positive of each column, or any value outside.
        limit: Logit above which the inter-class filter takes a negative out: it counts as logit 0
            in the sum, and is 0 in the result. ``None``: no filter.
        shift_B: Subtracted from the logits; ``None`` for 0.
        sum_B: fp32; the sums over the tile's negatives are added to it. ``None``: not wanted.
        dtype: Of the result. The sum is that of the fp32 values.
    """
    leave_out_(logit_TB, column_B)
    filtered_TB = None
    if limit is not None:
        filtered_TB = logit_TB > limit
        logit_TB.masked_fill_(filtered_TB, 0)
    logit_TB = logit_TB.float()
    if shift_B is not None:
        logit_TB.sub_(shift_B)
    exp_TB = logit_TB.exp_()
    if sum_B is not None:
        sum_B.add_(exp_TB.sum(0))
    if filtered_TB is not None:
        exp_TB.masked_fill_(filtered_TB, 0)
    return exp_TB.to(dtype)


def leave_out_(logit_TB: Tensor, column_B: Tensor) -> None:
    """Set the positives that lie in the tile to -inf; no host synchronisation."""
    inside_1B = ((column_B >= 0) & (column_B < len(logit_TB))).unsqueeze(0)
    row_1B = column_B.clamp(0, len(logit_TB) - 1).unsqueeze(0)
    kept_1B = logit_TB.gather(0, row_1B)
    logit_TB.scatter_(0, row_1B, torch.where(inside_1B, -torch.inf, kept_1B))


def take_rows(
    tensor: Tensor, rows: Tensor | None, start: int, stop: int, *, out: Tensor | None = None
) -> Tensor:
    """Return rows ``start:stop`` of the sample: a view where the sample is the whole shard.

    ``out`` is a buffer for the rows where they are copied.
    """
    if rows is None:
        return tensor[start:stop]
    return torch.index_select(tensor, 0, rows[start:stop], out=out)


def unit(row_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 unit rows [T, D] and reciprocal norms [T, 1], 0 where a row has no length.

    A non-finite row stays non-finite, so that the loss shows it.
    """
    row_TD = row_TD.float()
    reciprocal_T1 = _reciprocal_norms(row_TD)
    return row_TD * reciprocal_T1, reciprocal_T1


def project_(gradient_TD: Tensor, row_TD: Tensor, scratch_TD: Tensor) -> None:
    """Turn the gradient by the unit centers into that by the fp32 rows, in place."""
    reciprocal_T1 = _reciprocal_norms(row_TD)
    torch.mul(gradient_TD, row_TD, out=scratch_TD)
    along_T1 = scratch_TD.sum(1, keepdim=True)
    gradient_TD.mul_(reciprocal_T1).addcmul_(row_TD, along_T1 * reciprocal_T1**3, value=-1)


def _reciprocal_norms(row_TD: Tensor) -> Tensor:
    norm_T1 = torch.linalg.vector_norm(row_TD, dim=1, keepdim=True)
    reciprocal_T1 = torch.where(norm_T1 > _SMALLEST_NORM, norm_T1.reciprocal(), 0.0)
    return torch.where(norm_T1.isfinite(), reciprocal_T1, torch.nan)
