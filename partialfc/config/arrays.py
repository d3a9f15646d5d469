"""What a run on arrays has, and what of the settings of images it has not."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from partialfc.definitions.augment import CHANGES
from partialfc.definitions.backbones import NAMES, TIMM
from partialfc.definitions.phrases import to_value

if TYPE_CHECKING:
    from partialfc.config.data import Data
    from partialfc.config.tree import Config


def refuse_images(data: "Data") -> None:
    """Refuse settings of images where arrays are trained on, and the other way round.

    Raises:
        ValueError: The message begins with the key within ``data``.
    """
    if data.kind == "images":
        if data.shape is not None:
            raise ValueError(
                f"shape = {to_value(list(data.shape))}: it is of arrays, and images have "
                'data.image_size. Set data.kind = "arrays", or remove it.'
            )
        return
    arrays = 'data.kind = "arrays"'
    if dict(data.sets):
        raise ValueError(f"sets with {arrays}: not supported together. Name the files in train.")
    for key, why in (("shape", "the shape of one sample"), ("labels", "whom each sample is of")):
        if getattr(data, key) is None:
            raise ValueError(f"{key}: required with {arrays}: {why}. Add {key} = ... below [data].")
    default = type(data).model_fields["image_size"].default
    for key, value, unset in (
        ("image_size", data.image_size, default),
        ("flip", data.flip, 0),
        ("shift", data.shift, 0),
        *((f"augment.{name}", getattr(data.augment, name), 0) for name in CHANGES),
        ("loader", data.loader, "auto"),
        ("skip", data.skip, ()),
        ("bad_share", data.bad_share, type(data).model_fields["bad_share"].default),
    ):
        if value not in (unset, "torch"):
            raise ValueError(
                f"{key} = {to_value(value)} with {arrays}: it is for images. Remove it; what "
                "changes a sample at random belongs into the backbone."
            )


def conflicts_of_arrays(config: "Config") -> Iterator[str]:
    """Yield a line for what other sections say of images where arrays are trained on."""
    if config.data.kind == "images":
        return
    name, arrays = config.backbone.name, 'with data.kind = "arrays"'
    if name in NAMES or name.startswith(TIMM):
        yield (
            f'backbone.name = "{name}" {arrays}: it takes images. Name one of your own, '
            '"my.module:Name", as on the page partialfc/not_only_faces.md.'
        )
    if config.backbone.lora.rank:
        yield f"backbone.lora.rank = {config.backbone.lora.rank} {arrays}: not supported together."
    if config.losses.teacher.weight:
        yield f"losses.teacher.weight = {config.losses.teacher.weight} {arrays}: it sees images."
    if any(head.start == "pack:mean" for head in (config.head, *dict(config.heads).values())):
        yield f'head.start = "pack:mean" {arrays}: it embeds images. Name a file of centers.'
    if config.verification.flip:
        yield f"verification.flip = true {arrays}: it mirrors images. Remove it."
    for path in config.verification.pairs:
        yield (
            f'verification.pairs = "{path}" {arrays}: it is of images. Use '
            "verification.identification with an .npy and its .labels.npy beside it."
        )
