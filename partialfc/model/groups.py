"""Which weights of a network belong together: by their names, by layer, by whether they decay.

Nothing here knows an architecture: a network is its modules, in the order it registers them.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from partialfc.config import ConfigError

_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag


def layers_of(network: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each layer, from the image to the embedding.

    A layer is an element of a stack (a ``Sequential`` or ``ModuleList`` of modules that have
    modules themselves: residual blocks, transformer blocks), and all that lies before, between or
    behind stacks: the stem, the end. A stack in an element is cut too, unless the element says
    ``indivisible = True``.
    """
    seen: set[int] = set()
    named = dict(network.named_parameters(remove_duplicate=False))
    layers = []
    for names in _cut(network, ""):
        own = [name for name in names if id(named[name]) not in seen]
        seen |= {id(named[name]) for name in own}
        if own:
            layers.append(own)
    return layers


def matrices_of(network: nn.Module) -> set[str]:
    """Return the names of the weights that decay where ``optimizer.decay = "matrices"``.

    Those of linear layers and convolutions: not vectors (biases, norms, PReLU's slopes), not
    tokens and positions (parameters that are one for all images, [1, ...], tables of
    ``nn.Embedding``, and what a module's ``no_weight_decay()`` names, as timm's networks do).
    """
    spared: set[str] = set()
    for place, module in network.named_modules():
        told = getattr(module, "no_weight_decay", None)
        names = set(told()) if callable(told) else set()
        if isinstance(module, _EMBEDDINGS):
            names |= {name for name, _ in module.named_parameters(recurse=False)}
        spared |= {f"{place}.{name}".lstrip(".") for name in names}
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1
        and (len(parameter) > 1 or name.endswith("weight"))
        and name not in spared
    }


def among(name: str, prefixes: Iterable[str]) -> str | None:
    """Return the longest of ``prefixes`` that a dotted name begins with, whole words; or none."""
    fitting = [one for one in prefixes if f"{name}.".startswith(f"{one}.")]
    return max(fitting, key=len, default=None)


def refuse_unknown(network: nn.Module, prefixes: Iterable[str], setting: str) -> None:
    """Refuse names that nothing in a network begins with.

    Raises:
        ConfigError: With the names that there are, at the place where the unknown one leaves them.
    """
    known = [
        *(name for name, _ in network.named_modules()),
        *(name for name, _ in network.named_parameters()),
    ]
    for prefix in prefixes:
        if prefix in known and prefix:
            continue
        parent = prefix
        while parent and parent not in known:
            parent = parent.rpartition(".")[0]
        module = network.get_submodule(parent) if parent in dict(network.named_modules()) else None
        inside = _names_in(module) if module is not None else []
        where = f"{parent} has" if parent else "It has"
        there = f" {where} {', '.join(inside)}." if inside else ""
        raise ConfigError(
            f'{setting} = "{prefix}": nothing in the backbone has this name.{there} A name is that '
            'of a module or a parameter, as in a checkpoint: "layer1", "blocks.0.attn".'
        )


def _names_in(module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return [*own, *(name for name, child in module.named_children() if _weighs(child))]


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _cut(module: nn.Module, place: str) -> Iterator[list[str]]:
    run = [place + name for name, _ in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        inside = f"{place}{name}."
        if _is_divided(child):
            yield run
            yield from _cut(child, inside)
            run = []
            continue
        names = [inside + own for own, _ in child.named_parameters(remove_duplicate=False)]
        if _is_stack(module):
            yield run
            yield names
            run = []
        else:
            run += names
    yield run


def _is_divided(module: nn.Module) -> bool:
    if getattr(module, "indivisible", False):
        return False
    return _is_stack(module) or any(map(_is_divided, module.children()))


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(
        any(True for _ in child.children()) for child in module
    )
