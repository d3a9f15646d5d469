"""The optimizer of the backbone: groups of weights, their rates, and how gradients are clipped.

Every group has a ``lr_factor``: its rate is that of the step times the factor. Weights of one
factor and one weight decay are one group, in the backbone's order; without a setting that tells
weights apart there is one group of all.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from partialfc.config import Config, ConfigError
from partialfc.model.fsdp import Shards
from partialfc.model.groups import among, layers_of, matrices_of, refuse_unknown
from partialfc.model.updates import Lamb, Lion, MuonAndAdamW, ScheduleFree

_FUSED: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_OURS: dict[str, Any] = {
    "lion": Lion,
    "lamb": Lamb,
    "muon": MuonAndAdamW,
    "schedule_free": ScheduleFree,
}
_COPIED = 2**14
"""Numbers of a gradient whose squares are summed at once on a CPU; a cache holds them in fp64."""


def build_optimizer(config: Config, backbone: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the weights that are trained.

    All obey ``found_inf`` without a host synchronisation: torch's as fused kernels, one for all
    tensors of a group; for the others see :mod:`partialfc.model.updates`.

    Raises:
        ConfigError: If ``optimizer.rates`` names what is not in the backbone, or not trained.
    """
    chosen = config.optimizer
    settings = {name: getattr(chosen, name) for name in chosen.definition.takes}
    groups = _groups(config, backbone)
    if chosen.name in _OURS:
        own: torch.optim.Optimizer = _OURS[chosen.name](groups, **settings)
        return own
    optimizer: torch.optim.Optimizer = _FUSED[chosen.name](
        groups, lr=chosen.lr, fused=True, **settings
    )
    if settings.get("momentum"):
        # torch leaves the buffer of a skipped first step uninitialised; zero is what it means.
        for parameter in parameters_of(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _groups(config: Config, backbone: nn.Module) -> list[dict[str, Any]]:
    settings = config.optimizer
    refuse_unknown(backbone, settings.rates, "optimizer.rates")
    layers, matrices = layers_of(backbone), matrices_of(backbone)
    rotating = muon_matrices(backbone)
    below_last = {
        name: len(layers) - 1 - number for number, layer in enumerate(layers) for name in layer
    }
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    unused = set(settings.rates)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            own = among(name, settings.rates)
            unused.discard(own or "")
            factor = settings.layer_decay ** below_last[name] * (settings.rates[own] if own else 1)
            decays = settings.decay == "all" or name in matrices
            rotated = settings.name == "muon" and name in rotating
            groups.setdefault((factor, decays, rotated), []).append(parameter)
    for name in sorted(unused):
        raise ConfigError(
            f'optimizer.rates = {{"{name}" = {settings.rates[name]}}}: nothing in it is trained at '
            "this rate: it is frozen, or longer names stand for all of it. Remove it."
        )
    return [
        {
            "params": parameters,
            "lr_factor": factor,
            "weight_decay": settings.weight_decay if decays else 0.0,
            **({"rotated": rotated} if settings.name == "muon" else {}),
        }
        for (factor, decays, rotated), parameters in groups.items()
    ]


def groups_in_words(optimizer: torch.optim.Optimizer, shards: Shards | None = None) -> str:
    """Return how weights are told apart, in words; ``""`` if all are trained alike.

    Args:
        optimizer: Of the weights.
        shards: Where it has this rank's rows only; the words are of whole weights.
    """
    groups = optimizer.param_groups
    if len(groups) == 1 and groups[0]["lr_factor"] == 1:
        return ""
    factors = [group["lr_factor"] for group in groups]
    whole = {own: shards.divided[name] for name, own in shards.own.items()} if shards else {}
    sizes = [sum(whole.get(one, one).numel() for one in group["params"]) for group in groups]
    still = sum(size for size, g in zip(sizes, groups, strict=True) if not g["weight_decay"])
    low, high = min(factors), max(factors)
    rates = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    number = f"{len(groups)} groups" if len(groups) > 1 else "1 group"
    words = f"{number} of weights, rates times {rates}"
    return words + (f", {still:,} of {sum(sizes):,} weights without decay" if still else "")


def kept_numbers(config: Config, weights: int, rotated: int = 0) -> int:
    """Return how many numbers the optimizer keeps beside the weights that it trains.

    Args:
        config: Which optimizer.
        weights: That are trained.
        rotated: Those of them that Muon trains as matrices; :func:`muon_matrices`.
    """
    match config.optimizer.name:
        case "sgd":
            return weights if config.optimizer.momentum else 0
        case "lion":
            return weights
        case "muon":
            return 2 * weights - rotated
        case _:
            return 2 * weights


def muon_matrices(backbone: nn.Module) -> set[str]:
    """Return the names of the weights that Muon trains as matrices."""
    return {one for one in matrices_of(backbone) if backbone.get_parameter(one).ndim == 2}


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Yield the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate at this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def clip(
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    shards: Shards | None = None,
    *,
    each: bool = False,
) -> Tensor:
    """Scale gradients down to a norm; return the norm before, of all groups together.

    Args:
        optimizer: Its parameters' gradients are changed in place.
        clip_norm: Largest norm; 0 for no clipping.
        shards: Where a rank has its rows only, whose norm is that over ranks. Collective then.
        each: Hold every group to it by itself.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if not each:
        groups = [[*parameters_of(optimizer)]]
    squares = torch.stack([_square_sum(group) for group in groups])
    if shards:
        squares = shards.sums(squares)
    norms = squares.sqrt().float()
    if clip_norm:
        for group, norm in zip(groups, norms, strict=True):
            clip_grads_with_norm_(group, clip_norm, norm)
    return norms[0] if len(groups) == 1 else squares.sum().sqrt().float()


def _square_sum(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of their gradients' squares in fp64: its rounding does not show in fp32.

    So it does not matter which rows a rank has, and clipping is that of whole gradients to the bit.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    if not gradients:
        return parameters[0].new_zeros((), dtype=torch.float64)
    if gradients[0].device.type == "cpu":  # which makes a copy in fp64 of each
        gradients = [part for one in gradients for part in torch.split(one.flatten(), _COPIED)]
    return torch.stack(torch._foreach_norm(gradients, 2.0, torch.float64)).square().sum()
