"""Optimizers of the class centers that touch the sampled rows and their states only.

A rule (:class:`RowSGD`, :class:`RowAdamW`) is settings and a pure function on a tile of rows.
:class:`RowOptimizer` binds a rule to the centers of a rank: it keeps the micro-batches that
backward has seen and turns them into updates tile by tile, so no gradient of the centers exists.

An unsampled row stays as it is: no decay, no momentum ("lazy"). arcface_torch decays and moves all
rows every step.

Shape suffixes: D = embedding, T = rows of a tile.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.tiles import Kept, second_pass
from partialfc.tiles.torch import take_rows

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
        """Return the states of rows that were never updated."""

    @staticmethod
    @abstractmethod
    def update(
        group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States
    ) -> tuple[Tensor, States]:
        """Return new rows and states; the inputs are unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSGD(RowRule):
    """SGD with momentum as in torch.optim.SGD: v = μv + (g + λw), w = w - lr·v.

    Attributes:
        momentum: μ in [0, 1).
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        RowRule.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")

    def new_states(self, centers: Tensor) -> States:
        """Return a zero velocity, or nothing without momentum."""
        return {"momentum": torch.zeros_like(centers)} if self.momentum else {}

    @staticmethod
    def update(
        group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States
    ) -> tuple[Tensor, States]:
        """See :meth:`RowRule.update`."""
        velocity_TD = gradient_TD.add(row_TD, alpha=group["weight_decay"])
        if "momentum" in states:
            velocity_TD.add_(states["momentum"], alpha=group["momentum"])
            states = {"momentum": velocity_TD}
        return row_TD.sub(velocity_TD, alpha=group["lr"]), states


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdamW(RowRule):
    """AdamW (https://arxiv.org/abs/1711.05101) with one step count per row.

    The bias correction of a row counts the updates of that row, not the steps of the run, so a
    rarely sampled row is not corrected too little. Weight decay is decoupled: w = w·(1 - lr·λ).

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
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps}.")

    def new_states(self, centers: Tensor) -> States:
        """Return zero moments and step counts."""
        return {
            "first_moment": torch.zeros_like(centers),
            "second_moment": torch.zeros_like(centers),
            # fp32 counts exactly to 2**24, and torch's load_state_dict casts states to it anyway.
            "updates": centers.new_zeros(len(centers), 1),
        }

    @staticmethod
    def update(
        group: dict[str, Any], row_TD: Tensor, gradient_TD: Tensor, states: States
    ) -> tuple[Tensor, States]:
        """See :meth:`RowRule.update`."""
        beta1, beta2 = group["betas"]
        updates_T1 = states["updates"] + 1
        first_TD = states["first_moment"].lerp(gradient_TD, 1 - beta1)
        second_TD = states["second_moment"].lerp(gradient_TD.square(), 1 - beta2)
        root_TD = (second_TD / (1 - beta2**updates_T1)).sqrt_().add_(group["eps"])
        step_TD = first_TD / (1 - beta1**updates_T1) / root_TD
        decayed_TD = row_TD * (1 - group["lr"] * group["weight_decay"])
        new = {"first_moment": first_TD, "second_moment": second_TD, "updates": updates_T1}
        return decayed_TD.sub_(step_TD, alpha=group["lr"]), new


class RowOptimizer(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` of one rank's class centers; made by ``PartialFC``.

    ``param_groups``, learning-rate schedulers, ``state_dict`` and ``torch.amp.GradScaler`` work as
    with any optimizer. ``zero_grad`` forgets the micro-batches that backward has seen.

    Args:
        centers: [rows of this rank, D]; changed in place by :meth:`step`.
        rule: What happens to a row.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf before step

    def __init__(self, centers: nn.Parameter, rule: RowRule) -> None:
        self.rule = rule
        self._kept: list[Kept] = []
        self._skip: list[Tensor] = []
        super().__init__([centers], {**asdict(rule), "steps": 0})

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included; the sample of a step is keyed by it."""
        return int(self.param_groups[0]["steps"])

    def add_micro_batch(self, kept: Kept, weight: Tensor, finite: Tensor) -> None:
        """Remember one micro-batch for the next step.

        Args:
            kept: What pass 2 needs.
            weight: Scalar gradient of the loss that backward was given.
            finite: Scalar bool; false makes the next step change nothing.
        """
        kept = replace(
            kept, negative_B=kept.negative_B * weight, positive_B=kept.positive_B * weight
        )
        self._kept.append(kept)
        self._skip.append(~finite)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the micro-batches since the last step."""
        super().zero_grad(set_to_none)
        self._kept, self._skip = [], []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the sampled rows by the micro-batches since the last step; no collective.

        Nothing changes where a loss was not finite or ``found_inf`` is set; a GPU decides that
        without a host synchronisation.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        group["steps"] += 1
        kept, skips = self._kept, self._skip
        self._kept, self._skip = [], []
        if kept:
            self._update(group, kept, skips)
        return loss

    def _update(self, group: dict[str, Any], kept: list[Kept], skips: list[Tensor]) -> None:
        centers: Tensor = group["params"][0]
        skip = torch.stack(skips).any()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            skip = skip | (torch.as_tensor(found_inf, device=skip.device) != 0)
        if skip.device.type == "cpu" and skip:
            return
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            unscale = 1 / grad_scale
            kept = [
                replace(
                    one, negative_B=one.negative_B * unscale, positive_B=one.positive_B * unscale
                )
                for one in kept
            ]
        states = self.state[centers]
        if not states:
            states.update(self.rule.new_states(centers))
        rows = _union(kept)
        for start, stop, gradient_TD in second_pass(centers, rows, kept):
            old = {name: take_rows(state, rows, start, stop) for name, state in states.items()}
            row_TD = take_rows(centers, rows, start, stop)
            new_TD, new = self.rule.update(group, row_TD, gradient_TD, old)
            for tensor, before, after in (
                (centers, row_TD, new_TD),
                *((states[name], old[name], new[name]) for name in states),
            ):
                if skip.device.type != "cpu":
                    after = torch.where(skip, before, after)
                if rows is None:
                    tensor[start:stop] = after
                else:
                    tensor.index_copy_(0, rows[start:stop], after)


def _union(kept: list[Kept]) -> Tensor | None:
    """Rows that any micro-batch sampled; they are one object where the step's sample was fixed."""
    rows = kept[0].rows
    if rows is None or all(one.rows is rows for one in kept):
        return rows
    sampled = torch.cat([one.rows for one in kept if one.rows is not None])
    union: Tensor = torch.unique(sampled)  # host sync
    return union
