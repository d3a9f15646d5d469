"""Files of tensors that other programs wrote: read as data, never run, and checked before use.

``torch.load`` with ``weights_only`` makes tensors, numbers, strings, lists and dicts, and refuses
all else. What comes out is a stranger's: that a tensor has the values it says it has, that they are
finite, and that the file is as it was written is looked at here.
"""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from partialfc.checkpoint import cvlface, numpy_numbers
from partialfc.errors import ForeignError, near
from partialfc.writing import opened

_HOLDERS = ("state_dict_backbone", "backbone", "state_dict", "model_state_dict", "model", "net")
"""Entries of a larger checkpoint that may hold the backbone's state_dict."""

_WRAPPERS = re.compile(r"^(?:(?:module|backbone|model|net)\.)+")
"""What DistributedDataParallel and programs with a larger model put before a name; torch.compile's
``_orig_mod.`` may stand anywhere in it."""

BACKBONES_IN_FOLDERS = (
    *("model.pt", "backbone.pth", "backbone.pt", "model.safetensors"),
    *("pretrained_model/model.safetensors", "pretrained_model/model.pt"),
)
"""Where arcface_torch, CVLface, the Hugging Face hub and we put a backbone; the first is taken."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
"""Of weights and statistics, and of BatchNorm's counter."""

_REMEDY = "give a model.pt, backbone.pth, checkpoint_gpu_*.pt or .safetensors of a backbone"
_CHUNK = 1 << 24
_MOST_TIMES_LARGER = 64
"""Weights hardly compress, and states that are 0 do so a thousandfold; a bomb is nothing else."""


def read(path: Path) -> Any:
    """Return what ``torch.save`` wrote, on the CPU; tensors are mapped from the file if possible.

    Raises:
        ForeignError: If it is no file, is damaged, or asks for anything that is not data.
    """
    _regular(path)
    try:
        packed = _checked_zip(path)
        # A compressed record cannot be mapped, nor can files from before torch 1.6.
        mapped = packed is not None and not packed.compressed
        with torch.serialization.safe_globals(numpy_numbers.ALLOWED):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if packed is not None:
            _check_storages(value, packed.sizes)
    except Exception as error:  # a hostile file can make a reader fail in any way
        raise ForeignError(
            f"{path}: not a file of tensors and plain values: {_in_words(error)}. Nothing in it "
            "was run. Save the state_dict alone with the program that made it."
        ) from None  # torch's words advise to load it unsafely
    return value


def read_backbone(path: Path) -> dict[str, Tensor]:
    """Return the state_dict of a backbone in fp32, in its own order, from any file that holds one.

    Raises:
        ForeignError: If there is none in it.
    """
    return cvlface.as_ours(tensors(_content(path), path), path)


def backbone_in(folder: Path) -> Path | None:
    """Return the file of a backbone in somebody's folder; ``None`` if there is none."""
    return next((folder / n for n in BACKBONES_IN_FOLDERS if (folder / n).is_file()), None)


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return read(path)
    _regular(path)
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ForeignError(f"{path}: not a file of safetensors: {error}.") from error


def tensors(value: Any, path: Path) -> dict[str, Tensor]:
    """Return a state_dict in fp32, with the prefixes that wrappers add to the names taken off.

    Args:
        value: The state_dict, or a larger checkpoint with an entry that is one.
        path: Where it comes from, for errors.

    Raises:
        ForeignError: If it is anything else than tensors by name, or one is of no use.
    """
    if isinstance(value, Mapping):
        held = (value[name] for name in _HOLDERS if isinstance(value.get(name), Mapping))
        value = next(held, value)
    if not isinstance(value, Mapping) or not value:
        raise ForeignError(f"{path}: holds {_kind(value)}, must be tensors by name; {_REMEDY}.")
    state: dict[str, Tensor] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ForeignError(f"{path}: its entry {name!r} is {_kind(tensor)}, must be a tensor.")
        bare = _bare(name)
        if bare in state:
            raise ForeignError(f"{path}: {name} is there twice, under two prefixes; {_REMEDY}.")
        state[bare] = _usable(tensor, f"{path}: {name}")
    if bad := [name for name, tensor in state.items() if not _finite(tensor)]:
        raise ForeignError(
            f"{path}: {len(bad)} of {len(state)} tensors hold values that are not finite: "
            f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}. Its training diverged, or the "
            "file is damaged: take an earlier one."
        )
    return state


def matrix(value: Any, path: Path) -> Tensor:
    """Return a matrix [identities, embedding] in fp32 that was checked like a backbone's tensors.

    Raises:
        ForeignError: If it is none, or of no use.
    """
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ForeignError(f"{path}: must hold a matrix [identities, embedding], got {shape}.")
    return finite(value, f"{path}: its matrix")


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return floating numbers as fp32, and integers as they are.

    Raises:
        ForeignError: If it has not all its values, or one is not finite; ``what`` it is.
    """
    usable = _usable(tensor, what)
    if not _finite(usable):
        raise ForeignError(f"{what} holds values that are not finite.")
    return usable


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name.replace("_orig_mod.", ""))


def _usable(tensor: Tensor, what: str) -> Tensor:
    """Return floating numbers as fp32, and integers as they are."""
    kind = None
    if tensor.is_meta:
        kind = "on the meta device: it has a shape and no values"
    elif tensor.layout != torch.strided:
        kind = f"sparse ({tensor.layout})"
    elif tensor.dtype not in _DTYPES:
        kind = f"of {tensor.dtype}"
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        kind = f"{tensor.numel():,} numbers of which fewer are stored"
    if kind is not None:
        raise ForeignError(
            f"{what} is {kind}; must be dense, with all its values, in fp16, bf16, fp32 or fp64. "
            "Save it again with the program that made it."
        )
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def _finite(tensor: Tensor) -> bool:
    parts = torch.split(tensor.reshape(-1), _CHUNK)
    return all(bool(part.isfinite().all()) for part in parts)


def _regular(path: Path) -> None:
    try:
        os.close(opened(path, os.O_RDONLY))
    except FileNotFoundError:
        raise ForeignError(f"{path}: there is no such file. {near(path)}") from None
    except OSError as error:
        raise ForeignError(f"{path}: {error.strerror}; {_REMEDY}.") from error


@dataclass(frozen=True, slots=True)
class _Zip:
    """Bytes of each record, unpacked, and whether any of them is compressed."""

    sizes: Counter[int]
    compressed: bool


def _checked_zip(path: Path) -> _Zip | None:
    """Look through the records of a file of torch 1.6 or later, which is a zip, with their CRCs.

    Raises:
        ForeignError: If a record is not as it was written, or they unpack to a bomb.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("constants.pkl") for member in members):
            raise ForeignError("it is a TorchScript archive, which is a program")
        unpacked = sum(member.file_size for member in members)
        if unpacked > _MOST_TIMES_LARGER * path.stat().st_size:
            raise ForeignError(
                f"it unpacks to {unpacked:,} bytes, more than {_MOST_TIMES_LARGER} times its own"
            )
        if bad := archive.testzip():
            raise ForeignError(f"its part {bad} is damaged: its checksum is another (CRC)")
    return _Zip(
        Counter(member.file_size for member in members),
        any(member.compress_type != zipfile.ZIP_STORED for member in members),
    )


def _check_storages(value: Any, sizes: Counter[int]) -> None:
    """Refuse tensors that say they have more bytes than the record that they are read from."""
    found = {}
    for tensor in _tensors_in(value):
        if tensor.layout == torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    if Counter(size for size in found.values() if size) - sizes:
        raise ForeignError("a tensor has other bytes than the file has for it")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    seen, stack = set(), [value]
    while stack:
        one = stack.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            stack += one.values() if isinstance(one, Mapping) else one


def _in_words(error: Exception) -> str:
    """What is wrong with a file, without torch's advice to load it all the same."""
    if isinstance(error, ForeignError):
        return str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds an object of {wanted[1]}, and tensors, numbers, text, lists and dicts alone "
            "are read"
        )
    return f"it is damaged or of another format ({type(error).__name__})"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
