"""A simulated CUDA device: ``install()`` makes ``cuda`` a device of this process.

What asks ``tensor.is_cuda`` or ``torch.cuda`` then goes the way of a GPU with real numbers, an
operator that mixes two devices fails, and :class:`~tests.simulated_gpu.watch.Watch` sees where the
host waits and what is in no order. Triton's kernels run in its interpreter with
``TRITON_INTERPRET=1``; without it, Triton is not there.
"""

import contextlib
import os
import sys
from types import SimpleNamespace
from typing import Any

from tests.simulated_gpu import library

_GIB = 1 << 30
_CAPABILITY = (9, 0)


def install() -> None:
    """Make ``cuda`` a device of this process, once.

    Raises:
        RuntimeError: If torch is imported already, or the library cannot be built.
    """
    if library.loaded:
        return
    library.load()
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if not interprets:
        sys.modules["triton"] = None
    import torch

    from tests.simulated_gpu import watch

    _answer(torch.cuda)
    _order(torch, watch)
    _factories(torch, watch)
    torch.Generator = _generator(torch)
    watch.follow_executors()
    if interprets:
        from tests.simulated_gpu.kernels import interpret

        interpret()


def _answer(cuda: Any) -> None:
    """What torch.cuda says of a GPU of 80 GiB that nobody else uses; its memory is not counted."""
    properties = SimpleNamespace(
        name="simulated GPU",
        total_memory=80 * _GIB,
        multi_processor_count=132,
        major=_CAPABILITY[0],
        minor=_CAPABILITY[1],
        L2_cache_size=50 << 20,
        uuid="simulated",
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=227 << 10,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": _CAPABILITY,
        "get_device_properties": properties,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    for nothing in ("init", "_lazy_init", "set_device", "empty_cache", "ipc_collect"):
        answers[nothing] = None
    for nothing in ("manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
        answers[nothing] = None
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    cuda._lazy_call = lambda call, **_: None
    cuda.device = lambda which: contextlib.nullcontext()


def _order(torch: Any, watch: Any) -> None:
    """Streams, events, and what waits for them."""
    from tests.simulated_gpu import order

    cuda = torch.cuda
    cuda.Stream = cuda.streams.Stream = order.Stream
    cuda.Event = cuda.streams.Event = order.Event
    cuda.stream, cuda.set_stream = order.on_stream, order.set_stream
    cuda.current_stream, cuda.default_stream = order.current_stream, order.default_stream
    cuda.synchronize = order.synchronize
    torch.Tensor.record_stream = watch.record_stream
    torch.Tensor.numpy = _read(torch.Tensor.numpy, watch)

    def set_sync_debug_mode(mode: int | str) -> None:
        watch.raises_at_waits = mode in (2, "error")

    cuda.set_sync_debug_mode = set_sync_debug_mode


def _read(numpy: Any, watch: Any) -> Any:
    def read(self: Any, **named: Any) -> Any:
        watch.note_read(self)
        return numpy(self, **named)

    return read


def _factories(torch: Any, watch: Any) -> None:
    """Numbers of the host that become a tensor of the device: the host waits for their copy."""
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        setattr(owner, name, _copying(getattr(owner, name), name, watch))


def _copying(make: Any, name: str, watch: Any) -> Any:
    def made(*given: Any, **named: Any) -> Any:
        tensor = make(*given, **named)
        if tensor.is_cuda and not hasattr(given[-1], "is_cuda"):
            watch.note_wait(f"{name} of the host's numbers on the device")
        return tensor

    return made


def _generator(torch: Any) -> type:
    class Generator(torch._C.Generator):
        """The host's, whatever device it says: other numbers than a GPU's."""

        def __new__(cls, device: Any = "cpu") -> "Generator":
            made = super().__new__(cls, device="cpu")
            made._said = torch.device(device)
            return made

        @property
        def device(self) -> Any:
            """Where it was asked for."""
            return torch.device("cuda", 0) if self._said.type == "cuda" else self._said

    return Generator
