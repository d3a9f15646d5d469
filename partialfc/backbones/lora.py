"""Low-rank adapters on linear layers (LoRA, https://arxiv.org/abs/2106.09685).

A layer W x + b becomes W x + b + (alpha / r) B (A x), where A [r, in] and B [out, r] are trained
and W and b stay. B begins at zero, so that a network begins as what it was. Merged,
W + (alpha / r) B A takes the place of W, and nothing is left of the adapters but their effect.

An adapted layer keeps its name and those of its weights; its adapters are ``<layer>.lora_down`` and
``<layer>.lora_up``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(nn.Module):
    """A linear layer with adapters.

    Args:
        base: The layer that they adapt; its weights are taken over, not copied.
        rank: r, >= 1.
        factor: alpha / r.
    """

    def __init__(self, base: nn.Linear, rank: int, factor: float) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.factor = factor
        self.weight, self.bias = base.weight, base.bias
        self.lora_down = nn.Parameter(base.weight.new_empty(rank, self.in_features))
        self.lora_up = nn.Parameter(base.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        low = F.linear(x, self.lora_down) * self.factor
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_up)


def adapt(
    network: nn.Module, *, rank: int, factor: float, targets: Sequence[str], image_size: int
) -> list[str]:
    """Put adapters on the linear layers of a network, in place; return the names of these layers.

    torch's default generator decides how the adapters begin.

    Args:
        network: Images [b, 3, S, S] to embeddings.
        rank: r, >= 1, and at most the smaller side of each layer.
        factor: alpha / r.
        targets: Patterns as of file names, for the end of a layer's name or all of it:
            ``"attn.qkv"`` is that of every block, ``"blocks.1?.*"`` all layers of ten blocks.
        image_size: S in pixels.

    Raises:
        ValueError: If a pattern fits no linear layer, the rank is no lower than a layer's, or the
            network computes with a layer's weight without calling the layer.
    """
    linear = {name: one for name, one in network.named_modules() if type(one) is nn.Linear}
    chosen = []
    for target in targets:
        found = [name for name in linear if _fits(name, target)]
        if not found:
            raise ValueError(
                f'targets = "{target}": no linear layer has such a name. There are '
                f"{', '.join(_shortened(linear)) or 'none'}."
            )
        chosen += found
    names = [name for name in linear if name in chosen]
    for name in names:
        smaller = min(linear[name].in_features, linear[name].out_features)
        if rank >= smaller:
            raise ValueError(
                f"rank = {rank}: must be below {smaller}, which {name} has without adapters. "
                "Use a smaller rank, or leave this layer out of the targets."
            )
        _replace(network, name, LoraLinear(linear[name], rank, factor))
    if unused := _not_called(network, image_size):
        raise ValueError(
            f"targets: {', '.join(_shortened(unused))}: this network computes with the weight by "
            "itself and calls no such layer, so adapters would change nothing. Leave it out."
        )
    return names


def adapters(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the adapted layers by name."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def is_adapter(name: str) -> bool:
    """Whether a tensor of a ``state_dict`` is an adapter's, by its name."""
    return name.rpartition(".")[2] in (_DOWN, _UP)


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Make plain linear layers of adapted ones, in place."""
    for name, module in [*adapters(network)]:
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        weight = _merged(module.weight, module.lora_down, module.lora_up, module.factor)
        plain.weight, plain.bias = nn.Parameter(weight), module.bias
        _replace(network, name, plain.requires_grad_(False))


def merged_state(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the merged network; the tensors given are not changed.

    Args:
        state: Of the adapted network.
        factor: alpha / r.
    """
    merged = {name: value for name, value in state.items() if not is_adapter(name)}
    for name, low in state.items():
        layer, _, entry = name.rpartition(".")
        if entry == _DOWN:
            key = f"{layer}.weight"
            merged[key] = _merged(merged[key], low, state[f"{layer}.{_UP}"], factor)
    return merged


def _merged(weight: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor:
    """In fp64, so that every machine rounds to the same weights but for a rare last bit."""
    return (weight.double() + factor * (up.double() @ down.double())).to(weight.dtype)


def _fits(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _shortened(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Names without the numbers in which they differ."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _not_called(network: nn.Module, image_size: int) -> list[str]:
    """Adapted layers that an image does not go through; on the meta device nobody looks."""
    weight = next(network.parameters())
    if weight.is_meta:
        return []
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: object) -> None:
        called.add(module)

    hooks = [module.register_forward_hook(note) for _, module in adapters(network)]
    was_training = network.training
    with torch.no_grad():
        network.eval()(weight.new_zeros(1, 3, image_size, image_size))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name, module in adapters(network) if module not in called]
