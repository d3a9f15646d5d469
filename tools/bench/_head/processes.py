"""Start _head/measure.py, one process per rank, and pass on what it finds as it finds it."""

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tools.bench._head.measure import Case

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tools/bench/_head/measure.py"

_GRACE = 60.0
"""Seconds after its time in which a process must have ended; it may be in the middle of a case."""
_launches = itertools.count(1)

Found = dict[str, Any]


def measured(cases: Sequence[Case], world: int, until: float) -> Iterator[tuple[Case, Found]]:
    """Yield each case with what was found of it; those that no time was left for are not yielded.

    What is found before a case is whole is yielded too, marked ``partial``.

    On a GPU, whose allocator tells the peak of every step, one process measures all cases; on a CPU
    each has a process of its own. Where a process is lost, the next one goes on after the case that
    it was at; where its last words were which head it was lost by, at that case without that head.

    Args:
        cases: Of one device.
        world: Ranks.
        until: The time.monotonic() at which no further case begins.
    """
    broken: dict[str, Found] = {}
    while cases and time.monotonic() < until:
        sent = cases if cases[0].device == "cuda" else cases[:1]
        whole = [
            replace(case, heads=tuple(name for name in case.heads if name not in broken))
            for case in sent
        ]
        done, lost = 0, False
        so_far: Found = {}
        run = _Run(whole, world, until)
        for found in run:
            if "lost" in found:
                broken[found["lost"]] = {"failed": found["why"], "at": "a lost process"}
                lost = True
                continue
            if "heads" in found:
                found["heads"] |= {n: broken[n] for n in sent[done].heads if n in broken}
            is_partial = found.get("partial", False)
            so_far = {**found, "heads": {**found["heads"]}} if is_partial else {}
            yield sent[done], found
            done += not is_partial
        if any(run.codes) and not lost and done < len(sent):
            if "RANK" in os.environ:  # torchrun ends the other ranks
                raise SystemExit(f"a measuring process failed: exit codes {run.codes}")
            failed = {"failed": f"its process was lost, exit code {run.codes}", "at": "any time"}
            known = broken | so_far.get("heads", {})
            heads = {name: known.get(name, failed) for name in sent[done].heads}
            yield sent[done], {**so_far, "heads": heads, "partial": False}
            done += 1
        elif not done and not lost:
            return  # no time was left
        cases = cases[done:]


class _Run:
    """Processes at work on a job; iterate over what they find.

    Attributes:
        codes: Exit codes, afterwards.
    """

    def __init__(self, cases: Sequence[Case], world: int, until: float) -> None:
        self._cases, self._world, self._until = cases, world, until
        self.codes: list[int] = []

    def __iter__(self) -> Iterator[Found]:
        under_torchrun = "RANK" in os.environ
        ranks = [int(os.environ["RANK"])] if under_torchrun else range(self._world)
        launch = next(_launches)
        port = int(os.environ["MASTER_PORT"]) + launch if under_torchrun else _free_port()
        until = time.time() + self._until - time.monotonic()
        job = json.dumps({"cases": [asdict(case) for case in self._cases], "until": until})
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / str(rank) for rank in ranks]
            outs[0].touch()
            processes = [
                subprocess.Popen(
                    [sys.executable, str(WORKER), job, str(out)],
                    env=_environment(rank, self._world, port, self._cases[0]),
                )
                for rank, out in zip(ranks, outs, strict=True)
            ]
            try:
                yield from _lines(outs[0], processes, self._until + _GRACE)
            finally:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
                self.codes = [process.wait() for process in processes]


def _lines(
    path: Path, processes: Sequence[subprocess.Popen[bytes]], latest: float
) -> Iterator[Found]:
    """Yield the lines of a file until all processes have ended, or one has failed, or is late."""
    with path.open(encoding="utf-8") as file:
        started = ""
        while True:
            codes = [process.poll() for process in processes]
            *lines, started = (started + file.read()).split("\n")
            yield from (json.loads(line) for line in lines)
            if None not in codes or any(codes) or time.monotonic() > latest:
                return
            time.sleep(0.1)


def _environment(rank: int, world: int, port: int, case: Case) -> dict[str, str]:
    defaults = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if "RANK" in os.environ:
        del defaults["GLOO_SOCKET_IFNAME"]
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    return {**defaults, **inherited, **own, "OMP_NUM_THREADS": str(case.threads)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
