"""The backbones by name, and the images that they take; :mod:`partialfc.backbones` builds them."""

from typing import Literal, get_args

from partialfc.definitions import Definition

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
]
"""Every backbone by the name it has in a settings file."""

NAMES: tuple[str, ...] = get_args(Backbone)

OPTIONS: dict[str, type[Definition]] = {}
"""What a backbone takes besides, by its name: keywords of its constructor, ``[backbone.options]``
of a file. One that is not in here takes nothing."""


def options_of(name: str) -> type[Definition] | None:
    """Return what a backbone of ours takes besides; ``None`` if there is none of this name."""
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
