"""SIGUSR2 asks a run to save and stop: a job is about to lose its nodes.

Slurm sends it to every rank, each in the middle of another line. The signal is only noted; the
trainer looks between two steps, where all ranks agree (:mod:`partialfc.distributed.agreement`).
"""

import signal
from types import FrameType

SIGNAL = getattr(signal, "SIGUSR2", signal.SIGTERM)  # Windows has no signals for users
"""NCCL keeps SIGUSR1 for itself."""

_received: set[int] = set()


def listen(*more: signal.Signals) -> None:
    """Note :data:`SIGNAL`, and ``more`` signals, from now on; any number of them is one."""
    for number in (SIGNAL, *more):
        signal.signal(number, _note)


def asked() -> bool:
    """Whether this process received one of the signals that it listens to."""
    return bool(_received)


def received(number: signal.Signals) -> bool:
    """Whether this process received this signal."""
    return number in _received


def ignore() -> None:
    """Let :data:`SIGNAL` pass from now on: what it asks for is done."""
    signal.signal(SIGNAL, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    _received.add(number)
