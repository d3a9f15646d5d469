"""timm, imported with or without torchvision.

timm's networks use nothing of torchvision; timm's image transforms and data sets, which it imports
with them, do. torchvision has to be of the same build as torch: one from another index ends in
``operator torchvision::nms does not exist``. Where it does not import, stand-ins with the names
that timm asks for are in ``sys.modules`` while timm is imported, and no longer: whoever else
imports torchvision gets its own error. A stand-in that is used says what is missing.
"""

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

_STAND_INS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@cache
def timm() -> Any:
    """Return timm, imported once.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except Exception:  # another build of torch: RuntimeError or OSError, not only ImportError
        before = _taken_out()
        sys.modules.update(_stand_ins())
        try:
            return importlib.import_module("timm")
        finally:
            _taken_out()
            sys.modules.update(before)
    return importlib.import_module("timm")


def _taken_out() -> dict[str, ModuleType]:
    """Take torchvision, or what is left of a failed import, out of ``sys.modules``; return it."""
    names = [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
    return {name: sys.modules.pop(name) for name in names}


def _stand_ins() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {name: _StandIn(name) for name in _STAND_INS}
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    return modules


class _StandIn(ModuleType):
    """A module in which every name is a class that cannot be made."""

    __path__: list[str] = []  # noqa: RUF012  (a module's own attribute: it is a package)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name, (), {"__module__": self.__name__})


class _Missing(type):
    """A class by name; its attributes, such as those of an enum, are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *arguments: object, **keywords: object) -> Any:
        raise ImportError(
            f"{cls.__module__}.{cls.__name__}: torchvision does not import here. Install the one "
            "that belongs to this torch, from the same index."
        )
