"""Signals that ask a run to save and stop: SIGUSR2, SIGTERM, SIGHUP and Ctrl-C.

Slurm sends SIGUSR2 before a job loses its nodes; Kubernetes, docker and torchrun send SIGTERM, a
terminal that closes SIGHUP. Each comes in the middle of another line and is only noted: the trainer
looks between two steps, where all ranks agree (:mod:`partialfc.distributed.agreement`). Before the
first step there is nothing to save, and a second signal is meant: both end the process at once.

Python runs a handler in the main thread, which may stand in a collective for ever. So a thread
reads what has arrived, and only it decides to leave.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from partialfc.errors import Stopped

SIGNAL: signal.Signals = getattr(signal, "SIGUSR2", signal.SIGTERM)
"""NCCL keeps SIGUSR1 for itself; Windows has neither, and no SIGHUP."""
_HANG_UP: signal.Signals = getattr(signal, "SIGHUP", signal.SIGTERM)
ENDING = (signal.SIGINT, signal.SIGTERM, _HANG_UP)
"""What ends a process that does not listen."""

_SAME = 0.5
"""``timeout`` and some shells send a signal twice: so many seconds apart, two are one."""
_SECONDS_TO_LEAVE = 5.0

_received: set[int] = set()
_asked_at: float | None = None
_at_once = _stepping = False
_pipe: tuple[socket.socket, socket.socket] | None = None


def listen() -> None:
    """Note the signals from now on; any number of :data:`SIGNAL` is one. In the main thread."""
    global _pipe
    if _pipe is None:
        _pipe = socket.socketpair()
        _pipe[1].setblocking(False)
        threading.Thread(target=_watch, name="signals", daemon=True).start()
    signal.set_wakeup_fd(_pipe[1].fileno(), warn_on_full_buffer=False)
    for number in (SIGNAL, *ENDING):
        # nohup ignores SIGHUP, and a run that it started goes on.
        if number != _HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


@contextmanager
def listening() -> Iterator[None]:
    """Listen inside, and end what asks for it at once until :func:`stepping`.

    Raises:
        Stopped: Anywhere inside, for one of :data:`ENDING`; also for one that came before.
    """
    global _at_once
    before = {number: signal.getsignal(number) for number in ENDING}
    listen()
    _at_once = True
    try:
        for number in _received & {*ENDING}:
            raise Stopped(number, asked=_is_asked(number))
        yield
    finally:
        _at_once = False
        if _note not in before.values():  # nobody listened before, nor does from here on
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def stepping() -> Iterator[None]:
    """Inside, and whatever comes after, signals are noted for whoever looks between two steps."""
    global _at_once, _stepping
    _at_once, _stepping = False, True
    try:
        yield
    finally:
        _stepping = False


def asked() -> bool:
    """Whether this process received one of the signals that it listens to."""
    return bool(_received)


def received(number: signal.Signals) -> bool:
    """Whether this process received this signal."""
    return number in _received


def ignore() -> None:
    """Let :data:`SIGNAL` pass from now on: what it asks for is done."""
    signal.signal(SIGNAL, signal.SIG_IGN)


def forget() -> None:
    """Act as if no signal had come yet."""
    global _asked_at
    _received.clear()
    _asked_at = None


def _note(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    if _at_once and number in ENDING:
        raise Stopped(number, asked=_is_asked(number))


def _is_asked(number: int) -> bool:
    """Whether a signal came because somebody asked the run to stop, as far as can be known here.

    torchrun sends SIGTERM to the other ranks, too, when one of them has died. It has collected that
    one by then, and when it is asked to stop itself it collects this process first: so all ranks of
    the host are still its children. What died on another host is not seen.
    """
    if number != signal.SIGTERM or os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return False
    with suppress(OSError, ValueError):
        return _siblings() >= int(os.environ["WORLD_SIZE"])
    return False


def _siblings() -> int:
    """Children of this process's parent, those that have ended and were not collected too."""
    parent, count = os.getppid(), 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
                count += int(stat.rpartition(")")[2].split()[1]) == parent
    return count


def _watch() -> None:
    """Act on what the main thread may not come to."""
    global _asked_at
    assert _pipe is not None
    while True:
        starting = _at_once and _asked_at is not None
        if not select.select([_pipe[0]], [], [], _SECONDS_TO_LEAVE if starting else None)[0]:
            if starting and _at_once:
                _leave()
            continue
        for number in _pipe[0].recv(64):
            if number in (SIGNAL, *ENDING):
                _received.add(number)
            if number not in ENDING:
                continue
            if _asked_at is None:
                _asked_at = time.monotonic()
                if _stepping and os.environ.get("LOCAL_RANK", "0") == "0":
                    _promise(number)
            elif time.monotonic() - _asked_at > _SAME:
                _leave(number)


def _promise(number: int) -> None:
    with suppress(OSError, ValueError, AttributeError):
        print(
            f"{signal.Signals(number).name}: the run stops after this step, with a checkpoint if "
            "every rank comes to its end. A second signal leaves at once.",
            file=sys.stderr,
            flush=True,
        )


def _leave(number: int | None = None) -> None:
    """End the process, and write nothing: what it writes to may be why it hangs."""
    os._exit(128 + (number or next(number for number in ENDING if number in _received)))
