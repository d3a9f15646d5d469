"""The optimizer of the backbone: its groups of weights, their rates, and how gradients are clipped.

Every group has a ``lr_factor``: its rate is that of the step times the factor.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.config import Config

_OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def build_optimizer(config: Config, backbone: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the weights that are trained.

    Fused: one kernel for all tensors of a group, and it obeys ``found_inf`` without a host
    synchronisation.
    """
    settings = config.optimizer.model_dump(exclude={"name", "clip_norm", "accumulation"})
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    groups = [{"params": parameters, "lr_factor": 1.0}]
    optimizer: torch.optim.Optimizer = _OPTIMIZERS[config.optimizer.name](
        groups, fused=True, **settings
    )
    if settings.get("momentum"):
        # torch leaves the buffer of a skipped first step uninitialised; zero is what it means.
        for parameter in parameters_of(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Yield the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate at this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Scale gradients down to a norm; return the norm before, of all groups together.

    Args:
        optimizer: Its parameters' gradients are changed in place.
        clip_norm: Largest norm; 0 for no clipping.
    """
    norm: Tensor = torch.nn.utils.clip_grad_norm_(
        [*parameters_of(optimizer)], clip_norm or math.inf
    )
    return norm
