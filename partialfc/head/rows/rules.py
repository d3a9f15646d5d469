"""What an update does to a sampled row: settings, and arithmetic on a tile of fp32 rows.

Shape suffixes: D = embedding, T = rows of a tile.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from partialfc.head.rows.formats import DTYPES, SCALED, Format

States = dict[str, Tensor]
"""Row states by name, each with one row per class center."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule(ABC):
    """Settings of an update; every field is an entry of ``param_groups[0]``.

    Attributes:
        lr: Learning rate, >= 0.
        weight_decay: λ, >= 0.

    Raises:
        ValueError: If a value is outside its range.
    """

    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}.")

    @abstractmethod
    def new_states(self, centers: Tensor) -> States:
        """Return the states of rows that were never updated, as they are stored."""

    @staticmethod
    @abstractmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """Change fp32 rows and states in place; the gradient is used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSGD(RowRule):
    """SGD with momentum as in torch.optim.SGD: v = μv + (g + λw), w = w - lr·v.

    Attributes:
        momentum: μ in [0, 1).
        momentum_format: How v is stored: ``"fp32"``, ``"bf16"`` or ``"int8"`` with an fp32 scale a
            row, both with stochastic rounding.
        unsampled: What happens to a row at a step that does not sample it. ``"move"``: it decays
            and moves by its momentum, as in torch.optim.SGD on all rows and in arcface_torch;
            computed when the row is sampled next, see :mod:`partialfc.head.rows.catch_up`.
            ``"stay"``: nothing, as in PLSC. At a sample rate of 1 there is no such row, and both
            are one.
    """

    momentum: float = 0.9
    momentum_format: Literal["fp32", "bf16", "int8"] = "fp32"
    unsampled: Literal["move", "stay"] = "move"

    def __post_init__(self) -> None:
        RowRule.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if self.momentum_format not in ("fp32", "bf16", "int8"):
            raise ValueError(
                f"momentum_format must be fp32, bf16 or int8, got {self.momentum_format!r}."
            )
        if self.unsampled not in ("move", "stay"):
            raise ValueError(f"unsampled must be move or stay, got {self.unsampled!r}.")

    def new_states(self, centers: Tensor) -> States:
        """Return a zero velocity, or nothing without momentum."""
        return _new("momentum", centers, self.momentum_format) if self.momentum else {}

    @staticmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """See :meth:`RowRule.update_`."""
        velocity = [states["momentum"]] if "momentum" in states else []
        # It goes through memory in a line: rows of another layout would change their neighbours.
        assert all(tensor.is_contiguous() for tensor in (row_TD, gradient_TD, *velocity))
        torch._fused_sgd_(  # that of torch.optim.SGD(fused=True): five passes over rows, not nine
            [row_TD],
            [gradient_TD],
            velocity,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdamW(RowRule):
    """AdamW (https://arxiv.org/abs/1711.05101) with one step count per row.

    The bias correction of a row counts the updates of that row, not the steps of the run, so a
    rarely sampled row is not corrected too little. Weight decay is decoupled: w = w·(1 - lr·λ), at
    the steps that sample the row.

    Attributes:
        betas: Decay of the first and second moment, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        RowRule.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}.")
        _positive_eps(self.eps)

    def new_states(self, centers: Tensor) -> States:
        """Return zero moments and step counts."""
        return {
            **_new("first_moment", centers, "fp32"),
            **_new("second_moment", centers, "fp32"),
            "updates": _per_row(centers),  # fp32 counts exactly to 2**24
        }

    @staticmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """See :meth:`RowRule.update_`."""
        beta1, beta2 = group["betas"]
        updates_T1 = states["updates"].add_(1)
        first_TD = states["first_moment"].lerp_(gradient_TD, 1 - beta1)
        second_TD = states["second_moment"].lerp_(gradient_TD.square_(), 1 - beta2)
        root_TD = (second_TD / (1 - beta2**updates_T1)).sqrt_().add_(group["eps"])
        step_TD = (first_TD / (1 - beta1**updates_T1)).div_(root_TD)
        row_TD.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step_TD, alpha=group["lr"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdagrad(RowRule):
    """Row-wise Adagrad: one number a row, the sum over its updates of the mean square of g + λw.

    w = w - lr·(g + λw) / (sqrt(sum) + eps), as for embedding tables in
    https://arxiv.org/abs/1906.00091.

    Attributes:
        eps: Added to the root of the sum, > 0.
    """

    lr: float = 0.05
    weight_decay: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        RowRule.__post_init__(self)
        _positive_eps(self.eps)

    def new_states(self, centers: Tensor) -> States:
        """Return a zero sum for each row."""
        return {"square_sum": _per_row(centers)}

    @staticmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """See :meth:`RowRule.update_`."""
        gradient_TD.add_(row_TD, alpha=group["weight_decay"])
        sum_T1 = states["square_sum"].add_(gradient_TD.square().mean(1, keepdim=True))
        row_TD.addcdiv_(gradient_TD, sum_T1.sqrt().add_(group["eps"]), value=-group["lr"])


def _positive_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be > 0 and finite, got {eps}.")


def _new(name: str, centers: Tensor, stored_as: Format) -> States:
    states = {name: torch.zeros_like(centers, dtype=DTYPES[stored_as], requires_grad=False)}
    return states | ({f"{name}_scale": _per_row(centers)} if stored_as in SCALED else {})


def _per_row(centers: Tensor) -> Tensor:
    return torch.zeros(len(centers), 1, device=centers.device)
