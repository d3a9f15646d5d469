"""The two passes of the head over tiles of class centers.

A logit is a product of a query (an embedding) and a key (a class center), each of unit length or
as it is. Logits exist one tile of classes at a time: pass 1 leaves the row sums of their
exponentials E and those exponentials times the keys; pass 2 leaves the gradient of its keys. E is
kept between the passes as far as a byte budget allows and computed again beyond it, so that pass 2
takes one matrix product or two. Neither the logits [n, B] nor the gradient of the keys [n, D] is
ever whole.

Shape suffixes: B = rows of the gathered batch, D = embedding, n = sampled rows, T = rows of a tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.margins.base import Bend
from partialfc.tiles import torch as torch_steps
from partialfc.tiles.dispatch import steps_for
from partialfc.tiles.positives import Positives
from partialfc.tiles.products import (
    Compute,
    add_product_,
    precision,
    scaled_products,
)
from partialfc.tiles.workspace import Workspace

_LARGEST_PLAIN_LOGIT = 64.0
"""exp(±z) of a larger logit, summed over 1e8 classes, leaves fp32's range: keep a row maximum."""

_NO_LOGIT = -1e30
"""Row maximum of a tile without negatives: finite, so that no difference of two is NaN."""

_TILE_BYTES = {"cpu": 5 << 20, "cuda": 1 << 25}
"""Size of a tile of centers and logits in fp32 on a CPU: with the gradient and the states of its
rows it stays in the last cache, and Python's part of a tile is small beside it. On a GPU, size of a
tile of logits: half of the L2 cache."""

_TILE_ROWS = 128
"""A tile is a multiple of it, as tensor cores like it."""


@dataclass(frozen=True, slots=True)
class Logits:
    """How the product of a query and a center becomes the logit of a negative.

    Attributes:
        scale: Factor of the product.
        unit: Whether a key is the center's unit vector, or the center as it is.
        largest: Bound of every |logit|; inf if there is none.
        compute: Precision of the products.
        per_identity: K; the logit of an identity is the largest of those of its K rows.
        bend: Another logit above a threshold, or ``None``.
    """

    scale: float
    unit: bool
    largest: float
    compute: Compute
    per_identity: int = 1
    bend: Bend | None = None

    @property
    def needs_maximum(self) -> bool:
        """Whether the exponentials need a row maximum to stay inside fp32's range."""
        return self.largest > _LARGEST_PLAIN_LOGIT


@dataclass(frozen=True, slots=True)
class KeptTile:
    """E of one tile, [T, B], and the row maximum that it is relative to, if there is one."""

    exp_TB: Tensor
    maximum_B: Tensor | None


@dataclass(frozen=True, slots=True)
class FirstPass:
    """What pass 1 knows of this rank's negatives.

    Attributes:
        sum_B: Sum of exp(logit - maximum) over the sampled negatives.
        maximum_B: Largest negative logit, or ``None`` where the logits need no maximum (then 0).
        pull_BD: Sum over negatives of exp(logit - maximum) * the bend's slope * key; ``None`` if
            not wanted.
        key_sum_D: Sum of all keys, positives included; ``None`` if not wanted.
        rows: Their number.
        exponentials: Of the first tiles, as many as the budget allows.
    """

    sum_B: Tensor
    maximum_B: Tensor | None
    pull_BD: Tensor | None
    key_sum_D: Tensor | None
    rows: int
    exponentials: list[KeptTile]


@dataclass(frozen=True, slots=True)
class Kept:
    """What pass 2 needs of one micro-batch.

    Attributes:
        query_BD: Gathered queries in the operand dtype.
        rows: int64 [n] sampled rows, or ``None`` for all rows of the shard.
        target_B: Place of each row's own class center among the sampled ones, or ``NOT_LOCAL``.
        logits: What the products become.
        maximum_B: Subtracted from the logits before exp, or ``None``.
        negative_B: Factor that makes exp(logit - maximum) the derivative of the loss by the
            product.
        positive_B: Derivative of the loss by the positive's product, times what follows.
        positive_BD: The derivative of the positive's product by its key: queries, unless the
            margin follows the length of a center.
        even_D: Subtracted from the gradient of every sampled key, or ``None``.
        exponentials: E of the first tiles, 0 at the positives.
    """

    query_BD: Tensor
    rows: Tensor | None
    target_B: Tensor
    logits: Logits
    maximum_B: Tensor | None
    negative_B: Tensor
    positive_B: Tensor
    positive_BD: Tensor
    even_D: Tensor | None
    exponentials: list[KeptTile]

    @property
    def bytes(self) -> int:
        """Memory of the exponentials."""
        return sum(tile.exp_TB.nbytes for tile in self.exponentials)


def first_pass(
    query_BD: Tensor,
    centers_CD: Tensor,
    rows: Tensor | None,
    target_B: Tensor,
    logits: Logits,
    *,
    want_pull: bool,
    want_key_sum: bool,
    keep_bytes: int,
    workspace: Workspace,
) -> FirstPass:
    """Sum the exponentials of the negatives' logits, tile by tile; no collective.

    Args:
        query_BD: Gathered queries in the operand dtype of ``logits.compute``.
        centers_CD: This rank's class centers, any float dtype and length.
        rows: int64 [n] sampled rows of ``centers_CD``, or ``None`` for all; the K rows of an
            identity follow one another.
        target_B: Place of each positive, whose identity is left out of the sums, or ``NOT_LOCAL``.
        logits: What the products become.
        want_pull: Whether the gradient of the embeddings will be asked for.
        want_key_sum: Whether the sum of the keys is.
        keep_bytes: Most memory of the exponentials kept for pass 2.
        workspace: Buffers of the tiles.
    """
    steps, dim = steps_for(query_BD), query_BD.shape[1]
    sum_B = torch.zeros_like(query_BD[:, 0], dtype=torch.float32)
    pull_BD = torch.zeros_like(query_BD, dtype=torch.float32) if want_pull else None
    key_sum_D = query_BD.new_zeros(dim, dtype=torch.float32) if want_key_sum else None
    maximum_B = torch.full_like(sum_B, _NO_LOGIT) if logits.needs_maximum else None
    exponentials: list[KeptTile] = []
    with precision(logits.compute, query_BD.device):
        for start, stop in tiles(query_BD, centers_CD, rows, logits.per_identity):
            key_TD = _keys(centers_CD, rows, start, stop, query_BD.dtype, logits, workspace)
            if key_sum_D is not None:
                key_sum_D.add_(key_TD.sum(0, dtype=torch.float32))
            column_B = target_B - start
            logit_TB = _logits(key_TD, query_BD, column_B, logits)
            logit_TB, slope_TB, bend = _bent_first(logit_TB, column_B, logits, workspace)
            if maximum_B is not None:
                larger_B = torch.maximum(maximum_B, _largest(logit_TB, column_B))
                shrink_B = (maximum_B - larger_B).exp()
                sum_B.mul_(shrink_B)
                if pull_BD is not None:
                    pull_BD.mul_(shrink_B.unsqueeze(1))
                maximum_B = larger_B
            exp_TB = steps.exponentials(
                logit_TB,
                column_B,
                bend=bend,
                shift_B=maximum_B,
                sum_B=sum_B,
                dtype=query_BD.dtype,
                workspace=workspace,
            )
            if slope_TB is not None:
                exp_TB.mul_(slope_TB)
            if pull_BD is not None:
                add_product_(pull_BD, exp_TB.T, key_TD)
            keep_bytes -= exp_TB.nbytes
            if keep_bytes >= 0:
                exponentials.append(KeptTile(exp_TB, maximum_B))
    total = len(centers_CD) if rows is None else len(rows)
    return FirstPass(sum_B, maximum_B, pull_BD, key_sum_D, total, exponentials)


def second_pass(
    centers_CD: Tensor, rows: Tensor | None, kept: Sequence[Kept], workspace: Workspace
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, gradient [T, D] fp32) by the keys of every tile; no collective.

    It is that of the negatives; :func:`positives` has the rest. The tile's rows and the gradient
    may be changed by the caller before the next one is asked for.

    Args:
        centers_CD: This rank's class centers, as in pass 1.
        rows: int64 [n] rows to compute, a superset of every micro-batch's, or ``None`` for all.
        kept: The micro-batches; their gradients are added.
        workspace: Buffers of the tiles.
    """
    steps, device, dim = steps_for(centers_CD), centers_CD.device, centers_CD.shape[1]
    parts = [_Part.of(one, rows, like=kept[0].query_BD) for one in kept]
    per_identity = kept[0].logits.per_identity
    for number, (start, stop) in enumerate(tiles(kept[0].query_BD, centers_CD, rows, per_identity)):
        gradient_TD = workspace("gradient", (stop - start, dim), torch.float32, device)
        key_TD: Tensor | None = None
        for part in parts:
            query_BD, logits, maximum_B = part.kept.query_BD, part.kept.logits, part.kept.maximum_B
            weighted_BD = part.weighted_BD
            with precision(logits.compute, device):
                if number < len(part.exponentials):
                    tile = part.exponentials[number]
                    exp_TB = tile.exp_TB
                    if maximum_B is not None and tile.maximum_B is not None:
                        shrink_B = (tile.maximum_B - maximum_B).exp()
                        weighted_BD = weighted_BD * shrink_B.unsqueeze(1).to(weighted_BD.dtype)
                else:
                    if key_TD is None:
                        dtype = query_BD.dtype
                        key_TD = _keys(centers_CD, rows, start, stop, dtype, logits, workspace)
                    column_B = part.target_B - start
                    logit_TB = _logits(key_TD, query_BD, column_B, logits)
                    logit_TB, slope_TB, bend = _bent_first(logit_TB, column_B, logits, workspace)
                    exp_TB = steps.exponentials(
                        logit_TB,
                        column_B,
                        bend=bend,
                        shift_B=maximum_B,
                        sum_B=None,
                        dtype=query_BD.dtype,
                        workspace=workspace,
                    )
                    if slope_TB is not None:
                        exp_TB.mul_(slope_TB)
                if part.present_n is not None:
                    exp_TB.mul_(part.present_n[start:stop].unsqueeze(1))
                add_product_(gradient_TD, exp_TB, weighted_BD, keep=part is not parts[0])
            if part.kept.even_D is not None:
                if part.present_n is None:
                    gradient_TD.sub_(part.kept.even_D)
                else:
                    gradient_TD.sub_(part.present_n[start:stop].unsqueeze(1) * part.kept.even_D)
        yield start, stop, gradient_TD


def positives(rows: Tensor | None, kept: Sequence[Kept]) -> Positives:
    """Return the positives' share of the same gradient; arguments as in :func:`second_pass`."""
    return Positives.of(
        [_align(one, rows)[0] for one in kept],
        [one.positive_B for one in kept],
        [one.positive_BD for one in kept],
    )


def tiles(
    query_BD: Tensor, centers_CD: Tensor, rows: Tensor | None, per_identity: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the tiles of a sample; a function of device, B, D, n and K."""
    total = len(centers_CD) if rows is None else len(rows)
    batch, dim = query_BD.shape
    device = query_BD.device.type
    size = _TILE_BYTES[device] // (4 * (batch + (dim if device == "cpu" else 0)))
    step = _TILE_ROWS * per_identity
    size = max(step, size // step * step)
    for start in range(0, total, size):
        yield start, min(start + size, total)


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch seen from the rows of pass 2.

    The factor ``negative_B`` of a whole column of E is moved to the queries, so that the gradient
    is E @ weighted queries.
    """

    kept: Kept
    target_B: Tensor
    present_n: Tensor | None
    weighted_BD: Tensor
    exponentials: list[KeptTile]

    @classmethod
    def of(cls, kept: Kept, rows: Tensor | None, *, like: Tensor) -> "_Part":
        target_B, present_n = _align(kept, rows)
        factor_B1 = kept.negative_B.unsqueeze(1)
        same_tiles = kept.rows is rows and kept.query_BD.shape == like.shape
        return cls(
            kept,
            target_B,
            present_n,
            (kept.query_BD.float() * factor_B1).to(kept.query_BD.dtype),
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


def _keys(
    centers_CD: Tensor,
    rows: Tensor | None,
    start: int,
    stop: int,
    dtype: torch.dtype,
    logits: Logits,
    workspace: Workspace,
) -> Tensor:
    """The keys of a tile in the operand dtype; a view where they are the centers themselves."""
    if not logits.unit:
        return torch_steps.take_rows(centers_CD, rows, start, stop).to(dtype)
    key_TD = workspace("key", (stop - start, centers_CD.shape[1]), dtype, centers_CD.device)
    steps_for(centers_CD).unit_rows(centers_CD, rows, start, stop, key_TD)
    return key_TD


def _logits(key_TD: Tensor, query_BD: Tensor, column_B: Tensor, logits: Logits) -> Tensor:
    """The logits of a tile; -inf at all but the nearest of an identity's K centers."""
    logit_TB = scaled_products(key_TD, query_BD, logits.scale)
    if logits.per_identity > 1:
        torch_steps.keep_nearest_(logit_TB, column_B, logits.per_identity)
    return logit_TB


def _bent_first(
    logit_TB: Tensor, column_B: Tensor, logits: Logits, workspace: Workspace
) -> tuple[Tensor, Tensor | None, Bend | None]:
    """Bend where a row maximum is needed, which is that of the bent logits.

    Returns:
        The logits, the slope of the bend or ``None``, and the bend that is still to do or ``None``.
    """
    if logits.bend is None or not logits.needs_maximum:
        return logit_TB, None, logits.bend
    torch_steps.leave_out_(logit_TB, column_B)
    logit_TB = logit_TB.float()
    slope_TB = torch_steps.bend_(logit_TB, logits.bend, workspace)
    if logits.per_identity > 1:
        logit_TB.masked_fill_(logit_TB <= torch_steps.LEFT_OUT, -torch.inf)
    return logit_TB, slope_TB, None


def _largest(logit_TB: Tensor, column_B: Tensor) -> Tensor:
    """Largest negative logit of each column of a tile, ``_NO_LOGIT`` where it has none."""
    torch_steps.leave_out_(logit_TB, column_B)
    return logit_TB.amax(0).float().clamp(min=_NO_LOGIT)
