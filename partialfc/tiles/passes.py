"""The two passes of the head over tiles of class centers.

Logits exist one tile of classes at a time: pass 1 leaves the row sums of their exponentials E and
those exponentials times the centers; pass 2 leaves the gradient of its centers. E is kept between
the passes as far as a byte budget allows and computed again beyond it, so that pass 2 takes one
matrix product or two. Neither the logits [n, B] nor the gradient of the centers [n, D] is ever
whole.

Shape suffixes: B = rows of the gathered batch, D = embedding, n = sampled rows, T = rows of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.margins import Margin
from partialfc.tiles import torch as torch_steps
from partialfc.tiles.dispatch import steps_for
from partialfc.tiles.positives import Positives
from partialfc.tiles.products import (
    Compute,
    add_product_,
    precision,
    scaled_cosines,
)
from partialfc.tiles.workspace import Workspace

_LARGEST_PLAIN_SCALE = 64.0
"""exp(±s) of a larger scale, summed over 1e8 classes, leaves fp32's range: keep a row maximum."""

_TILE_BYTES = {"cpu": 5 << 20, "cuda": 1 << 25}
"""Size of a tile of centers and logits in fp32 on a CPU: with the gradient and the states of its
rows it stays in the last cache, and Python's part of a tile is small beside it. On a GPU, size of a
tile of logits: half of the L2 cache."""

_TILE_ROWS = 128
"""A tile is a multiple of it, as tensor cores like it."""


@dataclass(frozen=True, slots=True)
class FirstPass:
    """What pass 1 knows of this rank's negatives.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the sampled negatives.
        maximum_B: Largest negative logit, or ``None`` where the scale needs no maximum (then 0).
        pull_BD: Sum of exp(logit - maximum) * unit center; ``None`` if not wanted.
        exponentials: E of the first tiles, [T, B] each, as many as the budget allows.
    """

    sum_B: Tensor
    maximum_B: Tensor | None
    pull_BD: Tensor | None
    exponentials: list[Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """What pass 2 needs of one micro-batch.

    Attributes:
        unit_BD: Gathered unit embeddings in the operand dtype.
        rows: int64 [n] sampled rows, or ``None`` for all rows of the shard.
        target_B: Column of each row's own class center among the sampled ones, or ``NOT_LOCAL``.
        margin: The margin of the forward pass.
        compute: Precision of the products.
        maximum_B: Subtracted from the logits before exp, or ``None``.
        negative_B: Factor that makes exp(logit - maximum) the derivative of the loss by the cosine.
        positive_B: Derivative of the loss by the positive's cosine.
        exponentials: E of the first tiles, relative to ``maximum_B``, 0 at the positives.
    """

    unit_BD: Tensor
    rows: Tensor | None
    target_B: Tensor
    margin: Margin
    compute: Compute
    maximum_B: Tensor | None
    negative_B: Tensor
    positive_B: Tensor
    exponentials: list[Tensor]

    @property
    def bytes(self) -> int:
        """Memory of the exponentials."""
        return sum(tile.nbytes for tile in self.exponentials)


def first_pass(
    unit_BD: Tensor,
    centers_CD: Tensor,
    rows: Tensor | None,
    target_B: Tensor,
    margin: Margin,
    *,
    compute: Compute,
    want_pull: bool,
    keep_bytes: int,
    workspace: Workspace,
) -> FirstPass:
    """Sum the exponentials of the negatives' logits, tile by tile; no collective.

    Args:
        unit_BD: Gathered unit embeddings in the operand dtype of ``compute``.
        centers_CD: This rank's class centers, any float dtype and length.
        rows: int64 [n] sampled rows of ``centers_CD``, or ``None`` for all.
        target_B: Column of each positive, left out of the sums, or ``NOT_LOCAL``.
        margin: Gives the scale and the inter-class filter.
        compute: Precision of the matrix products.
        want_pull: Whether the gradient of the embeddings will be asked for.
        keep_bytes: Most memory of the exponentials kept for pass 2. A scale that needs a row
            maximum keeps none: the maximum is known at the end only.
        workspace: Buffers of the tiles.
    """
    steps, dim = steps_for(unit_BD), unit_BD.shape[1]
    sum_B = torch.zeros_like(unit_BD[:, 0], dtype=torch.float32)
    pull_BD = torch.zeros_like(unit_BD, dtype=torch.float32) if want_pull else None
    maximum_B = None
    if margin.scale > _LARGEST_PLAIN_SCALE:
        maximum_B, keep_bytes = torch.full_like(sum_B, -torch.inf), 0
    exponentials: list[Tensor] = []
    with precision(compute, unit_BD.device):
        for start, stop in tiles(unit_BD, centers_CD, rows):
            unit_TD = workspace("unit", (stop - start, dim), unit_BD.dtype, unit_BD.device)
            steps.unit_rows(centers_CD, rows, start, stop, unit_TD)
            logit_TB = scaled_cosines(unit_TD, unit_BD, margin.scale)
            if maximum_B is not None:
                larger_B = torch.maximum(maximum_B, _largest(logit_TB, target_B - start, margin))
                shrink_B = (maximum_B - larger_B).exp()
                sum_B.mul_(shrink_B)
                if pull_BD is not None:
                    pull_BD.mul_(shrink_B.unsqueeze(1))
                maximum_B = larger_B
            exp_TB = steps.exponentials(
                logit_TB,
                target_B - start,
                limit=_limit(margin),
                shift_B=maximum_B,
                sum_B=sum_B,
                dtype=unit_BD.dtype,
            )
            if pull_BD is not None:
                add_product_(pull_BD, exp_TB.T, unit_TD)
            keep_bytes -= exp_TB.nbytes
            if keep_bytes >= 0:
                exponentials.append(exp_TB)
    return FirstPass(sum_B, maximum_B, pull_BD, exponentials)


def second_pass(
    centers_CD: Tensor, rows: Tensor | None, kept: Sequence[Kept], workspace: Workspace
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, gradient [T, D] fp32) by the unit centers of every tile; no collective.

    It is that of the negatives; :func:`positives` has the rest. The tile's rows and the gradient
    may be changed by the caller before the next one is asked for.

    Args:
        centers_CD: This rank's class centers, as in pass 1.
        rows: int64 [n] rows to compute, a superset of every micro-batch's, or ``None`` for all.
        kept: The micro-batches; their gradients are added.
        workspace: Buffers of the tiles.
    """
    steps, device, dim = steps_for(centers_CD), centers_CD.device, centers_CD.shape[1]
    parts = [_Part.of(one, rows, like=kept[0].unit_BD) for one in kept]
    for number, (start, stop) in enumerate(tiles(kept[0].unit_BD, centers_CD, rows)):
        gradient_TD = workspace("gradient", (stop - start, dim), torch.float32, device)
        units: dict[torch.dtype, Tensor] = {}
        for part in parts:
            unit_BD, margin = part.kept.unit_BD, part.kept.margin
            dtype = unit_BD.dtype
            with precision(part.kept.compute, device):
                if number < len(part.exponentials):
                    exp_TB = part.exponentials[number]
                else:
                    if dtype not in units:
                        units[dtype] = workspace("unit", (stop - start, dim), dtype, device)
                        steps.unit_rows(centers_CD, rows, start, stop, units[dtype])
                    exp_TB = steps.exponentials(
                        scaled_cosines(units[dtype], unit_BD, margin.scale),
                        part.target_B - start,
                        limit=_limit(margin),
                        shift_B=part.kept.maximum_B,
                        sum_B=None,
                        dtype=dtype,
                    )
                if part.present_n is not None:
                    exp_TB.mul_(part.present_n[start:stop].unsqueeze(1))
                add_product_(gradient_TD, exp_TB, part.weighted_BD, keep=part is not parts[0])
        yield start, stop, gradient_TD


def positives(rows: Tensor | None, kept: Sequence[Kept]) -> Positives:
    """Return the positives' share of the same gradient; arguments as in :func:`second_pass`."""
    return Positives.of(
        [_align(one, rows)[0] for one in kept],
        [one.positive_B for one in kept],
        [one.unit_BD for one in kept],
    )


def tiles(unit_BD: Tensor, centers_CD: Tensor, rows: Tensor | None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the tiles of a sample; a function of device, B, D and n."""
    total = len(centers_CD) if rows is None else len(rows)
    batch, dim = unit_BD.shape
    device = unit_BD.device.type
    size = _TILE_BYTES[device] // (4 * (batch + (dim if device == "cpu" else 0)))
    size = max(_TILE_ROWS, size // _TILE_ROWS * _TILE_ROWS)
    for start in range(0, total, size):
        yield start, min(start + size, total)


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch seen from the rows of pass 2.

    The factor ``negative_B`` of a whole column of E is moved to the embeddings, so that the
    gradient is E @ weighted embeddings.
    """

    kept: Kept
    target_B: Tensor
    present_n: Tensor | None
    weighted_BD: Tensor
    exponentials: list[Tensor]

    @classmethod
    def of(cls, kept: Kept, rows: Tensor | None, *, like: Tensor) -> "_Part":
        target_B, present_n = _align(kept, rows)
        factor_B1 = kept.negative_B.unsqueeze(1)
        same_tiles = kept.rows is rows and kept.unit_BD.shape == like.shape
        return cls(
            kept,
            target_B,
            present_n,
            (kept.unit_BD.float() * factor_B1).to(kept.unit_BD.dtype),
            kept.exponentials if same_tiles else [],
        )


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


def _limit(margin: Margin) -> float | None:
    """Logit above which the inter-class filter takes a negative out."""
    return None if margin.inter_class_filter is None else margin.scale * margin.inter_class_filter


def _largest(logit_TB: Tensor, column_B: Tensor, margin: Margin) -> Tensor:
    """Largest negative logit of each column of a tile, -scale where it has none."""
    torch_steps.leave_out_(logit_TB, column_B)
    limit = _limit(margin)
    counted_TB = logit_TB if limit is None else logit_TB.masked_fill(logit_TB > limit, 0)
    return counted_TB.amax(0).float().clamp(min=-margin.scale)
