"""Updates of the backbone that torch has no fused kernel for: Lion, LAMB, Muon, schedule-free.

They read ``found_inf`` as torch's fused optimizers do: where it is 1, weights and states stay as
they are, to the bit, and the host does not wait to hear of it. States are there from the start, so
that a checkpoint has the same names before and after the first step. All that an update counts is a
tensor on the device, so a skipped step is not counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PART_ELEMENTS = 32 << 20
"""Weights that are updated together: a copy of them and of their states is kept until it is known
which to keep."""


class Guarded(torch.optim.Optimizer, ABC):
    """An optimizer whose step changes nothing where ``found_inf`` is 1.

    Args:
        groups: With ``params``, ``lr_factor`` and ``weight_decay``.
        settings: Of the update, the same for all groups that do not say otherwise.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, {"lr": 0.0, **settings})
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].update(self.new_states(group, weight))

    @abstractmethod
    def new_states(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """Return the states of a weight that was never updated."""

    @abstractmethod
    def update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """Change weights and states in place, by gradients that are there; they are used up."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weights in _parts([one for one in group["params"] if one.grad is not None]):
                with self._unless_skipped(weights):
                    self.update(group, weights)

    @contextmanager
    def _unless_skipped(self, weights: list[Tensor]) -> Iterator[None]:
        states = [state for weight in weights for state in self.state[weight].values()]
        tensors = [*weights, *states]
        before = [tensor.clone() for tensor in tensors]
        yield
        if self.found_inf is not None:
            skipped = self.found_inf > 0
            kept = [
                torch.where(skipped, old, new) for old, new in zip(before, tensors, strict=True)
            ]
            torch._foreach_copy_(tensors, kept)

    def _states(self, weights: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[weight][name] for weight in weights]

    def _count(self, weights: list[Tensor]) -> Tensor:
        """Count a step of these weights; return the steps that they have taken, fp32 [] on the
        device."""
        steps = self._states(weights, "step")
        torch._foreach_add_(steps, 1)
        return steps[0]


class Lion(Guarded):
    """m' = β1·m + (1-β1)·g; w = w·(1 - lr·λ) - lr·sign(m'); m = β2·m + (1-β2)·g.

    Algorithm 2 of https://arxiv.org/abs/2302.06675.
    """

    def new_states(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """See :meth:`Guarded.new_states`."""
        return {"exp_avg": torch.zeros_like(weight)}

    def update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """See :meth:`Guarded.update`."""
        (first, second), lr = group["betas"], group["lr"]
        means, gradients = self._states(weights, "exp_avg"), _gradients(weights)
        signs = torch._foreach_lerp(means, gradients, 1 - first)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-lr)
        torch._foreach_lerp_(means, gradients, 1 - second)


class Lamb(Guarded):
    """u = m̂ / (√v̂ + ε) + λ·w; w = w - lr·(‖w‖ / ‖u‖)·u, of each tensor.

    Algorithm 2 of https://arxiv.org/abs/1904.00962, with φ the identity. The ratio is 1 where a
    norm is 0 and for weights that do not decay.
    """

    def new_states(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """See :meth:`Guarded.new_states`."""
        return _moments(weight)

    def update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """See :meth:`Guarded.update`."""
        decay, (beta1, beta2) = group["weight_decay"], group["betas"]
        firsts, seconds = self._states(weights, "exp_avg"), self._states(weights, "exp_avg_sq")
        gradients, steps = _gradients(weights), self._count(weights)
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(seconds, 1 - beta2**steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(firsts, 1 - beta1**steps)
        torch._foreach_div_(updates, roots)
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
            lengths = torch.stack(torch._foreach_norm(weights))
            own = torch.stack(torch._foreach_norm(updates))
            ratios = torch.where((lengths > 0) & (own > 0), lengths / own, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


class MuonAndAdamW(Guarded):
    """torch's Muon on the matrices of the groups that are ``rotated``, its AdamW on all others.

    Muon's rate is scaled so that an update is as long as AdamW's (Moonlight, section 2.2 of
    https://arxiv.org/abs/2502.16982), and one learning rate is right for both.

    Args:
        groups: With ``rotated`` too.
        momentum: Of Muon.
        settings: ``betas`` and ``eps`` of AdamW, and ``weight_decay``.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **settings: Any) -> None:
        inner: dict[bool, torch.optim.Optimizer] = {
            True: torch.optim.Muon(
                [nn.Parameter(torch.empty(1, 1))],
                weight_decay=settings["weight_decay"],
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            ),
            False: torch.optim.AdamW([nn.Parameter(torch.empty(1))], fused=True, **settings),
        }
        self._inner = inner
        super().__init__([{**inner[one["rotated"]].defaults, **one} for one in groups])

    def new_states(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """See :meth:`Guarded.new_states`."""
        if group["rotated"]:
            return {"momentum_buffer": torch.zeros_like(weight)}
        return _moments(weight)

    def update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """See :meth:`Guarded.update`."""
        inner = self._inner[group["rotated"]]
        inner.state = self.state
        inner.param_groups = [{**group, "params": weights}]
        inner.step()


class ScheduleFree(Guarded):
    """AdamW without a schedule (https://arxiv.org/abs/2405.15682).

    A gradient is taken at y = (1-β1)·z + β1·x, which the weights are. z moves by the gradient over
    √v̂ + ε and by λ·y, and x is the mean of all z, weighted by the square of the highest rate so
    far. Only y and z are kept; x is what is used: see
    :class:`ScheduleFreeMean`.
    """

    def new_states(self, group: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
        """See :meth:`Guarded.new_states`."""
        moments = _moments(weight)
        zero = torch.zeros((), dtype=torch.float64, device=weight.device)
        return {
            "z": weight.detach().clone(),
            "exp_avg_sq": moments["exp_avg_sq"],
            "step": moments["step"],
            "highest_rate": zero.clone(),
            "sum_of_squares": zero.clone(),
        }

    def update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """See :meth:`Guarded.update`."""
        rate, (beta1, beta2) = group["lr"], group["betas"]
        zs, seconds = self._states(weights, "z"), self._states(weights, "exp_avg_sq")
        steps, share = self._count(weights), self._share_of_last(rate, weights)
        ys, gradients = weights, _gradients(weights)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(seconds, 1 - beta2**steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(gradients, roots)
        if group["weight_decay"]:
            torch._foreach_add_(gradients, ys, alpha=group["weight_decay"])
        for y, z in zip(ys, zs, strict=True):
            y.lerp_(z, share.float())
        moved = torch._foreach_mul(gradients, (rate * (beta1 * (1 - share) - 1)).float())
        torch._foreach_add_(ys, moved)
        torch._foreach_add_(zs, gradients, alpha=-rate)

    def _share_of_last(self, rate: float, weights: list[Tensor]) -> Tensor:
        """What the newest z weighs in the mean of all, fp64 [] on the device."""
        highest = self._states(weights, "highest_rate")
        sums = self._states(weights, "sum_of_squares")
        torch._foreach_clamp_min_(highest, rate)
        squares = torch._foreach_mul(highest, highest)
        torch._foreach_add_(sums, squares)
        return squares[0] / sums[0]


class ScheduleFreeMean:
    """The mean x of a schedule-free optimizer, as :class:`partialfc.model.average.Average` is used.

    It is no third copy of the weights: it follows from what the optimizer keeps.

    Args:
        optimizer: Of the backbone.
        parameters: Of the backbone by name, as the optimizer has them.
    """

    def __init__(self, optimizer: ScheduleFree, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The mean by the names of the backbone's ``state_dict``, in new tensors."""
        names: dict[Tensor, str] = {weight: name for name, weight in self._parameters.items()}
        return {names[weight]: mean for weight, mean in self._means()}

    @torch.no_grad()
    def begin(self) -> None:
        """Begin anew at the weights as they are."""
        for weight, states in self._optimizer.state.items():
            states["z"].copy_(weight)

    def update(self, step: int, skipped: Tensor) -> None:
        """Nothing: the optimizer's step has moved the mean."""

    def statistics(self) -> dict[str, Tensor]:
        """Return nothing: BatchNorm's statistics are those of the weights that are trained."""
        return {}

    def load(self, found: Mapping[str, Tensor]) -> None:
        """Nothing: the mean follows from weights and states, which are loaded to the bit."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the backbone the mean, and at the end its own weights again, to the bit."""
        live = {weight: weight.detach().clone() for weight in self._optimizer.state}
        with torch.no_grad():
            for weight, mean in self._means():
                weight.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in live.items():
                    weight.copy_(value)

    @torch.no_grad()
    def install(self) -> None:
        """Let the mean replace the weights for good: of a model that is trained no more."""
        for weight, mean in self._means():
            weight.copy_(mean)
            self._optimizer.state[weight]["z"].copy_(mean)

    @torch.no_grad()
    def _means(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                z = self._optimizer.state[weight]["z"]
                yield weight, weight.lerp(z, 1 - 1 / group["betas"][0])


def _moments(weight: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=weight.device),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
    }


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def _parts(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut into parts of at most ``PART_ELEMENTS``, or of one tensor that has more."""
    part: list[Tensor] = []
    for weight in weights:
        if part and sum(one.numel() for one in part) + weight.numel() > PART_ELEMENTS:
            yield part
            part = []
        part.append(weight)
    if part:
        yield part
