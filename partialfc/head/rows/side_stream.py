"""The stream on which a GPU updates rows beside the backward of what made the embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


class SideStream:
    """Runs an update from a moment on, beside what the current stream has been given since.

    Args:
        device: A GPU; ``None``: the update runs where everything does.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._stream: Any = None if device is None else _stream_of(device)
        self._ready: torch.cuda.Event | None = None

    @property
    def exists(self) -> bool:
        """Whether there is another stream at all."""
        return self._stream is not None

    def mark(self) -> None:
        """Let the next update begin here: the current stream has used rows and buffers."""
        if self._stream is not None:
            self._ready = torch.cuda.current_stream(self._stream.device).record_event()

    def unmark(self) -> None:
        """Let it wait for all that the current stream will have been given, as it uses them."""
        self._ready = None

    @contextmanager
    def beside(self, *, waits: bool) -> Iterator[None]:
        """Inside, all runs from the mark on, or behind everything where it ``waits``.

        The current stream waits for it before it does anything else, so nobody sees a row that is
        being updated; what the current stream was given before runs at the same time.
        """
        side = self._stream
        if side is None:
            yield
            return
        current = torch.cuda.current_stream(side.device)
        if waits or self._ready is None:
            side.wait_stream(current)
        else:
            side.wait_event(self._ready)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)


@cache
def _stream_of(device: torch.device) -> Any:
    """One for all heads, so that they use its memory one after the other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
