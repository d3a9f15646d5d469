"""Which operators make the host wait for a GPU, as torch's CUDA kernels do."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SIZED_BY_VALUES = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Their result, or its size, is known to the device alone."""


def why_host_waits(
    name: str, given: Sequence[Any], named: Mapping[str, Any], tensors: Sequence[Tensor]
) -> str | None:
    """Return why the host waits in an operator, or ``None``.

    Args:
        name: Of the operator, without its overload.
        given: Its arguments.
        named: Those by name.
        tensors: All tensors among them.
    """
    if name in ("_to_copy", "copy_"):
        return _why_copy_waits(name, given, named)
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    if name in _SIZED_BY_VALUES:
        return name
    if name == "repeat_interleave" and named.get("output_size") is None:
        return "repeat_interleave without output_size"
    if name == "isin" and not named.get("assume_unique"):
        return "isin without assume_unique"
    if name.removeprefix("_").startswith("index") and isinstance(given[1], list | tuple):
        return _why_index_waits(name, given)
    return None


def _why_index_waits(name: str, given: Sequence[Any]) -> str | None:
    indices = [index for index in given[1] if index is not None]
    if any(not index.is_cuda for index in indices):
        return f"{name} by a tensor of the host"
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        fills = name != "index" and len(indices) == 1 and given[2].numel() == 1
        return None if fills else f"{name} by a mask"
    return None


def _why_copy_waits(name: str, given: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    if name == "copy_":
        into, source = given[:2]
        goes_to, non_blocking = into.device, (*given[2:], named.get("non_blocking"))[0]
    else:
        into, source = None, given[0]
        goes_to = torch.device(named.get("device") or source.device)
        non_blocking = named.get("non_blocking")
    if {source.device.type, goes_to.type} != {"cpu", "cuda"}:
        return None
    # torch makes the copy on the host itself, pinned, where it is asked not to wait.
    on_host = into if source.is_cuda else source
    if non_blocking and (on_host is None or on_host.is_pinned()):
        return None
    memory = "pinned" if on_host is not None and on_host.is_pinned() else "pageable"
    return f"copy of {source.nbytes} B {'from' if source.is_cuda else 'to'} the device, {memory}"
