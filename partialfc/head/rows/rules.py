"""What an update does to a sampled row: settings, and arithmetic on a tile of fp32 rows.

Shape suffixes: D = embedding, T = rows of a tile, 1 = one a row.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from torch import Tensor

from partialfc.definitions import Definition, Range
from partialfc.definitions import optimizers as definitions
from partialfc.head.rows.formats import DTYPES, SCALED, Format

States = dict[str, Tensor]
"""Row states by name, each with one row per class center."""


Rate = Annotated[float, Range(ge=0)]


class RowRule(Definition, ABC):
    """Settings of an update; every field is an entry of ``param_groups[0]``."""

    lr: Rate = 0.1
    """Learning rate."""

    @abstractmethod
    def new_states(self, centers: Tensor) -> States:
        """Return the states of rows that were never updated, as they are stored."""

    @staticmethod
    @abstractmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """Change fp32 rows and states in place; the gradient is used up."""


class RowSGD(definitions.SgdOfRows, RowRule):
    """SGD with momentum as in torch.optim.SGD: v = μv + (g + λw), w = w - lr·v.

    An int8 v has an fp32 scale a row. Rows that move without being sampled:
    :mod:`partialfc.head.rows.catch_up`. Rows that stay, as in PLSC. At a sample rate of 1 there is
    no such row, and both are one.
    """

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


class RowAdamW(definitions.AdamWOfRows, RowRule):
    """AdamW (https://arxiv.org/abs/1711.05101) with one step count per row.

    The bias correction of a row counts the updates of that row, not the steps of the run, so a
    rarely sampled row is not corrected too little. Weight decay is decoupled: w = w·(1 - lr·λ), at
    the steps that sample the row.
    """

    lr: Rate = 1e-3

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


class RowAdagrad(definitions.AdagradOfRows, RowRule):
    """Row-wise Adagrad: one number a row, the sum over its updates of the mean square of g + λw.

    w = w - lr·(g + λw) / (sqrt(sum) + eps), as for embedding tables in
    https://arxiv.org/abs/1906.00091.
    """

    lr: Rate = 0.05

    def new_states(self, centers: Tensor) -> States:
        """Return a zero sum for each row."""
        return {"square_sum": _per_row(centers)}

    @staticmethod
    def update_(group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States) -> None:
        """See :meth:`RowRule.update_`."""
        gradient_TD.add_(row_TD, alpha=group["weight_decay"])
        sum_T1 = states["square_sum"].add_(gradient_TD.square().mean(1, keepdim=True))
        row_TD.addcdiv_(gradient_TD, sum_T1.sqrt().add_(group["eps"]), value=-group["lr"])


ROW_RULES: dict[str, type[RowRule]] = {"sgd": RowSGD, "adamw": RowAdamW, "adagrad": RowAdagrad}
"""Every update by the name it has in a settings file."""


def _new(name: str, centers: Tensor, stored_as: Format) -> States:
    states = {name: torch.zeros_like(centers, dtype=DTYPES[stored_as], requires_grad=False)}
    return states | ({f"{name}_scale": _per_row(centers)} if stored_as in SCALED else {})


def _per_row(centers: Tensor) -> Tensor:
    return torch.zeros(len(centers), 1, device=centers.device)
