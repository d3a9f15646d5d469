"""What has ended when something else begins: the clocks of streams and of the host's threads.

Each stream and each thread is an actor that counts what it does. Its clock says how far it knows
every actor to be: an event carries a stream's clock to another, a synchronisation to a thread, a
launch the thread's to the stream. Two acts are in order if the later one's actor knows the earlier;
if not, a real device may run them in any order, whatever this one did.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

LOCK = threading.RLock()
"""Of all clocks."""

_thread = threading.local()
_hosts: list["Actor"] = []
_streams: list["Stream"] = []

waits: list[Callable[[str], None]] = []
"""Told of each call that makes the host wait."""


class Actor:
    """A stream or a thread of the host."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[Actor, int] = {self: 0}

    def act(self, what: str) -> "Act":
        """Do something."""
        self.clock[self] += 1
        return Act(self, self.clock[self], what)

    def learn(self, clock: Mapping["Actor", int]) -> None:
        """Know from now on what another knew."""
        news = {actor: n for actor, n in clock.items() if self.clock.get(actor, 0) < n}
        if news:  # to have heard them is an act
            self.clock |= news
            self.clock[self] += 1

    def follow(self, other: "Actor") -> None:
        """Know from now on what another knows at present."""
        if self.clock.get(other) != other.clock[other]:  # it has acted since
            self.learn(other.clock)

    def knows(self, act: "Act") -> bool:
        """Whether an act has ended before the next of this actor begins."""
        return self is act.actor or self.clock.get(act.actor, 0) >= act.count


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that an actor did."""

    actor: Actor
    count: int
    what: str

    def is_over(self) -> bool:
        """Whether any thread has waited for it: then it has ended, whoever asks."""
        return any(host.knows(self) for host in _hosts)


def host() -> Actor:
    """Return the actor of this thread; autograd's are one with the main thread, which waits."""
    if not hasattr(_thread, "actor"):
        thread = threading.current_thread()
        is_autograds = bool(_hosts) and isinstance(thread, threading._DummyThread)
        _thread.actor = _hosts[0] if is_autograds else Actor(f"thread {thread.name}")
        if not is_autograds:
            _hosts.append(_thread.actor)
    return _thread.actor


def launch(what: str) -> Act:
    """Start something on the current stream, which then knows what this thread knows."""
    actor = current_stream().actor
    actor.follow(host())
    return actor.act(what)


class Stream:
    """``torch.cuda.Stream``."""

    device_index, device_type, cuda_stream = 0, 1, 0

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", 0)
        self.actor = Actor(f"stream {len(_streams)}")
        _streams.append(self)

    def wait_event(self, event: "Event") -> None:
        """Begin what comes after once the event has happened."""
        with LOCK:
            self.actor.learn(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        """Begin what comes after once the other stream has done what it has been given."""
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return an event that happens once the stream has done what it has been given."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait."""
        _wait("Stream.synchronize", self.actor.clock)

    def query(self) -> bool:
        """Whether nothing is left to do."""
        return True


@dataclass
class Event:
    """``torch.cuda.Event``."""

    enable_timing: bool = False
    blocking: bool = False
    interprocess: bool = False
    clock: Mapping[Actor, int] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Happen once the stream has done what it has been given."""
        with LOCK:
            actor = (stream or current_stream()).actor
            actor.follow(host())
            self.clock, self.seconds = dict(actor.clock), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait."""
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """Let the host wait."""
        _wait("Event.synchronize", self.clock)

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, later: "Event") -> float:
        """Return milliseconds."""
        return 1e3 * (later.seconds - self.seconds)


def default_stream(device: object = None) -> Stream:
    """Return the stream that every thread begins on."""
    return _streams[0]


def current_stream(device: object = None) -> Stream:
    """Return this thread's."""
    return getattr(_thread, "stream", None) or default_stream()


def set_stream(stream: Stream) -> None:
    """Make it this thread's."""
    _thread.stream = stream


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``: inside, it is this thread's."""
    before = current_stream()
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def synchronize(device: object = None) -> None:
    """Let the host wait for all streams."""
    clocks = [stream.actor.clock for stream in _streams]
    _wait("torch.cuda.synchronize", *clocks)


def _wait(what: str, *clocks: Mapping[Actor, int]) -> None:
    for told in waits:
        told(what)
    with LOCK:
        for clock in clocks:
            host().learn(clock)


class Carried:
    """A function for another thread, which knows what the caller knew and tells what it did."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._before = function, dict(host().clock)
        self.after: dict[Actor, int] = {}

    def __call__(self, *given: Any, **named: Any) -> Any:
        with LOCK:
            host().learn(self._before)
        try:
            return self._function(*given, **named)
        finally:
            with LOCK:
                host().act("returns")
                self.after.update(host().clock)


host()  # the main thread's, the first of all
Stream()  # the default one, the first of all
