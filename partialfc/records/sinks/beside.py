"""A sink beside training: it may be slow, hang or fail, and costs records alone."""

import errno
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import methodcaller
from pathlib import Path

from partialfc.errors import in_words
from partialfc.records.lines import is_step
from partialfc.records.metrics import Values, tag
from partialfc.records.sinks.run_sink import Opening, RunSink, find
from partialfc.records.unessential import unessential
from partialfc.writing import read_text, write_json

_WAITING_RECORDS = 1000
_SECONDS_BETWEEN_TRIES = 60.0
_SECONDS_TO_END = 30.0
_SECONDS_TO_UPLOAD = 300.0


class Beside:
    """Hands records to a sink in a thread; what it cannot take is lost, warned of once and counted.

    The run's id and the last step of each metric are kept in ``sinks/<name>.json`` in the run's
    folder: a start that goes on from a checkpoint continues the run, and a step that comes again is
    not recorded again. A start at step 0 is a new run.

    Args:
        name: Of the sink.
        make: Opens it; called again a minute later if it fails.
        opening: What it is opened with.
        step: Steps taken before this process.
    """

    def __init__(
        self, name: str, make: Callable[[Opening], RunSink], opening: Opening, step: int
    ) -> None:
        self._what, self._make = f"log.sinks = {name!r}", make
        self._path = opening.folder / "sinks" / f"{name}.json"
        self._recorded: dict[str, int] = {}
        identity = None
        if step:
            try:
                identity, self._recorded = _read(self._path)
            except (OSError, ValueError) as error:
                print(f"warning: {self._path}: {in_words(error)}", file=sys.stderr)
        self._opening = replace(opening, id=identity)
        self._sink: RunSink | None = None
        self._next_try = -float("inf")
        self._done, self._closed = False, False
        self._calls: queue.Queue[Callable[[RunSink], None] | None] = queue.Queue(_WAITING_RECORDS)
        self._thread = threading.Thread(target=self._follow, name=self._what, daemon=True)
        self._thread.start()

    def write(self, step: int, values: Values) -> None:
        """Record values of metrics; returns at once."""
        self._give(lambda sink: self._record(sink, step, values))

    def finish(self, step: int, picture: Path, artifacts: Sequence[Path]) -> None:
        """Hand over what a run that is done leaves, and close; what is not there costs itself."""
        self._give(methodcaller("picture", step, picture))
        for path in artifacts:
            self._give(methodcaller("artifact", path))
        self._done = True
        self._end(_SECONDS_TO_UPLOAD)

    def close(self) -> None:
        """Wait a while for what is left, and leave it."""
        self._end(_SECONDS_TO_END)

    def _give(self, call: Callable[[RunSink], None]) -> None:
        with unessential(self._what):
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                many = f"{_WAITING_RECORDS} records wait for it already"
                raise BlockingIOError(errno.EAGAIN, many) from None

    def _end(self, seconds: float) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(queue.Full):
            self._calls.put(None, timeout=seconds)
            self._thread.join(seconds)
        if self._thread.is_alive():
            with unessential(self._what):
                raise TimeoutError(
                    errno.ETIMEDOUT, f"it did not come to its end in {seconds:.0f} s"
                )

    def _follow(self) -> None:
        """The thread."""
        while (call := self._calls.get()) is not None:
            with unessential(self._what, Exception):
                call(self._opened())
        if self._sink is not None:
            with unessential(self._what, Exception):
                self._sink.close(done=self._done)

    def _opened(self) -> RunSink:
        if self._sink is None:
            if time.monotonic() < self._next_try:
                raise ConnectionError(errno.ENOTCONN, "it could not be opened")
            self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
            self._sink = self._make(self._opening)
            self._keep(self._sink)
        return self._sink

    def _record(self, sink: RunSink, step: int, values: Values) -> None:
        new = {
            tag(name): value
            for name, value in values.items()
            if step > self._recorded.get(tag(name), -1)
        }
        if new:
            self._recorded |= dict.fromkeys(new, step)
            self._keep(sink)  # before: a kill in between loses a record, and makes none twice
            sink.record(step, new)

    def _keep(self, sink: RunSink) -> None:
        with unessential(self._path):
            self._path.parent.mkdir(exist_ok=True)
            write_json(self._path, {"id": sink.id, "recorded": self._recorded})


def beside(names: Sequence[str], opening: Opening, step: int) -> list[Beside]:
    """Open sinks by name, each in a thread of its own.

    Args:
        names: See :data:`partialfc.records.sinks.run_sink.SINKS`.
        opening: What each is opened with.
        step: Steps taken before this process.

    Raises:
        ModuleNotFoundError: If a program is not installed.
        ConfigError: If a class is not where its name says.
    """
    return [Beside(name, make, opening, step) for name, make in find(names).items()]


def _read(path: Path) -> tuple[str | None, dict[str, int]]:
    """Return the id and the last step of each metric.

    Raises:
        OSError: If there is a file and it cannot be read.
        ValueError: If it is damaged.
    """
    if not path.exists():
        return None, {}
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kept = json.loads(read_text(path))
        identity, recorded = kept["id"], kept["recorded"]
        if isinstance(identity, str) and all(map(is_step, recorded.values())):
            return identity, recorded
    raise ValueError("it is damaged, so this start is a new run there.")
