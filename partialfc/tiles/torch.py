"""The two passes in torch operations, on any device.

Logits exist one tile of classes at a time: pass 1 leaves the row sums of their exponentials and
those exponentials times the centers; pass 2 computes the tile again and leaves the gradient of
its centers. Neither the logits [B, n] nor the gradient of the centers [n, D] is ever whole.

Shape suffixes: B = rows of the gathered batch, D = embedding, n = sampled rows, T = rows of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.margins import Margin

_LARGEST_PLAIN_SCALE = 64.0
"""exp(±s) of a larger scale, summed over 1e8 classes, leaves fp32's range: keep a row maximum."""

_SMALLEST_NORM = 1e-12
"""A shorter vector has no direction: its unit vector and its gradient are zero."""

_TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Size of one fp32 tile of logits: about half a core's L2 cache; enough for a GPU to be full."""


@dataclass(frozen=True, slots=True)
class FirstPass:
    """What pass 1 knows of this rank's negatives.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the sampled negatives.
        maximum_B: Largest negative logit, or ``None`` where the scale needs no maximum (then 0).
        pull_BD: Sum of exp(logit - maximum) * slope / scale * unit center; ``None`` if not wanted.
    """

    sum_B: Tensor
    maximum_B: Tensor | None
    pull_BD: Tensor | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What pass 2 needs of one micro-batch.

    Attributes:
        unit_BD: Gathered unit embeddings.
        rows: int64 [n] sampled rows, or ``None`` for all rows of the shard.
        target_B: Column of each row's own class center among the sampled ones, or ``NOT_LOCAL``.
        margin: The margin of the forward pass.
        maximum_B: Subtracted from the logits before exp, or ``None``.
        negative_B: Factor that makes exp(logit - maximum) the derivative of the loss by the cosine.
        positive_B: Derivative of the loss by the positive's cosine.
    """

    unit_BD: Tensor
    rows: Tensor | None
    target_B: Tensor
    margin: Margin
    maximum_B: Tensor | None
    negative_B: Tensor
    positive_B: Tensor


def unit_rows(rows_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 unit rows [T, D] and reciprocal norms [T, 1], 0 where a row has no length."""
    rows_TD = rows_TD.float()
    norm_T1 = torch.linalg.vector_norm(rows_TD, dim=1, keepdim=True)
    reciprocal_T1 = torch.where(norm_T1 > _SMALLEST_NORM, norm_T1.reciprocal(), 0.0)
    # A non-finite row stays non-finite, so that the loss shows it.
    reciprocal_T1 = torch.where(norm_T1.isfinite(), reciprocal_T1, torch.nan)
    return rows_TD * reciprocal_T1, reciprocal_T1


def first_pass(
    unit_BD: Tensor,
    centers_CD: Tensor,
    rows: Tensor | None,
    target_B: Tensor,
    margin: Margin,
    *,
    want_pull: bool,
) -> FirstPass:
    """Sum the exponentials of the negatives' logits, tile by tile; no collective.

    Args:
        unit_BD: Gathered unit embeddings, fp32.
        centers_CD: This rank's class centers, any float dtype and length.
        rows: int64 [n] sampled rows of ``centers_CD``, or ``None`` for all.
        target_B: Column of each positive, left out of the sums, or ``NOT_LOCAL``.
        margin: Gives the scale and the inter-class filter.
        want_pull: Whether the gradient of the embeddings will be asked for.
    """
    sum_B = unit_BD.new_zeros(len(unit_BD))
    pull_BD = torch.zeros_like(unit_BD) if want_pull else None
    maximum_B = None
    if margin.scale > _LARGEST_PLAIN_SCALE:
        maximum_B = torch.full_like(sum_B, -torch.inf)
    for start, stop in _tiles(unit_BD, centers_CD, rows):
        unit_TD, _ = unit_rows(take_rows(centers_CD, rows, start, stop))
        logit_BT, counts_BT = _negative_logits(unit_BD, unit_TD, target_B - start, margin)
        if maximum_B is not None:
            larger_B = torch.maximum(maximum_B, logit_BT.amax(1).clamp(min=-margin.scale))
            shrink_B = (maximum_B - larger_B).exp()
            sum_B.mul_(shrink_B)
            if pull_BD is not None:
                pull_BD.mul_(shrink_B.unsqueeze(1))
            maximum_B = larger_B
            logit_BT.sub_(maximum_B.unsqueeze(1))
        exp_BT = logit_BT.exp_()
        sum_B.add_(exp_BT.sum(1))
        if pull_BD is not None:
            pull_BD.addmm_(exp_BT if counts_BT is None else exp_BT.mul_(counts_BT), unit_TD)
    return FirstPass(sum_B, maximum_B, pull_BD)


def second_pass(
    centers_CD: Tensor, rows: Tensor | None, kept: Sequence[Kept]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, gradient [T, D] fp32) of the centers in every tile; no collective.

    The tile's rows may be changed by the caller before the next one is asked for.

    Args:
        centers_CD: This rank's class centers, as in pass 1.
        rows: int64 [n] rows to compute, a superset of every micro-batch's, or ``None`` for all.
        kept: The micro-batches; their gradients are added.
    """
    aligned = [_align(one, rows) for one in kept]
    for start, stop in _tiles(kept[0].unit_BD, centers_CD, rows):
        unit_TD, reciprocal_T1 = unit_rows(take_rows(centers_CD, rows, start, stop))
        gradient_TD = torch.zeros_like(unit_TD)
        for one, (target_B, present_n) in zip(kept, aligned, strict=True):
            column_B = target_B - start
            slope_BT, counts_BT = _negative_logits(one.unit_BD, unit_TD, column_B, one.margin)
            if one.maximum_B is not None:
                slope_BT.sub_(one.maximum_B.unsqueeze(1))
            slope_BT.exp_().mul_(one.negative_B.unsqueeze(1))
            if counts_BT is not None:
                slope_BT.mul_(counts_BT)
            if present_n is not None:
                slope_BT.mul_(present_n[start:stop])
            _put(slope_BT, column_B, one.positive_B)
            gradient_TD.addmm_(slope_BT.T, one.unit_BD)
        along_T1 = (gradient_TD * unit_TD).sum(1, keepdim=True)
        yield start, stop, gradient_TD.sub_(unit_TD * along_T1).mul_(reciprocal_T1)


def take_rows(tensor: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    """Return rows ``start:stop`` of the sample: a view where the sample is the whole shard."""
    return tensor[start:stop] if rows is None else tensor.index_select(0, rows[start:stop])


def _tiles(unit_BD: Tensor, centers_CD: Tensor, rows: Tensor | None) -> Iterator[tuple[int, int]]:
    total = len(centers_CD) if rows is None else len(rows)
    size = max(256, _TILE_BYTES[unit_BD.device.type] // (4 * max(1, len(unit_BD))))
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _negative_logits(
    unit_BD: Tensor, unit_TD: Tensor, column_B: Tensor, margin: Margin
) -> tuple[Tensor, Tensor | None]:
    """Logits with -inf for the positive, and which of them the inter-class filter lets count."""
    logit_BT = unit_BD @ unit_TD.T
    counts_BT = None
    if margin.inter_class_filter is not None:
        counts_BT = logit_BT <= margin.inter_class_filter
        logit_BT.mul_(counts_BT)
    logit_BT.mul_(margin.scale)
    _put(logit_BT, column_B, torch.full_like(logit_BT[:, 0], -torch.inf))
    return logit_BT, counts_BT


def _put(tile_BT: Tensor, column_B: Tensor, value_B: Tensor) -> None:
    """Write one value per row where its column lies in the tile; no host synchronisation."""
    inside_B1 = ((column_B >= 0) & (column_B < tile_BT.shape[1])).unsqueeze(1)
    column_B1 = column_B.clamp(0, tile_BT.shape[1] - 1).unsqueeze(1)
    kept_B1 = tile_BT.gather(1, column_B1)
    tile_BT.scatter_(1, column_B1, torch.where(inside_B1, value_B.unsqueeze(1), kept_B1))


def _align(one: Kept, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets as columns of ``rows``, and which of ``rows`` the micro-batch had sampled."""
    if one.rows is rows or rows is None or one.rows is None:
        return one.target_B, None
    local_B = one.target_B >= 0
    if not len(one.rows):
        return one.target_B, torch.zeros_like(rows, dtype=torch.bool)
    row_B = one.rows[one.target_B.clamp(min=0)]
    target_B = torch.where(local_B, torch.searchsorted(rows, row_B), one.target_B)
    return target_B, torch.isin(rows, one.rows)
