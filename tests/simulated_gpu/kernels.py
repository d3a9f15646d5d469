"""Triton's interpreter on the memory of the simulated device, seen by the watch."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.simulated_gpu.watch import note_kernel

_stored: set[int] = set()
"""Addresses that the kernel that runs has written to: one of each store."""
_patched: set[int] = set()
"""Modules of Triton's language that are the interpreter's while the kernel runs."""


def interpret() -> None:
    """Let kernels be interpreted; needs ``TRITON_INTERPRET=1`` before Triton is imported."""
    from triton import language
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, dot, patch = executor.__call__, builder.create_dot, interpreter._patch_lang
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    @cache
    def seen_by(function: Any) -> frozenset[int]:
        seen = function.__globals__.values()
        return frozenset(id(one) for one in seen if one is language or one is language.core)

    def patch_once(function: Any) -> Any:
        """What a kernel calls sees the same: to patch it again takes half of the time."""
        if seen_by(function) <= _patched:
            return None
        _patched.update(seen_by(function))
        return patch(function)

    def run_watched(self: Any, *given: Any, **named: Any) -> None:
        _stored.clear()
        _patched.clear()
        with _disable_current_modes():
            run(self, *given, **named)
        tensors = [one for one in (*given, *named.values()) if isinstance(one, Tensor)]
        written = [tensor for tensor in tensors if _is_written(tensor)]
        note_kernel(self.fn.__name__, tensors, written)

    def to_host(self: Any, given: Any, named: Any) -> Any:
        """The same bytes, where the interpreter would copy them there and back."""
        for value in (*given, *named.values()):
            if isinstance(value, Tensor) and not value.is_cuda:
                raise ValueError(f"{self.fn.__name__} was given a pointer to the host's memory")
        return [_on_host(one) for one in given], {key: _on_host(one) for key, one in named.items()}

    def cast_rounded(self: Any, given: Any, into: Any, *how: Any) -> Any:
        """To the nearest bf16, ties to even, as a GPU; the interpreter cuts bits off."""
        if (given.dtype.scalar, into.scalar) != (float32, bfloat16):
            return (convert if how else cast)(self, given, into, *how)
        bits = given.data.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = np.where(np.isnan(given.data), bits >> 16 | 0x40, nearest)
        return interpreter.TensorHandle(kept.astype(np.uint16), bfloat16)

    def dot_of_bf16(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *how)

    def _widened(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16  # it keeps them as integers
        return interpreter.TensorHandle(bits.view(np.float32), float32)

    executor.__call__, executor._init_args_hst = run_watched, to_host
    executor._restore_args_dev = lambda *_: None
    interpreter._patch_lang = patch_once
    builder.create_dot = dot_of_bf16
    builder.cast_impl = builder.create_fp_to_fp = cast_rounded
    for name in ("create_masked_store", "create_atomic_rmw"):
        _note_stores(builder, name)


def _note_stores(builder: Any, name: str) -> None:
    store = getattr(builder, name)

    def noted(self: Any, *given: Any) -> Any:
        pointers, mask = (given[0], given[2]) if "store" in name else (given[1], given[3])
        where = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if where.size:
            _stored.add(int(where.flat[0]))
        return store(self, *given)

    setattr(builder, name, noted)


def _is_written(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    begin, size = storage.data_ptr(), storage.nbytes()
    return any(begin <= address < begin + size for address in _stored)


def _on_host(value: Any) -> Any:
    return torch.ops.simulated_gpu.on_host(value) if isinstance(value, Tensor) else value
