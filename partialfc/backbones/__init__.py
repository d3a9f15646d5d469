"""Backbones: networks from aligned images to embeddings, by name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from partialfc.backbones import convnet, iresnet, mobilefacenet, vit
from partialfc.backbones.timm_network import TimmNetwork
from partialfc.definitions import plugins
from partialfc.definitions.backbones import NAMES, OPTIONS, TIMM, refused_size
from partialfc.definitions.signatures import call, parameters_of

__all__ = ["BACKBONES", "build_backbone"]

_BUILT: Mapping[str, Callable[..., nn.Module]] = {
    **{name: partial(iresnet.IResNet, depths) for name, depths in iresnet.DEPTHS.items()},
    **{
        f"{name}_se": partial(iresnet.IResNet, iresnet.DEPTHS[name], squeeze_excitation=True)
        for name in iresnet.WITH_EXCITATION
    },
    **{name: partial(mobilefacenet.MobileFaceNet, s) for name, s in mobilefacenet.SHAPES.items()},
    **{
        name: partial(vit.VisionTransformer, shape, **asdict(OPTIONS[name]()))
        for name, shape in vit.SHAPES.items()
    },
    **{name: partial(convnet.ConvNet, layers) for name, layers in convnet.LAYERS.items()},
}
BACKBONES = MappingProxyType({name: _BUILT[name] for name in NAMES})
"""Name -> constructor, with the keywords of :func:`build_backbone`."""


def build_backbone(
    name: str,
    *,
    embedding_dim: int = 512,
    image_size: int = 112,
    checkpoint_activations: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a freshly initialised backbone: images [b, 3, S, S] to embeddings [b, D].

    Images are float, RGB, in [-1, 1]; embeddings are not normalised and have the dtype of the
    weights, under autocast too. torch's default generator decides the initial weights.

    Args:
        name: A key of ``BACKBONES``, of a plug-in (:mod:`partialfc.definitions.plugins`), or timm/
            and the name of a network in timm.
        embedding_dim: D, >= 1.
        image_size: S in pixels: a multiple of 16, for a ViT any size >= 24, for timm what the
            network takes.
        checkpoint_activations: Recompute the blocks' activations in backward: less memory, the
            same result.
        options: Further keywords of this backbone's constructor.

    Raises:
        ValueError: If the name or an option is unknown, or a value is outside its range.
    """
    constructor = BACKBONES.get(name) or plugins.find("backbone", name)
    if constructor is not None and "embedding_dim" not in parameters_of(constructor):
        raise ValueError(  # before it is called: it may be any function of a plug-in's module
            f"name = {name!r}: must be a class or a function that takes the keyword embedding_dim."
        )
    if name.startswith(TIMM):
        constructor = partial(TimmNetwork, name)
    if constructor is None:
        nearest = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0)[0]
        raise ValueError(
            f"name = {name!r}: there is no such backbone. Did you mean {nearest!r}? "
            f"The backbones are {', '.join(BACKBONES)}."
        )
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim = {embedding_dim}: must be an integer >= 1.")
    if refused := refused_size(name, image_size):
        raise ValueError(refused)
    backbone: nn.Module = call(
        name,
        constructor,
        options,
        embedding_dim=embedding_dim,
        image_size=image_size,
        checkpoint_activations=checkpoint_activations,
    )
    return backbone
