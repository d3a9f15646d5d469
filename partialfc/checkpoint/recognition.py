"""Which backbone a state_dict is of, by the names and shapes of its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.backbones import BACKBONES, build_backbone
from partialfc.definitions.backbones import refused_size
from partialfc.errors import ForeignError

_OF_R2060 = "layer3.895.conv1.weight"
_LAST_NORMS = ("features", "features.layers.3", "feature.3")
"""The layer that makes the embedding, in the families of backbones; it has D channels."""

_LARGEST_DIM = 4096
_SIZES = (112, 128, 96, 64, 48, 32, 160, 224)
"""Usual sizes of images, the most usual first."""

_NAMED = 3
_OTHERWISE = (
    "Tensors alone do not say which network of timm or of a plug-in they are: give the folder of "
    "its run, or what partialfc export --huggingface writes"
)


@dataclass(frozen=True, slots=True)
class Known:
    """A backbone that is recognised by the names and shapes of its tensors.

    Attributes:
        name: A key of ``BACKBONES``.
        embedding_dim: D.
        image_size: S in pixels.
        options: Further keywords of its constructor; a file of weights says none.
    """

    name: str
    embedding_dim: int
    image_size: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


def recognise(state: Mapping[str, Tensor], path: Path, *, image_size: int = 112) -> Known:
    """Return which backbone has exactly these tensors, in any order.

    Args:
        state: Tensors by name.
        path: Where they come from, for errors.
        image_size: Of the images that it was trained on, in pixels.

    Raises:
        ForeignError: If none has; the message names the nearest and where it differs.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    entries = ("running_var", "weight")  # which of them is missing is said below
    ends = [found.get(f"{norm}.{entry}", ()) for norm in _LAST_NORMS for entry in entries]
    dim = next((end[0] for end in ends if len(end) == 1 and 1 <= end[0] <= _LARGEST_DIM), 0)
    for name in _candidates(found) if dim else ():
        known = Known(name, dim, image_size)
        fits = _names(name) == found.keys() and not refused_size(name, image_size)
        if fits and shapes(known) == found:
            return known
    nearest = _nearest(found, dim, image_size) if dim else None
    raise ForeignError(f"{path}: {_reason(nearest, found, image_size)}.")


def _candidates(found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The backbones that it can be: to build iresnet2060 takes seconds, even without memory."""
    return [name for name in BACKBONES if name != "iresnet2060" or _OF_R2060 in found]


def _nearest(found: Mapping[str, tuple[int, ...]], dim: int, image_size: int) -> Known | None:
    """The backbone whose names differ least, and of several the one with the most equal shapes."""
    differing = {name: len(_names(name) ^ found.keys()) for name in _candidates(found)}
    least = min(differing.values())
    if least > len(found):  # it only happens to have some names in common
        return None
    near = [
        Known(name, dim, _SIZES[0] if refused_size(name, image_size) else image_size)
        for name, number in differing.items()
        if number == least
    ]
    return max(near, key=lambda known: len(shapes(known).items() & found.items()))


@cache
def _names(name: str) -> frozenset[str]:
    """Names of a backbone's tensors, the same at any dimension and size; built once a process."""
    return frozenset(shapes(Known(name, 1, _SIZES[0])))


def _reason(nearest: Known | None, found: Mapping[str, tuple[int, ...]], image_size: int) -> str:
    if nearest is None:
        return (
            f"its {len(found)} tensors ({_some([*found])}) are of no backbone that is known here. "
            f"The backbones are: {', '.join(BACKBONES)}. {_OTHERWISE}"
        )
    name, dim = nearest.name, nearest.embedding_dim
    for size in _SIZES:
        if refused_size(name, size) is None and shapes(Known(name, dim, size)) == found:
            return (
                f"it is {name} for images of {size} pixels, not of {image_size}; --image-size, in "
                "settings data.image_size, says which"
            )
    return (
        f"no backbone for images of {image_size} pixels has these {len(found)} tensors. The "
        f"nearest is {name}: {difference(shapes(nearest), found)}. The backbones are: "
        f"{', '.join(BACKBONES)}. {_OTHERWISE}"
    )


def shapes(known: Known) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a backbone's state_dict, in its order; nothing is allocated."""
    with torch.device("meta"):
        state = build(known).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def build(known: Known) -> nn.Module:
    """Return the backbone, freshly initialised."""
    return build_backbone(
        known.name,
        embedding_dim=known.embedding_dim,
        image_size=known.image_size,
        **known.options,
    )


def difference(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words which entries are of another shape, missing or too many, some by name."""
    other = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    kinds = ((other, "of another shape"), (missing, "missing"), (extra, "too many"))
    parts = [
        f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {kind} ({_some(names)})"
        for names, kind in kinds
        if names
    ]
    return "; ".join(parts) or "they are equal"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
