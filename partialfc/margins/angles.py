"""Functions of an angle that is known by its cosine, differentiable everywhere.

Shape suffix: B = rows of the gathered batch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from partialfc.definitions.margins import PastPi

SMALLEST_SINE = 1e-3
"""Bound of 1 / sin(theta). The gradient of the embedding itself stays bounded without it, but the
fp32 cosine does not resolve smaller angles."""


class _Angle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cosine_B: Tensor) -> Tensor:
        cosine_B = cosine_B.clamp(-1, 1)
        ctx.save_for_backward(cosine_B)
        return torch.acos(cosine_B)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> Tensor:
        (cosine_B,) = ctx.saved_tensors
        sine_B: Tensor = (1 - cosine_B.square()).sqrt()
        return -weight_B / sine_B.clamp(min=SMALLEST_SINE)


def angle(cosine_B: Tensor) -> Tensor:
    """Return θ in [0, pi]; its derivative is -1 / sin(θ), bounded by 1000 at both ends."""
    theta_B: Tensor = _Angle.apply(cosine_B)  # type: ignore[no-untyped-call]
    return theta_B


def cosine_with_margin(
    cosine_B: Tensor, multiplicative: float, angular: float | Tensor, past_pi: PastPi
) -> Tensor:
    """Return cos(m0·θ + m1), continued past pi as ``past_pi`` says.

    Args:
        cosine_B: cos(θ).
        multiplicative: m0 >= 1.
        angular: m1 in radians, a number or [B].
        past_pi: See :data:`~partialfc.definitions.margins.PastPi`.
    """
    phi_B = multiplicative * angle(cosine_B) + angular
    shifted_B = phi_B.cos()
    if past_pi == "none":
        return shifted_B
    if past_pi == "fold":
        fold_B = (phi_B.detach() / math.pi).floor()
        return (1 - 2 * fold_B.remainder(2)) * shifted_B - 2 * fold_B
    if past_pi == "easy":
        return torch.where(cosine_B > 0, shifted_B, cosine_B)
    # A number stays one: a tensor of it would have to be copied to a GPU.
    shift: float | Tensor
    if isinstance(angular, Tensor):
        turn_B = (math.pi - angular) / multiplicative
        shift = angular * angular.sin() if past_pi == "drop" else 1 + turn_B.cos()
    else:
        turn = (math.pi - angular) / multiplicative
        shift = angular * math.sin(angular) if past_pi == "drop" else 1 + math.cos(turn)
    beyond_B = cosine_B - shift
    return torch.where(phi_B < math.pi, shifted_B, beyond_B)


def folded_cosine(cosine_B: Tensor, multiplier: int) -> Tensor:
    """Return ψ(θ) = (-1)^k cos(mθ) - 2k, θ in [kπ/m, (k+1)π/m]: monotone, from 1 to 1 - 2m.

    cos(mθ) is a polynomial in cos(θ), so the derivative is exact at every angle.
    """
    cosine_B = cosine_B.clamp(-1, 1)
    last_B, multiple_B = torch.ones_like(cosine_B), cosine_B
    for _ in range(multiplier - 1):
        last_B, multiple_B = multiple_B, 2 * cosine_B * multiple_B - last_B
    fold_B = torch.zeros_like(cosine_B)
    for k in range(1, multiplier):
        fold_B = fold_B + (cosine_B.detach() < math.cos(k * math.pi / multiplier))
    return (1 - 2 * fold_B.remainder(2)) * multiple_B - 2 * fold_B
