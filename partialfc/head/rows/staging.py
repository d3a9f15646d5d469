"""Rows of tensors in host memory, staged on the device while a step needs them.

A step touches its sampled rows only. They are gathered into compact tensors on the device, every
part of the head works on these as if they were a whole shard, and they are scattered back. A thread
gathers the next step's rows while this one runs, and writes the last step's rows back. Rows that
two steps in a row sample go from one compact tensor to the next on the device, so every step sees
what it would see without staging, bit for bit.

Shape suffixes: C = rows of a shard, n = sampled rows.
"""

import contextlib
import errno
import math
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.head.options import Memory
from partialfc.head.rows.stored import CENTERS
from partialfc.head.tiles.torch_steps import put_rows_, take_rows
from partialfc.pinned import to_device

_HUGE = 16 << 20
"""Bytes from which huge pages are asked for; smaller tensors are few pages anyway."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Some rows of every tensor.

    Attributes:
        rows: int64 [n], distinct, on the device.
        host_n: The same on the host.
        tensors: Compact ones [n, ...] on the device, by name.
    """

    rows: Tensor
    host_n: Tensor
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Rows on their way to the device for a step to come; how often rows were closed before."""

    step: int
    rows: Callable[[], Tensor | None]
    tensors: "Future[dict[str, Tensor]]"
    closed: int


class Staging:
    """The tensors of a rank that have the same rows, some of them in host memory.

    Args:
        tensors: [C, ...] by name, each on ``device`` or on the CPU; changed in place.
        in_host: Names of those whose rows a thread moves; the others lie on the device.
        device: Where the rows are needed.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], in_host: frozenset[str], device: torch.device
    ) -> None:
        self._tensors = dict(tensors)
        self._in_host, self._device = in_host, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._open: Staged | None = None
        self._last: Staged | None = None
        self._ahead: deque[_Ahead] = deque()
        self._writing: list[Future[None]] = []
        self._closed = 0

    @torch.inference_mode(False)  # training may ask for the same rows next
    def open(self, step: int, rows: Tensor, host_n: Tensor | None = None) -> dict[str, Tensor]:
        """Return the compact tensors of ``rows``; those opened before are closed.

        Waits for the rows only as far as :meth:`prefetch` has not brought them. May be changed in
        place until :meth:`close`, which makes the changes last. ``host_n`` is ``rows`` on the host;
        ``None``: they are fetched.
        """
        if self._open is not None and self._open.rows is rows:
            return self._open.tensors
        self.close()
        host_n = rows.cpu() if host_n is None else host_n  # host sync
        ahead = None
        while self._ahead and self._ahead[0].step <= step:
            ahead = self._ahead.popleft()  # the last for a step; what came before it is of no use
        # Of what was written since it was gathered, only the last rows are still here.
        fresh = ahead is not None and ahead.step == step and self._closed - ahead.closed <= 1
        if ahead is not None and fresh and _same(ahead.rows(), host_n):
            compact = self._arrived(ahead.tensors)
            if self._last is not None:
                _carry_over(self._last, host_n, compact)
        else:
            compact = self._arrived(self._gather(lambda: host_n))
        self._last = None
        for name, tensor in self._tensors.items():
            if name not in self._in_host:
                compact[name] = take_rows(tensor, rows, 0, len(rows))
        self._open = Staged(rows, host_n, {name: compact[name] for name in self._tensors})
        return self._open.tensors

    def prefetch(self, step: int, rows: Callable[[], Tensor | None]) -> None:
        """Begin to gather the rows of a step to come: of use if no others than those of the present
        one are open before.

        Args:
            step: Their step.
            rows: Returns them, on the host; the thread calls it.
        """
        self._ahead.append(_Ahead(step, rows, self._gather(rows), self._closed))

    def close(self) -> None:
        """Write the open rows back: at once on the device, by the thread to host memory."""
        staged, self._open = self._open, None
        if staged is None:
            return
        for name, tensor in self._tensors.items():
            if name not in self._in_host:
                put_rows_(tensor, staged.rows, staged.tensors[name])
        self._writing = [write for write in self._writing if not _finished(write)]
        self._writing.append(self._thread.submit(self._scatter, staged, self._event()))
        self._last = staged
        self._closed += 1

    def settle(self) -> None:
        """Close, wait until the host tensors hold everything, and forget what is gathered ahead."""
        self.close()
        for write in self._writing:
            write.result()
        self._writing = []
        self._ahead.clear()
        self._last = None

    def _gather(self, rows: Callable[[], Tensor | None]) -> "Future[dict[str, Tensor]]":
        return self._thread.submit(self._fetch, rows)

    def _fetch(self, wanted: Callable[[], Tensor | None]) -> dict[str, Tensor]:
        """On the thread, in the order of the calls: after every scatter that was asked for."""
        found, rows = {}, wanted()
        assert rows is not None, "rows lie in host memory where a step has some of them"
        with self._on_own_stream():
            for name in self._in_host:
                tensor = self._tensors[name]
                size = (len(rows), *tensor.shape[1:])
                compact = torch.empty(size, dtype=tensor.dtype, pin_memory=self._stream is not None)
                take_rows(tensor, rows, 0, len(rows), out=compact)
                found[name] = compact.to(self._device, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return found

    def _arrived(self, gathered: "Future[dict[str, Tensor]]") -> dict[str, Tensor]:
        compact = gathered.result()
        if self._stream is not None:
            for tensor in compact.values():
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return compact

    def _scatter(self, staged: Staged, ready: Any) -> None:
        with self._on_own_stream():
            if self._stream is not None:
                self._stream.wait_event(ready)
            for name in self._in_host:
                compact = staged.tensors[name]
                if self._stream is not None:
                    there = torch.empty_like(compact, device="cpu", pin_memory=True)
                    compact = there.copy_(compact, non_blocking=True)
                    self._stream.synchronize()
                put_rows_(self._tensors[name], staged.host_n, compact)

    def _on_own_stream(self) -> contextlib.AbstractContextManager[Any]:
        """On a GPU, a stream of the thread's own."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self) -> Any:
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()


def zero_rows(
    name: str, size: Sequence[int], dtype: torch.dtype, memory: Memory, device: torch.device
) -> Tensor:
    """Return zeros [C, ...] where ``memory`` has centers, or what else they are the state of.

    Raises:
        ValueError: As :func:`host_tensor` does.
    """
    where = memory.centers_in if name == CENTERS else memory.states_in
    if where == "host":
        return host_tensor(name, size, dtype, memory.host_folder, pinned=device.type == "cuda")
    return row_tensor(size, dtype, device)


def row_tensor(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros [C, ...] on a device; in huge pages on a CPU that has them.

    A step reads and writes rows all over them: with pages of 4 KiB, a CPU looks up nearly every one
    in tables that are not in its caches. All of the memory is there on return, so a host without
    room for it ends a run at its start, and no later step waits for the system to find pages.
    """
    size_bytes = math.prod(size) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None or size_bytes < _HUGE:
        return torch.zeros(*size, dtype=dtype, device=device)
    # Shared memory, which is mmap's default, gets huge pages by another setting, mostly off.
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype).view(*size).zero_()


def host_tensor(
    name: str, size: Sequence[int], dtype: torch.dtype, folder: Path | None, *, pinned: bool
) -> Tensor:
    """Return zeros in host memory: in a page-locked part of it, or mapped from a new file.

    Args:
        name: What it is, for messages.
        size: [C, ...].
        dtype: Any.
        folder: Of the file, whose name is nobody else's and is removed as soon as it is mapped, so
            that nothing is left of it when the process ends. ``None`` for memory.
        pinned: Whether to lock memory, for a GPU to copy from; torch takes the next power of two.

    Raises:
        ValueError: If the file cannot be made or has no room. It is reserved at once: without it, a
            write to the mapping would end the process.
    """
    if folder is None and pinned:
        return torch.zeros(*size, dtype=dtype, pin_memory=True)
    if folder is None:
        return row_tensor(size, dtype, torch.device("cpu"))
    count = math.prod(size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f"{name}_", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
            mapped = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        more = " Choose a folder with more room." if error.errno == errno.ENOSPC else ""
        raise ValueError(
            f"host_folder = {str(folder)!r}: {count * dtype.itemsize:,} bytes of {name} cannot be "
            f"had there: {error.strerror}.{more}"
        ) from error
    return mapped.view(*size)


def _same(host_n: Tensor | None, other_n: Tensor) -> bool:
    return host_n is not None and torch.equal(host_n, other_n)


def _carry_over(last: Staged, host_n: Tensor, compact: dict[str, Tensor]) -> None:
    """Take the rows that the last step had too from there: the host's may be older."""
    if not len(last.host_n) or not len(host_n):
        return
    sorted_n, order_n = last.host_n.sort()
    place_n = torch.searchsorted(sorted_n, host_n).clamp(max=len(sorted_n) - 1)
    (both,) = (sorted_n[place_n] == host_n).nonzero(as_tuple=True)
    source = order_n[place_n[both]]
    for name, tensor in compact.items():
        there, here = (to_device(one, tensor.device) for one in (both, source))
        put_rows_(tensor, there, take_rows(last.tensors[name], here, 0, len(here)))


def _finished(write: "Future[None]") -> bool:
    """Whether it is done; raises what went wrong."""
    return write.done() and write.result() is None
