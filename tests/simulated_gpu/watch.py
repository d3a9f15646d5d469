"""Sees what a program asks of the simulated device: where the host waits, and what is in no order.

    with Watch() as watch:
        train()
    assert not watch.waits and not watch.races

It is a mode of torch's dispatcher, on in this thread, in autograd's and in those of executors that
are given something to do inside.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated_gpu import order
from tests.simulated_gpu.order import LOCK, Act, Actor, Carried, current_stream, host, launch
from tests.simulated_gpu.waits import why_host_waits

_ROOT = Path(__file__).parents[2]
_OURS = tuple(str(_ROOT / folder) + "/" for folder in ("partialfc", "tests", "tools"))
_NOT_OURS = tuple(
    str(Path(__file__).with_name(f"{name}.py")) for name in ("device", "order", "watch")
)

_NO_LAUNCH = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "set_", "resize_"})
"""Operators that ask for memory only."""

_watch: "Watch | None" = None
raises_at_waits = False
"""``torch.cuda.set_sync_debug_mode("error")``."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A time that the host waited for the device.

    Attributes:
        why: In words.
        places: Files and functions of this repository that led to it, innermost first.
        thread: Name of the thread.
    """

    why: str
    places: tuple[tuple[str, str], ...]
    thread: str


@dataclass
class _Memory:
    """What was done to a storage."""

    made_by: Actor
    made_at: str
    write: Act | None = None
    reads: dict[Actor, Act] = field(default_factory=dict)
    recorded: set[Actor] = field(default_factory=set)

    @property
    def acts(self) -> list[Act]:
        """The last ones of each actor."""
        return [*self.reads.values(), *([self.write] if self.write else [])]


_memories: "weakref.WeakKeyDictionary[Any, _Memory]" = weakref.WeakKeyDictionary()


class Watch(TorchDispatchMode):
    """Watches the device inside a ``with``.

    Attributes:
        waits: Each time that the host waited.
        races: Accesses to the same memory that nothing puts in order, and memory that is given to
            another use while a stream may still be at it, as sentences.
        launches: Operators and kernels that ran on the device; torch may cut one of many tensors
            into a few.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.races: set[str] = set()
        self.launches = 0
        self._returned: list[_Memory] = []

    def __enter__(self) -> "Watch":
        global _watch
        if _watch is None:
            _watch = self
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        global _watch
        super().__exit__(*why)
        if _watch is self and threading.current_thread() is threading.main_thread():
            _watch = None

    def note_wait(self, why: str) -> None:
        """Note that the host waits.

        Raises:
            RuntimeError: If torch was told to raise there.
        """
        if raises_at_waits:
            raise RuntimeError(f"called a synchronizing CUDA operation: {why}, {_place()}")
        places = tuple((name, function) for name, _, function in _stack())
        self.waits.append(Wait(why, places, threading.current_thread().name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, operator = dict(kwargs or {}), _operator(func)
        reads, writes = operator.touched(args, named)
        why = why_host_waits(operator.name, args, named, reads + writes)
        if why:
            self.note_wait(why)
        result = func(*args, **named)
        if not operator.is_view:
            with LOCK:
                act = self._ran(operator.name, reads, writes + _tensors(result))
                if why:
                    host().follow(act.actor)
        return result

    def ran_kernel(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Take note of a kernel that is no operator of torch."""
        with LOCK:
            self._ran(name, reads, writes)

    def _ran(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> Act:
        place = _place()
        if any(tensor.is_cuda for tensor in reads + writes):
            act = launch(f"{name} at {place}")
            self.launches += name not in _NO_LAUNCH
        else:
            act = host().act(f"{name} at {place}")
        seen = set()
        for tensors, access in ((writes, self._write), (reads, self._read)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if id(storage) not in seen and storage.data_ptr():
                    seen.add(id(storage))
                    access(self._memory_of(storage, tensor.is_cuda, place), act)
        return act

    def _memory_of(self, storage: Any, is_cuda: bool, place: str) -> _Memory:
        memory = _memories.get(storage)
        if memory is None:
            actor = current_stream().actor if is_cuda else host()
            memory = _memories[storage] = _Memory(actor, place)
            if is_cuda:
                weakref.finalize(storage, self._give_back, memory).atexit = False
                self._give_out(memory)
        return memory

    def _write(self, memory: _Memory, act: Act) -> None:
        for other in memory.acts:
            if not act.actor.knows(other):
                self._race(f"{_did(act)} writes what {_did(other)} uses")
        memory.write, memory.reads = act, {}

    def _read(self, memory: _Memory, act: Act) -> None:
        if memory.write is not None and not act.actor.knows(memory.write):
            self._race(f"{_did(act)} reads what {_did(memory.write)} writes")
        memory.reads[act.actor] = act

    def _give_back(self, memory: _Memory) -> None:
        """The allocator of a stream has it again, and asks no streams but those recorded."""
        with LOCK:
            others = [
                act
                for act in memory.acts
                if act.actor not in (memory.made_by, *memory.recorded) and not act.is_over()
            ]
            if others:
                memory.write, memory.reads = None, {act.actor: act for act in others}
                self._returned.append(memory)

    def _give_out(self, memory: _Memory) -> None:
        """A stream gets memory: perhaps what it had before."""
        actor, kept = memory.made_by, []
        for old in self._returned:
            if old.made_by is not actor:
                kept.append(old)
                continue
            for act in old.acts:
                if not actor.knows(act) and not act.is_over():
                    self._race(
                        f"memory of {actor.name}, made at {old.made_at}, is given out again at "
                        f"{memory.made_at} while {_did(act)} may use it"
                    )
        self._returned = kept

    def _race(self, sentence: str) -> None:
        self.races.add(sentence)


def record_stream(tensor: Tensor, stream: order.Stream) -> None:
    """``Tensor.record_stream``: its memory is not given out again before the stream is done."""
    with LOCK:
        memory = _memories.get(tensor.untyped_storage())
        if memory is not None:
            memory.recorded.add(stream.actor)


def note_wait(why: str) -> None:
    """Tell the watch that the host waits, if there is one."""
    if _watch is not None:
        _watch.note_wait(why)


order.waits.append(note_wait)


def note_read(tensor: Tensor) -> None:
    """Tell the watch that the host reads a tensor without an operator, if there is one."""
    if _watch is not None:
        _watch.ran_kernel("numpy", [tensor], [])


def note_kernel(name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
    """Tell the watch of a kernel that is no operator of torch, if there is one."""
    if _watch is not None:
        _watch.ran_kernel(name, reads, writes)


def follow_executors() -> None:
    """Let executors' threads know what those knew who gave them work, and be watched too."""
    submit, result = ThreadPoolExecutor.submit, Future.result

    def submit_watched(
        self: Any, function: Callable[..., Any], /, *given: Any, **named: Any
    ) -> Any:
        carried = Carried(function if _watch is None else _watched(_watch, function))
        future: Any = submit(self, carried, *given, **named)
        future.after = carried.after
        return future

    def result_known(self: Any, timeout: float | None = None) -> Any:
        try:
            return result(self, timeout)
        finally:
            with LOCK:
                host().learn(getattr(self, "after", {}))

    ThreadPoolExecutor.submit, Future.result = submit_watched, result_known


def _watched(watch: Watch, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        if _watch is not watch:  # it has ended meanwhile
            return function(*given, **named)
        with watch:
            return function(*given, **named)

    return call


@dataclass(frozen=True, slots=True)
class _Operator:
    """What the watch wants to know of an operator.

    Attributes:
        name: Without its overload.
        is_view: Whether it touches no memory.
        arguments: Their names, and whether each is written to.
    """

    name: str
    is_view: bool
    arguments: tuple[tuple[str, bool], ...]

    def touched(self, given: Any, named: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that it reads, and those that it writes, of its arguments."""
        touched: tuple[list[Tensor], list[Tensor]] = [], []
        for i, (name, is_written) in enumerate(self.arguments):
            touched[is_written].extend(_tensors(given[i] if i < len(given) else named.get(name)))
        return touched


@cache
def _operator(func: Any) -> _Operator:
    schema = func._schema
    written = [
        (one.name, bool(one.alias_info and one.alias_info.is_write)) for one in schema.arguments
    ]
    returns = [one.alias_info is not None and not one.alias_info.is_write for one in schema.returns]
    return _Operator(schema.name.split("::")[1], bool(returns) and all(returns), tuple(written))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _stack() -> Iterator[tuple[str, int, str]]:
    """The files, lines and functions of this repository that are running, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) and name not in _NOT_OURS:
            yield name.removeprefix(f"{_ROOT}/"), frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _place() -> str:
    return next((f"{name}:{line} {function}" for name, line, function in _stack()), "nobody")


def _did(act: Act) -> str:
    return f"{act.actor.name} in {act.what}"
