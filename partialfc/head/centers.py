"""Class centers as rows of a matrix: their first values, and the own ones of a batch.

Shape suffixes: B = rows of the gathered batch, C = rows of the centers at hand, D = embedding, K =
positives of a row, N = centers of an identity, P = K * B, n = identities at hand.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.head.row_set import RowSet
from partialfc.head.rows.formats import FIRST_SCALE, FORMATS, decode, nearest
from partialfc.head.rows.rules import States
from partialfc.head.rows.stored import CENTERS, SCALE
from partialfc.head.sampling import NOT_LOCAL, Sample
from partialfc.head.tiles.torch_steps import take_rows
from partialfc.keyed import key
from partialfc.numerics import unit

_CENTER_STD = 0.01
"""Standard deviation of an element before the first step, as in arcface_torch."""
_INITIAL_BLOCK = 1024
"""Rows drawn from one generator; a constant, so that it never depends on the sharding."""


def fill_initial_(centers: Tensor, rows: range, *, seed: int, device: torch.device) -> None:
    """Fill centers [len(rows), D] with N(0, 0.01²), a function of seed and global row.

    They are rounded to the nearest, in units of the first scale where their format has one.
    A block of rows is drawn at a time. The values differ between CPU and GPU, whose generators are
    not the same, so ``device`` is that of the run wherever the centers lie.
    """
    dim, generator = centers.shape[1], torch.Generator(device)
    scale = FIRST_SCALE.get(centers.dtype, 1.0)
    first_block = rows.start // _INITIAL_BLOCK
    for block in range(first_block, -(-rows.stop // _INITIAL_BLOCK)):
        generator.manual_seed(key(seed, "centers", block))
        drawn = torch.randn(_INITIAL_BLOCK, dim, generator=generator, device=device)
        start = block * _INITIAL_BLOCK
        low, high = max(start, rows.start), min(start + _INITIAL_BLOCK, rows.stop)
        part = drawn[low - start : high - start].mul_(_CENTER_STD)
        centers[low - rows.start : high - rows.start] = part.div_(scale)


def begin_at_(
    centers_CD: Tensor,
    owned: range,
    first: int,
    direction_nD: NDArray[np.float64],
    *,
    states: States | None = None,
    per_identity: int = 1,
) -> int:
    """Turn the centers of identities to directions, at the length of random ones.

    A row becomes ``0.01 * sqrt(D)`` times its direction, rounded to the nearest number of the
    centers' format: a function of the direction alone, whatever rows are at hand. A direction of
    zeros leaves its center as it is. Of several centers of an identity the first is turned.

    Args:
        centers_CD: Of this rank, before the first step; on any device. What is behind D stays.
        owned: Identities of this rank.
        first: The first identity of those that are given; they follow one another.
        direction_nD: Of any length.
        states: As in ``RowOptimizer.states()``; rows of fp8 get a scale of their own there, which
            has room for a direction along an axis.
        per_identity: Centers of an identity.

    Returns:
        How many identities have a direction of zeros.

    Raises:
        ValueError: If a length is not finite; the message names the identity.
    """
    length_n1 = np.linalg.norm(direction_nD, axis=1, keepdims=True)
    wrong_n = np.flatnonzero(~np.isfinite(length_n1))
    if len(wrong_n):
        raise ValueError(
            f"row {first + wrong_n[0]:,} has the length {length_n1[wrong_n[0], 0]}; it must be "
            "finite."
        )
    has_n = np.flatnonzero(length_n1)
    dim = direction_nD.shape[1]
    row_nD = direction_nD[has_n] / length_n1[has_n] * (_CENTER_STD * math.sqrt(dim))
    at_n = torch.from_numpy((has_n + (first - owned.start)) * per_identity)
    turned_nD = torch.from_numpy(row_nD).float()
    if FORMATS.get(centers_CD.dtype) == "fp8":
        assert states is not None
        turned_nD, scale_n1 = nearest(turned_nD, "fp8")
        assert scale_n1 is not None
        scale_C1 = states[CENTERS + SCALE]
        scale_C1[at_n.to(scale_C1.device)] = scale_n1.to(scale_C1.device)
    turned_nD = turned_nD.to(centers_CD.device, centers_CD.dtype)
    centers_CD[at_n.to(centers_CD.device), :dim] = turned_nD
    return len(direction_nD) - len(has_n)


def stored_centers(centers_CD: Tensor, states: States) -> Tensor:
    """Return a rank's centers as fp32 rows on the CPU, whatever their format; states as in
    ``RowOptimizer.states()``."""
    return decode(centers_CD.detach(), states.get("centers_scale")).cpu()


def expand(sample: Sample, per_identity: int) -> Sample:
    """Return a sample of identities as one of their rows; targets are an identity's first row."""
    if per_identity == 1:
        return sample
    rows = sample.rows
    if rows is not None:
        every_N = torch.arange(per_identity, device=rows.device)
        rows = (rows.unsqueeze(1) * per_identity + every_N).flatten()
    local_B = sample.target_B != NOT_LOCAL
    target_B = torch.where(local_B, sample.target_B * per_identity, NOT_LOCAL)
    log_weight_n = sample.log_weight_n
    if log_weight_n is not None:
        log_weight_n = log_weight_n.repeat_interleave(per_identity)
    return Sample(rows, target_B, log_weight_n)


def own_centers(
    centers_CD: Tensor, rows: RowSet, target_P: Tensor, query_BD: Tensor, per_identity: int
) -> tuple[Tensor, Tensor]:
    """Return the center [P, D] of each own identity and its place in the sample [P].

    Of several centers it is the nearest to the query. fp32, of any length; zero and ``NOT_LOCAL``
    where another rank has it.

    Args:
        centers_CD: Class centers at hand.
        rows: Sampled ones.
        target_P: Place in the sample of the first row of each own identity, or ``NOT_LOCAL``; the
            first identities of all K * B, then the second.
        query_BD: Gathered queries.
        per_identity: Centers of an identity.
    """
    if not rows.count(centers_CD):
        size = len(target_P), centers_CD.shape[1]
        return centers_CD.new_zeros(size, dtype=torch.float32), target_P
    local_P = target_P != NOT_LOCAL
    place_PN = target_P.clamp(min=0).unsqueeze(1)
    if per_identity > 1:
        place_PN = place_PN + torch.arange(per_identity, device=query_BD.device)
    place_N = place_PN.flatten()
    if rows.newest is not None:
        own_ND = rows.newest(place_N)
    else:
        row_N = place_N if rows.place_n is None else rows.place_n[place_N]
        own_ND = take_rows(centers_CD, row_N, 0, len(row_N)).float()
    if per_identity == 1:
        return torch.where(local_P.unsqueeze(1), own_ND, 0.0), target_P
    own_PND = own_ND.view(*place_PN.shape, -1)
    query_BD1 = query_BD.float().unsqueeze(2)
    nearest = [
        (unit_BND @ query_BD1).squeeze(2).argmax(1)
        for unit_BND in torch.split(unit(own_ND)[0].view_as(own_PND), len(query_BD))
    ]
    which_P = torch.cat(nearest)
    every_P = torch.arange(len(which_P), device=which_P.device)
    own_PD = torch.where(local_P.unsqueeze(1), own_PND[every_P, which_P], 0.0)
    return own_PD, torch.where(local_P, target_P + which_P, NOT_LOCAL)
