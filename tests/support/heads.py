"""Heads whose options are given one by one, as a test compares them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest

from partialfc import Kernels, Memory, PartialFC, Precision
from partialfc.head import machine
from partialfc.head.tiles import fused, passes

_GROUPS = {"precision": Precision, "memory": Memory, "kernels": Kernels}


def flat_head(*arguments, **settings) -> PartialFC:
    """Return ``PartialFC(...)``, with the options of its groups by their own names."""
    groups = {}
    for name, group in _GROUPS.items():
        own = {field.name for field in fields(group)} & settings.keys()
        groups[name] = group(**{option: settings.pop(option) for option in own})
    return PartialFC(*arguments, **groups, **settings)


@contextmanager
def small_tiles(*, kernels: bool, rows: int = 64, programs: int = 4) -> Iterator[None]:
    """Inside, heads have tiles of so few rows, and kernels on any device where they are wanted.

    Pass 1 of the fused kernels is cut as for a GPU of so few multiprocessors. Of the programs for
    132, nearly all would have no classes of a small tile, and the interpreter runs each.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "FORCED", kernels)
        patch.setattr(fused, "_TILE_ROWS", rows)
        card = replace(machine.card_of(None), multiprocessors=programs)
        patch.setattr(machine, "ASSUMED", card)
        patch.setattr(passes, "_TILE_ROWS", rows)
        yield
