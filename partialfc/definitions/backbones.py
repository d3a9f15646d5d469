"""The backbones by name, and the images that they take; :mod:`partialfc.backbones` builds them."""

from typing import Annotated, Literal, get_args

from partialfc.definitions import Definition, Range

Backbone = Literal[
    "iresnet18",
    "iresnet34",
    "iresnet50",
    "iresnet100",
    "iresnet200",
    "mobilefacenet",
    "mobilefacenet_large",
    "vit_t",
    "vit_s",
    "vit_b",
    "vit_l",
    "vit_h",
    "convnet_s",
    "convnet_m",
    "iresnet50_se",
    "iresnet100_se",
    "iresnet2060",
]
"""Every backbone by the name it has in a settings file."""

NAMES: tuple[str, ...] = get_args(Backbone)

TIMM = "timm/"
"""What the name of a network of timm begins with."""


class OfViT(Definition):
    """What a ViT takes besides."""

    masked: Annotated[float, Range(ge=0, le=0.9)] = 0.0
    """Share of an image's patches that are left out in training."""

    drop_path: Annotated[float, Range(ge=0, lt=1)] = 0.05
    """Probability in the last block that an image skips a branch; 0 in the first block and linear
    between."""


class OfMaskedViT(OfViT):
    """What a larger ViT takes besides."""

    masked: Annotated[float, Range(ge=0, le=0.9)] = 0.05
    """Share of an image's patches that are left out in training."""


class OfHugeViT(OfViT):
    """What the largest ViT takes besides."""

    drop_path: Annotated[float, Range(ge=0, lt=1)] = 0.1
    """Probability in the last block that an image skips a branch; 0 in the first block and linear
    between."""


class OfTimm(Definition):
    """What a network of timm takes besides."""

    pooled: bool = False
    """Make the embedding from timm's pooled features. Without it every position of the last grid,
    or every token, has weights of its own in the embedding layer, as in an iresnet."""

    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Probability that a feature is left out of the embedding in training."""

    drop_path: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Probability in the last block that an image skips a branch, if the network has branches."""


OPTIONS: dict[str, type[Definition]] = {
    "vit_t": OfViT,
    "vit_s": OfViT,
    "vit_b": OfMaskedViT,
    "vit_l": OfMaskedViT,
    "vit_h": OfHugeViT,
}
"""What a backbone takes besides, by its name: keywords of its constructor, ``[backbone.options]``
of a file. One that is not in here takes nothing."""


def options_of(name: str) -> type[Definition] | None:
    """Return what a backbone of ours or of timm takes besides; ``None`` for any other name."""
    if name.startswith(TIMM):
        return OfTimm
    return OPTIONS.get(name, Definition) if name in NAMES else None


_SMALLEST_OF_PATCHES = 24


def refused_size(name: str, image_size: int) -> str | None:
    """Return why a backbone does not take images of a side in pixels; ``None`` if it does.

    Of one that is not ours nothing is known.
    """
    if name not in NAMES:
        return None
    if name.startswith("vit_"):
        if image_size >= _SMALLEST_OF_PATCHES:
            return None
        return (
            f"image_size = {image_size}: {name} needs at least {_SMALLEST_OF_PATCHES} pixels, 2 "
            "for each of its 12 patches a side. Resize the images, or use convnet_s."
        )
    if image_size >= 16 and image_size % 16 == 0:
        return None
    below = max(16, image_size // 16 * 16)
    return (
        f"image_size = {image_size}: {name} halves the image four times, so it needs a multiple "
        f"of 16. Use {below} or {below + 16}."
    )
