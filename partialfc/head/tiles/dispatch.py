"""The module that has the steps of a tile for a path."""

from importlib import import_module
from types import ModuleType

from partialfc.head.plan import Path


def steps_of(path: Path) -> ModuleType:
    """Return the module with ``unit_rows`` and ``exponentials``; only torch's needs no Triton."""
    kind = "torch" if path == "torch" else "triton"
    return import_module(f"partialfc.head.tiles.{kind}_steps")
