"""The copies of a run, from its start to its end: ``checkpoint.peers_every_steps``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from partialfc.checkpoint.content import Files, content_of
from partialfc.checkpoint.folder import free_bytes, last_step, step_of, steps
from partialfc.checkpoint.peers.copying import Copied, Copier, Ring
from partialfc.checkpoint.peers.fetching import Fetching
from partialfc.checkpoint.peers.hosts import Line, host_number, keepers
from partialfc.checkpoint.peers.memory import InMemory, Memory
from partialfc.checkpoint.peers.recovery import Found, find, gathered
from partialfc.checkpoint.saving import Saved, available_bytes
from partialfc.checkpoint.tensor_file import size_of
from partialfc.config import Config, ConfigError
from partialfc.distributed.agreement import largest, words_of_any
from partialfc.errors import Preempted
from partialfc.model.build import Model
from partialfc.runtime.process import Runtime

LINE = "peers.json"
_IN_MEMORY = Path("/dev/shm")
_GENERATIONS = 2
_STATES = 2
"""Most numbers that an optimizer of the backbone keeps of each weight."""


@contextmanager
def peers_of(config: Config, runtime: Runtime) -> Iterator["Peers | None"]:
    """Return the copies of a run, or ``None`` if it makes none. Collective.

    A run that ends, or is stopped after a checkpoint, leaves none behind; one that fails leaves
    them to its next start. A start without copies leaves those of before behind for good.

    Raises:
        ConfigError: If their folder cannot be used.
    """
    if not config.checkpoint.peers_every_steps:
        if runtime.leads or not config.checkpoint.shared:
            with suppress(OSError):
                (config.run.folder / LINE).unlink(missing_ok=True)
        yield None
        return
    peers = Peers(config, runtime)
    try:
        yield peers
    except Preempted:
        peers.end()
        raise
    peers.end()


class Peers:
    """A run's copies in the memory of its hosts, on one rank. Collective: links, and what is asked.

    Args:
        config: Of the run.
        runtime: This rank.

    Attributes:
        found: The copies that the run may go on from, if there are any.
        on_disk: Step of the newest checkpoint by its name; 0 for none.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        self._ranks = ranks = runtime.ranks
        self._links = runtime.links()
        self._hosts = [host for _, (host,) in gathered([[host_number()]], 1, self._ranks)]
        beside = [rank for rank, host in enumerate(self._hosts) if host == self._host]
        self._leads_host = ranks.rank == beside[0]
        self._leads_folder = runtime.leads if config.checkpoint.shared else self._leads_host
        self._line, self._memory = self._open()
        self._copier: Copier | None = None
        self._off = False
        saved = steps(config.run.folder / "checkpoints") if self._leads_folder else []
        self.on_disk = largest(step_of(saved[-1]) if saved else 0, self._ranks)
        self._base = self.on_disk
        self.found: Found | None = None
        if config.run.resume:
            self.found = self._unless_taken_back(
                find(self._memory, self._line, self._hosts, self._ranks)
            )

    @property
    def step(self) -> int:
        """Step of the copies that the run may go on from; -1 if there are none."""
        return -1 if self.found is None else self.found.step

    @property
    def last(self) -> Copied | None:
        """The last copy of this start that is complete."""
        return self._copier.last if self._copier else None

    @contextmanager
    def fetched(self, model: Model) -> Iterator[Path]:
        """Return a folder as of a checkpoint, which has what this rank reads of it. Collective.

        It is gone behind the block.

        Raises:
            CheckpointError: If the copies have other rows than the settings want.
        """
        assert self.found is not None
        slot = self._memory.slot(self._line.start, f".read_{self._ranks.rank:06d}")
        fetching = Fetching(self.found, self._memory, self._hosts, model.heads, self._runtime)
        came = fetching.into(slot)
        if self._runtime.leads:
            print(
                f"step {self.found.step} is whole in the memory of {len({*self._hosts})} hosts, "
                f"as {self.found.world_size} ranks left it; {came:,} bytes came to rank 0",
                flush=True,
            )
        try:
            yield slot.path
        finally:
            InMemory().remove(slot.path)

    def begin(self, model: Model, step: int, *, from_copies: bool) -> None:
        """Let go of what this start does not go on from, and make room for its own. Collective.

        Args:
            model: Of the run, filled.
            step: That it goes on from; 0 for a new run.
            from_copies: Whether they were what it was filled from.

        Raises:
            ConfigError: If there is no room and the run is new.
        """
        found = self.found if from_copies else None
        self._line = self._told(self._line.next((found.start, found.step) if found else None))
        problem = ""
        if self._leads_folder:
            try:
                self._line.write(self._config.run.folder / LINE)
            except OSError as error:
                problem = str(error)
        if problem := words_of_any(problem, self._ranks):  # before anything is removed
            raise ConfigError(f"checkpoint.peers_every_steps: {problem}")
        kept: list[Path] = []
        if found and self._leads_host:
            parts = self._memory.parts(found.start)
            kept = [part.path for part in parts if part.step == found.step]
        problem = self._kept_only(kept)
        keeper_of, rank = keepers(self._hosts), self._ranks.rank
        ring = Ring(None, None, self._leads_host)
        if keeper_of is not None:
            ring = Ring(keeper_of[rank], keeper_of.index(rank), self._leads_host)
        lack = self._lack(model, keeper_of, kept)
        if problem := words_of_any(problem or lack, self._ranks):
            if not step:
                raise ConfigError(problem)
            self._give_up(problem)
        self._copier = Copier(self._memory, self._line.start, self._runtime, self._links, ring)
        if keeper_of is None and self._runtime.leads:
            print(
                "warning: checkpoint.peers_every_steps: there is one host, or one with more ranks "
                "than all others, so copies stay on their own host: they are there when a process "
                "is lost, and gone with a host.",
                flush=True,
            )

    def copy(
        self,
        step: int,
        model: Model,
        facts: Mapping[str, Any],
        settings: str,
        saved: Saved | None,
    ) -> None:
        """Copy a step behind the training; see :meth:`Copier.copy`. Collective.

        Where a copy has failed on any rank, it was the last.

        Args:
            step: Done.
            model: Copied.
            facts: As of a checkpoint.
            settings: As of a checkpoint.
            saved: The last checkpoint of this start that is complete.
        """
        if self._copier is None or self._off:
            return
        self._base = max(self._base, saved.step if saved else 0)
        try:
            self._copier.wait()
            problem = ""
            if self._copier.last is not None:  # those of before are not needed
                problem = self._kept_only((), self._line.start)
            if problem := self._links.words_of_any(problem):
                raise OSError(problem)
            self._copier.copy(step, model, facts, settings, self._base)
        except OSError as error:
            self._give_up(str(error))

    def end(self) -> None:
        """Leave nothing behind. Collective."""
        if self._copier is not None:
            with suppress(OSError):  # a checkpoint is complete
                self._copier.wait()
            self._copier.close()
        self._links.words_of_any("")  # nobody writes any more
        if self._leads_host:
            self._memory.forget()
        if self._leads_folder:
            with suppress(OSError):
                (self._config.run.folder / LINE).unlink(missing_ok=True)
        self._links.close()

    @property
    def _host(self) -> int:
        return self._hosts[self._ranks.rank]

    def _kept_only(self, paths: Sequence[Path], *starts: str) -> str:
        """Remove the other copies of this host; return what went wrong, which all must hear of."""
        if self._leads_host:
            try:
                self._memory.keep_only(paths, *starts)
            except OSError as error:
                return str(error)
        return ""

    def _open(self) -> tuple[Line, Memory]:
        """The last line that was written, or a new one, and the folder on this host."""
        problem, memory = "", None
        path = self._config.run.folder / LINE
        own = Line.read(path) if self._leads_folder else None
        written = path.stat().st_mtime_ns if own else 0
        if not self._config.checkpoint.shared and written < largest(written, self._ranks):
            own = None  # of a host that was away
        text = words_of_any(json.dumps(asdict(own)) if own else "", self._ranks)
        line = Line.of(json.loads(text)) if text else self._told(Line.new())
        try:
            memory = Memory(self._config.checkpoint.peers_folder, line.run)
        except OSError as error:
            problem = str(error)
        if problem := words_of_any(problem, self._ranks):
            raise ConfigError(f"checkpoint.peers_folder: {problem}. Name another folder.")
        assert memory is not None
        return line, memory

    def _told(self, line: Line) -> Line:
        """Rank 0's line."""
        text = json.dumps(asdict(line)) if self._runtime.leads else ""
        return Line.of(json.loads(words_of_any(text, self._ranks)))

    def _unless_taken_back(self, found: Found | None) -> Found | None:
        """Copies are of a run whose checkpoints are still there, set aside, or were followed."""
        folder = self._config.run.folder / "checkpoints"
        last = largest(last_step(folder) if self._leads_folder else 0, self._ranks)
        if found is None or found.base <= last:
            return found
        if self._runtime.leads:
            print(
                f"{self._config.run.folder}: copies of step {found.step} are left out: they were "
                f"made after the checkpoint of step {found.base}, which is gone.",
                flush=True,
            )
        return None

    def _lack(self, model: Model, keeper_of: list[int] | None, kept: list[Path]) -> str:
        """What to say where a host's copies do not fit into its memory. Collective.

        Those that are kept until there are others count as room.
        """
        content = content_of(model, self._runtime.ranks)
        of_ranks = [row for _, (row,) in gathered([[_bytes_of(content.own)]], 1, self._ranks)]
        common = _bytes_of(content.backbone | content.heads)
        if not content.backbone["optimizer"]:  # it makes its states in the first step
            common += _STATES * _bytes_of({"backbone": content.backbone["backbone"]})
        on_host = [rank for rank, host in enumerate(self._hosts) if host == self._host]
        needed = common + sum(of_ranks[rank] for rank in on_host)
        if keeper_of is not None:
            needed += sum(of_ranks[keeper_of.index(rank)] for rank in on_host)
        needed *= _GENERATIONS
        folder = self._config.checkpoint.peers_folder
        free = free_bytes(folder)
        if folder.is_relative_to(_IN_MEMORY):
            free = min(free, available_bytes() or free)
        free += sum(file.stat().st_size for part in kept for file in part.iterdir())
        if needed <= free or not self._leads_host:
            return ""
        return (
            f"checkpoint.peers_folder = {str(folder)!r}: copies of the {len(on_host)} ranks of a "
            f"host need {needed:,} bytes in it, and {free:,} are free. Make room (mount -o "
            "remount,size=... for /dev/shm), name a folder of a local disk, or set "
            "checkpoint.peers_every_steps = 0."
        )

    def _give_up(self, why: str) -> None:
        """A run that could go on is not ended because the next fault would cost more."""
        self._off = True
        if self._runtime.leads:
            print(f"warning: no copies for other hosts from now on: {why}", flush=True)


def _bytes_of(files: Files) -> int:
    return sum(size_of(tensors) for tensors in files.values())
