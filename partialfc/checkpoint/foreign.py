"""Files that other programs wrote with torch.save: read as data, never run; and whose backbone.

``torch.load`` with ``weights_only`` makes tensors, numbers, strings, lists and dicts, and refuses
all else. What comes out is a stranger's: every reader here checks it before it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from partialfc.backbones import BACKBONES, build_backbone
from partialfc.errors import ForeignError

_IN_A_CHECKPOINT = "state_dict_backbone"
_REMEDY = "give a model.pt, backbone.pth, checkpoint_gpu_*.pt or .safetensors of a backbone"


@dataclass(frozen=True, slots=True)
class Known:
    """A backbone that is recognised by the names and shapes of its tensors.

    Attributes:
        name: A key of ``BACKBONES``.
        embedding_dim: D.
        image_size: S in pixels.
    """

    name: str
    embedding_dim: int
    image_size: int


def read(path: Path) -> Any:
    """Return what ``torch.save`` wrote, on the CPU; tensors are mapped from the file if possible.

    Raises:
        ForeignError: If the file is damaged, or asks for anything that is not data.
    """
    problem: Exception | None = None
    for mapped in (True, False):  # files from before torch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except FileNotFoundError:
            raise ForeignError(f"{path}: there is no such file.") from None
        except Exception as error:  # a hostile file can make a reader fail in any way
            problem = error
    reason = str(problem).strip().split("\n")[0]
    raise ForeignError(
        f"{path}: not a file of tensors and plain values: {type(problem).__name__}: {reason} "
        "Nothing in it was run. Save the state_dict alone with the program that made it."
    ) from problem


def read_backbone(path: Path) -> dict[str, Tensor]:
    """Return the state_dict of a backbone, in its own order, from any file that holds one.

    Raises:
        ForeignError: If there is none in it.
    """
    if path.suffix == ".safetensors":
        try:
            value: Any = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ForeignError(f"{path}: {error}") from error
    else:
        value = read(path)
    if isinstance(value, Mapping) and _IN_A_CHECKPOINT in value:
        value = value[_IN_A_CHECKPOINT]
    return tensors(value, path)


def tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """Return a state_dict with the prefix that DistributedDataParallel adds taken off.

    Raises:
        ForeignError: If it is anything else than tensors by name.
    """
    if not isinstance(value, Mapping) or not value:
        raise ForeignError(f"{path}: holds {_kind(value)}, must be tensors by name; {_REMEDY}.")
    wrapped = all(isinstance(name, str) and name.startswith("module.") for name in value)
    state = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ForeignError(f"{path}: its entry {name!r} is {_kind(tensor)}, must be a tensor.")
        state[name.removeprefix("module.") if wrapped else name] = tensor
    return state


def recognise(state: Mapping[str, Tensor], path: Path, *, image_size: int = 112) -> Known:
    """Return which backbone has exactly these tensors.

    Args:
        state: Tensors by name.
        path: Where they come from, for errors.
        image_size: Of the images that it was trained on, in pixels.

    Raises:
        ForeignError: If none has; the message names the nearest and where it differs.
    """
    vectors = [tensor for tensor in state.values() if tensor.ndim == 1]
    dim = len(vectors[-1]) if vectors else 0
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    nearest, most = "", -1
    for name in BACKBONES if 1 <= dim <= 4096 else ():
        wanted = shapes(Known(name, dim, image_size))
        if wanted == found:
            return Known(name, dim, image_size)
        equal = len(wanted.items() & found.items())
        if equal > most:
            nearest, most = name, equal
    if not nearest:
        raise ForeignError(f"{path}: it has no vector of 1 to 4096 elements at its end; {_REMEDY}.")
    raise ForeignError(
        f"{path}: no backbone for images of {image_size} pixels has these {len(found)} tensors. "
        f"The nearest is {nearest}: {difference(shapes(Known(nearest, dim, image_size)), found)}. "
        f"The backbones are: {', '.join(BACKBONES)}."
    )


def shapes(known: Known) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a backbone's state_dict; nothing is allocated."""
    with torch.device("meta"):
        state = build(known).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def build(known: Known) -> nn.Module:
    """Return the backbone, freshly initialised."""
    return build_backbone(
        known.name, embedding_dim=known.embedding_dim, image_size=known.image_size
    )


def difference(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words the first entry that is missing, extra or of another shape."""
    for name, shape in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape:
            return f"{name} is {list(found[name])}, must be {list(shape)}"
    extra = next((name for name in found if name not in wanted), None)
    return f"{extra} is one too many" if extra else "they are equal"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
