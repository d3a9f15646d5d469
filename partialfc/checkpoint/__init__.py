"""Checkpoints of a run: write, find, check and read them on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partialfc.checkpoint.loading import (
        CONFIG_HASH,
        exist,
        load,
        named,
        newest,
        read_centers,
        read_tensors,
        save,
        verify,
    )
    from partialfc.checkpoint.saving import Saver
    from partialfc.errors import CheckpointError

__all__ = [
    "CONFIG_HASH",
    "CheckpointError",
    "Saver",
    "exist",
    "load",
    "named",
    "newest",
    "read_centers",
    "read_tensors",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: what looks at a folder needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("partialfc.checkpoint.loading"), name)
