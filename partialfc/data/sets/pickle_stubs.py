"""Inert stand-ins for the few globals that a pickled verification set names.

Pickles of JPEG bytes and of numpy arrays call six functions. Here each is a member of
:class:`Stub`, and :func:`call` and :func:`set_state` do by hand what the six would have done to
arguments of exactly the expected form. Nothing is looked up, imported or called by name.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np


class Refused(ValueError):
    """A rule that the pickle breaks; the machine adds file, offset and opcode."""


class Stub(Enum):
    """A global that a pickle may name."""

    ENCODE = "_codecs.encode: how Python 3 writes bytes at protocols 0 to 2"
    RECONSTRUCT = "numpy's _reconstruct: an empty array, filled by BUILD"
    FROMBUFFER = "numpy's _frombuffer: an array at protocol 5"
    SCALAR = "numpy's scalar: one element of an array"
    NDARRAY = "numpy.ndarray, an argument of _reconstruct"
    DTYPE = "numpy.dtype"


class Dtype(Enum):
    """What ``numpy.dtype(...)`` returns: of images, and of what says yes or no."""

    UINT8 = "u1"
    BOOL = "b1"
    INT32 = "i4"
    INT64 = "i8"


@dataclass(slots=True)
class Array:
    """What stands for a numpy array; empty until it is filled, which happens once.

    Attributes:
        values: Read-only view of ``data``: uint8 [n] or [H, W, 3], bool [n], whose bytes may be
            other than 0 and 1, or little-endian int32 or int64 [n].
        data: The bytes of the array, as they lie in the file.
    """

    values: np.ndarray | None = None
    data: bytes = b""


_SHAPES = "an array must be uint8 [H, W, 3], uint8 [n] or [n, 1], or bool or integers [n]"

_GLOBALS = {
    ("_codecs", "encode"): Stub.ENCODE,
    ("numpy", "ndarray"): Stub.NDARRAY,
    ("numpy", "dtype"): Stub.DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): Stub.RECONSTRUCT,  # numpy 1
    ("numpy.core.multiarray", "scalar"): Stub.SCALAR,
    ("numpy.core.numeric", "_frombuffer"): Stub.FROMBUFFER,
    ("numpy._core.multiarray", "_reconstruct"): Stub.RECONSTRUCT,  # numpy 2
    ("numpy._core.multiarray", "scalar"): Stub.SCALAR,
    ("numpy._core.numeric", "_frombuffer"): Stub.FROMBUFFER,
}


def find(module: object, name: object) -> Stub:
    """Return the stub of a global.

    Raises:
        Refused: If it is not one of the six.
    """
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("a global must be named by two texts")
    if (module, name) not in _GLOBALS:
        raise Refused(f"the global {module[:64]!r} {name[:64]!r} is not on the list")
    return _GLOBALS[module, name]


def call(function: object, arguments: object) -> bytes | int | Dtype | Array:
    """Return what the global behind ``function`` would have returned; for REDUCE.

    Raises:
        Refused: If ``function`` is no stub, or the arguments have another form.
    """
    match function, arguments:
        case Stub.ENCODE, (str(text), "latin1"):
            return _latin1(text)
        case Stub.DTYPE, (("u1" | "b1" | "i4" | "i8") as code, 0, 1):
            return Dtype(code)
        case Stub.DTYPE, ((b"u1" | b"b1" | b"i4" | b"i8") as code, 0, 1):
            return Dtype(code.decode())
        case Stub.RECONSTRUCT, (Stub.NDARRAY, (0,), "b" | b"b"):
            return Array()
        case Stub.FROMBUFFER, (bytes(data), Dtype() as dtype, shape, "C" | "F" as order):
            array = Array()
            _fill(array, dtype, shape, order, data)
            return array
        case Stub.SCALAR, (Dtype.BOOL, b"\0" | b"\1" as data):
            return data == b"\1"
        case Stub.SCALAR, (
            (Dtype.UINT8 | Dtype.INT32 | Dtype.INT64) as dtype,
            bytes(data),
        ) if len(data) == _numpy(dtype).itemsize:
            return int(np.frombuffer(data, _numpy(dtype))[0])
    raise Refused("this call is not part of an image or of an array of yes and no")


def set_state(target: object, state: object) -> None:
    """Fill an empty array, or accept the state of a dtype, which says nothing new; for BUILD.

    Raises:
        Refused: If the target is anything else, or the state has another form.
    """
    match target, state:
        case Dtype() as dtype, (3, order, None, None, None, -1, -1, 0):
            if order not in (("|", b"|") if _numpy(dtype).itemsize == 1 else ("<", b"<")):
                raise Refused("the numbers of an array must be little-endian")
        case Array(values=None) as array, (
            1,
            shape,
            Dtype() as dtype,
            0 | 1 as fortran,
            bytes(data),
        ):
            _fill(array, dtype, shape, "F" if fortran else "C", data)
        case _:
            raise Refused("this state is not that of an image or of an array of yes and no")


def _latin1(text: str) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeError:
        raise Refused("the text holds characters outside latin1") from None


def _fill(array: Array, dtype: Dtype, shape: object, order: Literal["C", "F"], data: bytes) -> None:
    # The length first: a loop over a long shape that many calls share would take quadratic time.
    if not (isinstance(shape, tuple) and len(shape) in (1, 2, 3)):
        raise Refused(_SHAPES)
    if not all(type(length) is int and length >= 0 for length in shape):
        raise Refused("the lengths of an array must be integers >= 0")
    if len(shape) == 3 and (dtype is not Dtype.UINT8 or shape[2] != 3):
        raise Refused(_SHAPES)
    if len(shape) == 2:  # a column or a row, as cv2.imencode returns it
        if 1 not in shape:
            raise Refused(_SHAPES)
        shape = (math.prod(shape),)
    if math.prod(shape) * _numpy(dtype).itemsize != len(data):
        raise Refused(f"an array of shape {shape} cannot have {len(data)} bytes")
    array.values = np.frombuffer(data, _numpy(dtype)).reshape(shape, order=order)
    array.data = data


def _numpy(dtype: Dtype) -> "np.dtype[np.generic]":
    return np.dtype(f"<{dtype.value}")
