"""Numbers of numpy in a file of torch, as Python's: trainers keep a best accuracy as np.float64.

A pickle names ``numpy.dtype`` and ``scalar``; what stands in their place here knows numbers of up
to 8 bytes and calls nothing of numpy.
"""

import struct
from typing import Any

from partialfc.errors import ForeignError

_FORMATS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
"""Of :mod:`struct`, by numpy's code."""


class _Kind:
    """In place of ``numpy.dtype``: the code of a number and its byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in _FORMATS:
            raise ForeignError(f"it holds a value of numpy of kind {code!r}, which is no number")
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise ForeignError("it holds a number of numpy without its byte order")
        self.order = ">" if order == ">" else "<"


def _number(kind: Any = None, data: object = None, *_: object) -> float | int | bool:
    """In place of numpy's ``scalar``: the number that some bytes are."""
    if not isinstance(kind, _Kind) or not isinstance(data, bytes):
        raise ForeignError("it holds an object of numpy that is no number")
    layout = struct.Struct(kind.order + _FORMATS[kind.code])
    if len(data) != layout.size:
        raise ForeignError(f"it holds a number of numpy of {len(data)} bytes, not {layout.size}")
    value: float | int | bool = layout.unpack(data)[0]
    return value


ALLOWED: list[Any] = [
    (_Kind, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),  # of numpy 1
]
"""For :class:`torch.serialization.safe_globals`."""
