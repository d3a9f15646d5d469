"""Triton's interpreter on the memory of the simulated device, seen by the watch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.simulated_gpu.watch import note_kernel

_stored: set[int] = set()
"""Addresses that the kernel that runs has written to: one of each store."""


def interpret() -> None:
    """Let kernels be interpreted; needs ``TRITON_INTERPRET=1`` before Triton is imported."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, dot = executor.__call__, builder.create_dot

    def run_watched(self: Any, *given: Any, **named: Any) -> None:
        _stored.clear()
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

    def dot_of_bf16(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *how)

    def _widened(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16  # it keeps them as integers
        return interpreter.TensorHandle(bits.view(np.float32), float32)

    executor.__call__, executor._init_args_hst = run_watched, to_host
    executor._restore_args_dev = lambda *_: None
    builder.create_dot = dot_of_bf16
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
