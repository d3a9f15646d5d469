"""Waiting for what another process or thread does: as long as a stalled machine needs."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds: what is waited for takes one or two, and a machine may stall for 20, several times."""


def wait_for(happened: Callable[[], T], seconds: float = PATIENCE, every: float = 0.02) -> T:
    """Return what a function returns, as soon as that is true.

    Raises:
        AssertionError: If it is not within some seconds: a test that went on would fail elsewhere.
    """
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(every)
    return found
