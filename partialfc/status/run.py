"""What a run's folder says of the run at this moment; nothing in it is changed.

metrics.jsonl and ledger.jsonl grow; they are read on from where the last look ended.
"""

import os
import shutil
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.config import Config, ConfigError, load
from partialfc.config.monitor import Monitor
from partialfc.monitoring.targets import Target, read_targets, targets_path
from partialfc.records import ledger, metrics
from partialfc.records.lines import Sound, is_number, parsed
from partialfc.records.parts import (
    LONGEST_LINE,
    SOME_LINES,
    Words,
    earlier_lines,
    lines_in,
    parts_of,
    some_lines,
)
from partialfc.records.stages import StageRecord, read_stages
from partialfc.writing import opened

_THREADS = 64
_SECONDS_TO_ANSWER = 2.0
_LONGEST_ANSWER = 1 << 20
_OF_A_STEP = ("last_step_timestamp_seconds", "steps_total")
_WAIT = "partialfc_collective_wait_seconds_total"
_SECONDS_BETWEEN_LOOKS_AT_RANKS = 5.0
MOST_CHECKPOINTS = 12
"""A run may have kept thousands."""


BEGUN = ("config.toml", "ledger.jsonl", "metrics.jsonl", ".lock", "checkpoints")
"""One of these is in the folder of every run, from its start on or from a part of it that was
copied."""


def has_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return any((folder / name).exists() for name in BEGUN)


class Growing:
    """The JSON objects of a file that grows, or is written anew when a run goes on.

    Args:
        path: One object a line.
        is_sound: Whether an object is what its line should hold; any other is left out.
        always: What is read of a long file; see :func:`~partialfc.records.parts.some_lines`.
    """

    def __init__(self, path: Path, is_sound: Sound, always: Words) -> None:
        self._path, self._position, self._most = path, 0, 0
        self._files: tuple[tuple[int, int], ...] | None = None
        self._is_sound, self._always = is_sound, always
        self.entries: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Return the entries so far; a line that is not complete yet is left for the next call."""
        try:
            with os.fdopen(opened(self._path, os.O_RDONLY), "rb") as file:
                status = os.fstat(file.fileno())
                found = [part.stat() for part in parts_of(self._path)]
                files = ((status.st_ino, 0), *((one.st_ino, one.st_size) for one in found))
                anew = files != self._files or status.st_size < self._position
                if anew or len(self.entries) > self._most:
                    self._position, self._files, self.entries = 0, files, []
                    self._take(earlier_lines(self._path, self._always, status.st_ino))
                    self._read_on(file, status.st_size)
                    self._most = len(self.entries) + 2 * SOME_LINES
                else:
                    self._read_on(file, status.st_size)
        except FileNotFoundError:
            with suppress(OSError):
                self._read_parts()
        except OSError:
            return self.entries
        return self.entries

    def _read_parts(self) -> None:
        """Read what there is while the newest part was split off last, if there are any."""
        files = ((0, 0), *((one.stat().st_ino, 0) for one in parts_of(self._path)))
        if len(files) > 1 and files != self._files:
            self._position, self._files, self.entries = 0, files, []
            self._take(earlier_lines(self._path, self._always))

    def _read_on(self, file: BinaryIO, size: int) -> None:
        file.seek(self._position)
        line = self._take(some_lines(lines_in(file), size - self._position, self._always))
        cut = 0 if line.endswith(b"\n") or len(line) == LONGEST_LINE else len(line)
        self._position = file.tell() - cut

    def _take(self, lines: Iterator[bytes]) -> bytes:
        """Add what is complete; return the last line."""
        line = b"\n"
        for line in lines:
            if (entry := parsed(line, self._is_sound)) and line.endswith(b"\n"):
                self.entries.append(entry)
        return line


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """What one rank answered to a scrape.

    Attributes:
        rank: Which one.
        address: Where it was asked.
        step: Its last step; ``None`` if it gives no answer.
        age: Seconds since it ended that step.
        wait: Seconds of this process in the head's collectives, for each of its steps.
    """

    rank: int
    address: str
    step: int | None = None
    age: float = 0.0
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete checkpoint."""

    step: int
    bytes: int
    time: float


@dataclass(slots=True)
class Snapshot:
    """All that a page shows.

    Attributes:
        name: Of the run.
        now: When this was, Unix time.
        config: Its settings, or ``None`` where the folder has none yet.
        metrics: Of metrics.jsonl.
        starts: Of the ledger.
        spent: Seconds by kind over all starts, ``wall`` and ``goodput`` with them.
        ranks: What each answered, by rank; empty where none serves metrics.
        closed: Whether they serve them, and not to us.
        checkpoints: The newest of them, newest first.
        free, size: Bytes of the file system.
        ended: Whether the run has come to its end.
        stages: Of a run with stages.
    """

    name: str
    now: float
    config: Config | None
    metrics: list[dict[str, Any]]
    starts: list[ledger.Start]
    spent: Mapping[str, float]
    ranks: list[RankAnswer] = field(default_factory=list)
    closed: bool = False
    checkpoints: list[Checkpoint] = field(default_factory=list)
    free: int = 0
    size: int = 0
    ended: bool = False
    stages: Sequence[StageRecord] = ()

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        found = (record.get(name) for record in reversed(self.metrics))
        return next((value for value in found if value is not None), None)

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def stage(self) -> StageRecord | None:
        """The one that the last recorded step is in."""
        return next((one for one in self.stages if self.step <= one.last), None)

    @property
    def silence(self) -> float:
        """Seconds since the run wrote its last line."""
        last = [*self.metrics[-1:], *(start.entries[-1] for start in self.starts[-1:])]
        return self.now - max((line.get("time") or 0.0 for line in last), default=self.now)


class RunFolder:
    """A run's folder, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = Growing(folder / "metrics.jsonl", metrics.is_sound, metrics.MEASURES)
        self._ledger = Growing(folder / "ledger.jsonl", ledger.is_sound, ledger.EVENTS)
        self._ranks: tuple[float, list[RankAnswer] | None] = (0.0, [])
        self._checkpoints: dict[tuple[str, int, int], Checkpoint] = {}
        self._config: Config | None = None
        self._config_stamp: tuple[int, int] | None = None

    def look(self) -> Snapshot:
        """Return what is to be seen now."""
        config = self._settings()
        entries = self._ledger.read()
        run = Snapshot(
            name=self.folder.name,
            now=time.time(),
            config=config,
            metrics=list(self._metrics.read()),
            starts=ledger.starts(entries),
            stages=read_stages(self.folder),
            spent=ledger.goodput(entries) if entries else {},
            ended=(self.folder / "summary.json").exists(),
        )
        run.checkpoints = list(self._newest_checkpoints())
        disk = shutil.disk_usage(self.folder)
        run.free, run.size = disk.free, disk.total
        if config is not None and config.monitor.targets is not None:
            path = targets_path(config.monitor.targets, config.run.folder)
            ranks = self._ask(path, config.monitor)
            run.ranks, run.closed = ranks or [], ranks is None
        return run

    def _newest_checkpoints(self) -> Iterator[Checkpoint]:
        """Some, newest first; the files of each are looked at once."""
        before, self._checkpoints = self._checkpoints, {}
        paths = checkpoint_folder.steps(self.folder / "checkpoints")
        for path in reversed(paths[-MOST_CHECKPOINTS:]):
            with suppress(OSError):  # deleted while it was looked at
                status = path.stat()
                key = (path.name, status.st_ino, status.st_mtime_ns)
                files = [] if key in before else [file.stat() for file in path.iterdir()]
                if files:
                    newest = max(file.st_mtime for file in files)
                    count = sum(file.st_size for file in files)
                    before[key] = Checkpoint(checkpoint_folder.step_of(path), count, newest)
                if key in before:
                    self._checkpoints[key] = before[key]
                    yield before[key]

    def _settings(self) -> Config | None:
        """The settings, read when they are new: what a moved run's say of it is said once."""
        path, stamp = self.folder / "config.toml", None
        with suppress(OSError):
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
        if stamp is None or stamp != self._config_stamp:
            self._config, self._config_stamp = None, stamp
            try:
                self._config = load(path, own=False)
            except ConfigError as error:
                print(f"the page has nothing of the settings: {error}", file=sys.stderr)
        return self._config

    def _ask(self, path: Path, monitor: Monitor) -> list[RankAnswer] | None:
        """Ask every rank of a targets file, at most every few seconds.

        Returns:
            What each answered; ``None`` if they do not let us in.
        """
        when, ranks = self._ranks
        if time.monotonic() - when < _SECONDS_BETWEEN_LOOKS_AT_RANKS:
            return ranks
        try:
            targets = read_targets(path)
        except (OSError, ValueError, TypeError, RecursionError):
            return []
        try:
            ask = partial(_answer, way=_way_in(monitor), secure=monitor.certificate is not None)
        except OSError:  # its files are not here, or not for us
            return None
        with ThreadPoolExecutor(_THREADS) as pool:
            answers = [answer for answer in pool.map(ask, targets) if answer is not None]
        ranks = answers if answers or not targets else None
        self._ranks = (time.monotonic(), ranks)
        return ranks


def _way_in(monitor: Monitor) -> OpenerDirector:
    """Ask ranks directly, whatever ``http_proxy`` is.

    Trust the certificate of the run and no other, and show it where one is asked for.
    """
    if monitor.certificate is None:
        return build_opener(ProxyHandler({}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it may be for another name of its host
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(monitor.certificate)
    context.load_cert_chain(monitor.certificate, monitor.key)
    return build_opener(ProxyHandler({}), HTTPSHandler(context=context))


def _answer(target: Target, *, way: OpenerDirector, secure: bool) -> RankAnswer | None:
    """What a rank says; ``None`` if it lives and does not let us in."""
    rank = RankAnswer(target.rank, target.address)
    url = f"{target.scheme}://{target.address}/metrics"
    try:
        with way.open(url, timeout=_SECONDS_TO_ANSWER) as reply:
            text = _text(reply)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
        reason = getattr(error, "reason", None)
        cause = reason if isinstance(reason, OSError) else error
        refused = isinstance(cause, ssl.SSLError | ConnectionResetError | BrokenPipeError)
        return None if refused and secure else rank
    try:
        values = _values(text)
    except (ValueError, KeyError, IndexError):
        return rank
    last, steps = (values.get(f"partialfc_{name}") for name in _OF_A_STEP)
    step, wait = values.get("partialfc_step"), values.get(_WAIT, 0.0)
    if step is None or last is None or steps is None:
        return rank
    return RankAnswer(*target[:2], int(step), time.time() - last, wait / max(1.0, steps))


def _text(reply: HTTPResponse) -> str:
    """All that it sends, up to a limit of bytes and of time.

    Raises:
        TimeoutError: If it takes too long.
    """
    deadline, parts, left = time.monotonic() + _SECONDS_TO_ANSWER, [], _LONGEST_ANSWER
    while left and (part := reply.read1(left)):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("it answers too slowly")
    return b"".join(parts).decode(errors="replace")


def _values(text: str) -> dict[str, float]:
    """The finite numbers of a scrape, summed over their labels.

    Raises:
        ValueError: If it is none.
    """
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if is_number(sample.value):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
