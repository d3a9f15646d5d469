"""Number formats of matrix products, and unit rows.

Shape suffixes: D = embedding, T = rows, 1 = one a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def operand_dtype(compute: str) -> torch.dtype:
    """What the operands of a product in fp32, tf32 or bf16 are stored as."""
    return torch.bfloat16 if compute == "bf16" else torch.float32


@contextmanager
def precision(compute: str, device: torch.device) -> Iterator[None]:
    """Let fp32 products on a GPU run in TF32 for ``"tf32"``, and only then."""
    if device.type != "cuda" or compute == "bf16":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = compute == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def is_finite(*scalars: Tensor) -> Tensor:
    """Return a scalar bool: whether all are finite. ``isfinite`` takes twice the launches."""
    nothing, *others = (one - one for one in scalars)  # 0, or NaN where one is not finite
    for other in others:
        nothing = nothing + other
    return nothing == 0


_SMALLEST_NORM = 1e-10
"""A shorter vector has no direction: its unit vector and its gradient are zero. exp(64) over
any other stays inside fp32's range."""


def unit(row_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 unit rows [T, D] and reciprocal norms [T, 1], 0 where a row has no length.

    A non-finite row stays non-finite, so that the loss shows it.
    """
    row_TD = row_TD.float()
    reciprocal_T1 = reciprocal_norms(row_TD)
    return row_TD * reciprocal_T1, reciprocal_T1


def reciprocal_norms(row_TD: Tensor) -> Tensor:
    """Return 1 / norm of rows [T, 1] in fp32; 0 without a direction, NaN if not finite."""
    norm_T1 = torch.linalg.vector_norm(row_TD, dim=1, keepdim=True, dtype=torch.float32)
    nothing_T1 = norm_T1 - norm_T1  # 0, or NaN where the norm is not finite
    return F.threshold(norm_T1, _SMALLEST_NORM, torch.inf).reciprocal_().add_(nothing_T1)
