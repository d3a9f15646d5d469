"""A backbone of which low-rank adapters are trained, and what else the settings ask for.

All else is the base, which stays to the bit: its weights, and the running statistics of its
BatchNorm, which normalises by them in training too. Checkpoints hold what is not the base.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc.backbones.lora import adapt, is_adapter
from partialfc.config import ConfigError
from partialfc.config.lora import Lora
from partialfc.model.groups import among, refuse_unknown


def adapted(network: nn.Module, settings: Lora, image_size: int) -> nn.Module:
    """Return the network with adapters, in place, and all but what is trained frozen.

    Raises:
        ConfigError: If a target or a name is unknown, or the rank is too large.
    """
    if not settings.rank:
        return network
    try:
        adapt(
            network,
            rank=settings.rank,
            factor=settings.factor,
            targets=settings.targets,
            image_size=image_size,
        )
    except ValueError as error:
        raise ConfigError(f"backbone.lora.{error}") from error
    refuse_unknown(network, settings.also_train, "backbone.lora.also_train")
    base = base_of(network.state_dict(), settings.also_train)
    for name, parameter in network.named_parameters():
        if name in base:
            parameter.requires_grad_(False)
    return network


def own_names(network: nn.Module, settings: Lora) -> frozenset[str] | None:
    """Return the names in a ``state_dict`` that are not the base's; ``None`` without LoRA."""
    if not settings.rank:
        return None
    base = base_of(network.state_dict(), settings.also_train)
    return frozenset(network.state_dict().keys() - base.keys())


def still_norms(network: nn.Module, settings: Lora) -> tuple[nn.Module, ...]:
    """Return the BatchNorms of the base, which stay in evaluation mode; none without LoRA."""
    return tuple(
        module
        for name, module in network.named_modules()
        if settings.rank and isinstance(module, _BatchNorm) and not among(name, settings.also_train)
    )


def base_of(state: Mapping[str, Tensor], also_train: Sequence[str]) -> dict[str, Tensor]:
    """Return what belongs to the base of the state of a network, adapted or not."""
    return {
        name: value
        for name, value in state.items()
        if not is_adapter(name) and not among(name, also_train)
    }


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, kinds, shapes and values, in the order of the names.

    It is that of the weights, wherever they lie and in whichever file.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapted_words(network: nn.Module, settings: Lora) -> str:
    """Return how much of a backbone is trained, in words; ``""`` without LoRA."""
    if not settings.rank:
        return ""
    sizes = [(one.numel(), one.requires_grad) for one in network.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    total = sum(size for size, _ in sizes)
    return f"{trained:,} of {total:,} weights are trained, the adapters among them"
