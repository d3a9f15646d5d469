"""How class centers and their momentum are stored: fp32, or fewer bits with keyed rounding.

    fp32   as it is
    bf16   the upper half of fp32
    fp16   times one power of two a row, which puts the row's largest element at 2**13 to 2**14
    fp8    e4m3, times one power of two a row, which puts its largest element at 2**7 to 2**8
    int8   times one fp32 a row, which puts its largest element at 127

Fewer bits need stochastic rounding: an update smaller than half a step would vanish every time.
The random bits are a function of (key, number of the row in the whole head, column), so any number
of ranks rounds alike, and the Triton kernel of the same formats writes the same bytes. With powers
of two, what a format can hold stays as it is, so that a small update of a row adds little noise: in
the mean its size times the distance of two neighbours, as the variance of an element.

Shape suffixes: D = embedding, T = rows of a tile, C = rows of a shard, 1 = one a row.
"""

from typing import Literal

import torch
from torch import Tensor

from partialfc.head.tiles.workspace import Workspace

Format = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
"""Name of a format. Centers are never ``int8``, momentum is never ``fp16`` or ``fp8``."""

DTYPES: dict[Format, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
FORMATS: dict[torch.dtype, Format] = {dtype: name for name, dtype in DTYPES.items()}

SCALED: frozenset[Format] = frozenset({"fp16", "fp8", "int8"})
"""Formats with an fp32 scale [C, 1] beside the elements: row = stored * scale."""

FIRST_SCALE: dict[torch.dtype, float] = {torch.float16: 1.0, torch.float8_e4m3fn: 2.0**-12}
"""Scale of centers that were never updated, by the formats of centers that have one. A random
element is 0.01 in the mean, which is 41 of the 448 that fp8 reaches."""

MIX = (-49064778989728563, -4265267296055464877)
"""Multipliers of the 64-bit finalizer of MurmurHash3 (A. Appleby, public domain), as int64."""

SMALLEST_EXPONENT = 30
"""Biased exponent below which a row's largest element counts as zero: 2**-97."""


FP8_FLOOR = (127 - 6) << 23
"""2**-6 as the bits of an fp32: the smallest element of fp8 that has its own power of two."""

_LARGEST: dict[Format, int] = {"fp16": 13, "fp8": 7}
"""Exponent of a row's largest element as it is stored."""


def decode(stored_TD: Tensor, scale_T1: Tensor | None, out_TD: Tensor | None = None) -> Tensor:
    """Return fp32 rows: exactly what is stored. fp32 is returned as it is, not copied; the others
    are written to ``out_TD`` if there is one."""
    if stored_TD.dtype == torch.float32:
        return stored_TD
    row_TD = stored_TD.float() if out_TD is None else out_TD.copy_(stored_TD)
    return row_TD if scale_T1 is None else row_TD.mul_(scale_T1)


def encode(
    row_TD: Tensor, into: Format, noise_TD: Tensor, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what is stored of fp32 rows, and the scale [T, 1] where the format has one.

    Rounding is stochastic: up with the probability of the remainder, so that the expected value is
    the row itself. Elements of an fp16 row 2**27 times smaller than its largest are rounded to the
    nearest; fp8 has no such limit.

    Args:
        row_TD: fp32, finite; of a row that is not, fp8 keeps NaN.
        into: Any format but ``"fp32"``.
        noise_TD: From :func:`noise`.
        workspace: Buffers, that of the result among them; ``None`` for fresh memory.
    """
    workspace = workspace or Workspace()
    size, device = (*row_TD.shape,), row_TD.device
    scale_T1: Tensor | None = None
    if into == "bf16":
        value_TD = _truncate(row_TD, noise_TD, 16, workspace)
    else:
        scratch_TD = workspace("scratch", size, torch.float32, device)
        largest_T1 = torch.abs(row_TD, out=scratch_TD).amax(1, keepdim=True)
        if into in _LARGEST:
            exponent_T1 = (largest_T1.view(torch.int32) >> 23).clamp(min=SMALLEST_EXPONENT)
            scale_T1 = ((exponent_T1 - _LARGEST[into]) << 23).view(torch.float32)
            scaled_TD = torch.div(row_TD, scale_T1, out=scratch_TD)
            if into == "fp16":
                value_TD = _truncate(scaled_TD, noise_TD, 13, workspace)
            else:
                value_TD = _eighths(scaled_TD, noise_TD, workspace)
        else:
            inverse_T1 = torch.where(largest_T1 > 0, 127 / largest_T1, 0.0)
            step_TD = torch.mul(row_TD, inverse_T1, out=scratch_TD)
            step_TD.add_(_fraction(noise_TD, workspace)).floor_()
            value_TD, scale_T1 = step_TD.clamp_(-127, 127), largest_T1 / 127
    return workspace("stored", size, DTYPES[into], device).copy_(value_TD), scale_T1


def nearest(row_TD: Tensor, into: Format) -> tuple[Tensor, Tensor | None]:
    """Return what is stored of fp32 rows, rounded to the nearest; see :func:`encode`."""
    return encode(row_TD, into, torch.full_like(row_TD, 1 << 15, dtype=torch.int32))


def noise(key: int, number_T: Tensor, dim: int, workspace: Workspace | None = None) -> Tensor:
    """Return 16 random bits for every element of some rows, int32 [T, dim] in [0, 65536).

    Args:
        key: From :func:`partialfc.keyed.key`.
        number_T: int64 numbers of the rows in the whole head.
        dim: D.
        workspace: Buffers, that of the result among them; ``None`` for fresh memory.
    """
    workspace = workspace or Workspace()
    rows, lanes, device = len(number_T), -(-dim // 4), number_T.device  # 64 bits for four columns
    bits, high = (
        workspace(name, (rows, lanes), torch.int64, device) for name in ("hashed", "shifted")
    )
    first_T1 = number_T.unsqueeze(1) * lanes + key
    torch.add(first_T1, torch.arange(lanes, device=device), out=bits)
    for multiplier in (*MIX, None):
        torch.bitwise_right_shift(bits, 33, out=high)
        bits.bitwise_xor_(high.bitwise_and_(0x7FFFFFFF))
        if multiplier is not None:
            bits.mul_(multiplier)
    noise_TD = workspace("noise", (rows, dim), torch.int32, device)
    return noise_TD.copy_(bits.view(torch.int16)[:, :dim]).bitwise_and_(0xFFFF)


def _fraction(noise_TD: Tensor, workspace: Workspace) -> Tensor:
    """Random bits as fp32 numbers between 0 and 1."""
    size, device = (*noise_TD.shape,), noise_TD.device
    fraction_TD = workspace("fraction", size, torch.float32, device)
    return torch.add(noise_TD, 0.5, out=fraction_TD).mul_(2.0**-16)


def _eighths(row_TD: Tensor, noise_TD: Tensor, workspace: Workspace) -> Tensor:
    """Round elements below 2**8 in eighths of the power of two below, and those below 2**-6, which
    are subnormal, in eighths of that; in place. An infinity over its power, one too, is NaN."""
    word_TD = workspace("word", (*row_TD.shape,), torch.int32, row_TD.device)
    torch.bitwise_and(row_TD.view(torch.int32), 0x7F800000, out=word_TD).clamp_(min=FP8_FLOOR)
    power_TD = word_TD.view(torch.float32)
    eighth_TD = row_TD.div_(power_TD).mul_(8).add_(_fraction(noise_TD, workspace)).floor_()
    return eighth_TD.mul_(power_TD.mul_(0.125))


def _truncate(row_TD: Tensor, noise_TD: Tensor, bits: int, workspace: Workspace) -> Tensor:
    """Drop the lowest mantissa bits of fp32 after adding as many random ones: carries round up.

    A NaN stays one: a carry could make it a zero.
    """
    mask = (1 << bits) - 1
    word_TD = workspace("word", (*row_TD.shape,), torch.int32, row_TD.device)
    torch.bitwise_and(noise_TD, mask, out=word_TD)
    word_TD.add_(row_TD.contiguous().view(torch.int32)).bitwise_and_(~mask)
    short_TD = word_TD.view(torch.float32)
    # Where there is a NaN the sum is one, and on a CPU it is sooner known than a choice is made.
    if row_TD.is_cuda or row_TD.sum().isnan():
        short_TD = torch.where(row_TD.isnan(), row_TD, short_TD)
    return short_TD
