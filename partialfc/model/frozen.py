"""What of a backbone stays as it is: ``backbone.freeze``."""

from collections.abc import Sequence

from torch import nn

from partialfc.config import ConfigError
from partialfc.model.groups import among, refuse_unknown


def freeze(network: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Keep weights from being trained; return the modules that stay in evaluation mode.

    In evaluation mode BatchNorm normalises by its running statistics and leaves them alone, and
    nothing is dropped.

    Args:
        network: The backbone.
        names: Of modules or parameters; all that lies in a module goes with it.

    Raises:
        ConfigError: If a name is unknown, or nothing is left to be trained.
    """
    refuse_unknown(network, names, "backbone.freeze")
    for name, parameter in network.named_parameters():
        if among(name, names):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            f"backbone.freeze = {[*names]}: nothing of the backbone is left to be trained. Leave "
            "its last layers out of the list."
        )
    return tuple(module for place, module in network.named_modules() if place in names)


def frozen_words(network: nn.Module, names: Sequence[str]) -> str:
    """Return what is frozen in words, ``""`` if nothing was asked to be."""
    if not names:
        return ""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    still = sum(size for name, size in sizes.items() if among(name, names))
    return f"{still:,} of {sum(sizes.values()):,} weights stay as they are: {', '.join(names)}"
