"""Python processes that need no time to start.

Each is forked from one that has imported what a run needs; the import takes longer than most tests.
They are processes as a user starts them: with their own words, environment, folder and streams, to
be killed and waited for. What a fresh interpreter does is tested with :mod:`subprocess`.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from partialfc.errors import LostRankError
from tests.support.places import ROOT

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["tests.support.preload"])

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Python:
    """A process that runs what ``python WORDS`` does; its streams go to two files.

    Args:
        words: A script, ``-m`` and a module, or ``-c`` and code; and its arguments.
        cwd: Folder in which it runs.
        env: Its whole environment.
        streams: Files that its stdout and stderr are appended to.
    """

    def __init__(
        self,
        words: Sequence[object],
        streams: tuple[Path, Path],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        arguments = ([str(word) for word in words], dict(env), str(cwd), [*map(str, streams)])
        self._process = WARM.Process(target=_become, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal, or ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for its end; return its exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing if it has ended, which :meth:`poll` is told a moment later."""
        send(self.pid, number)

    def kill(self) -> None:
        """End it now, if it still runs."""
        self._process.kill()
        self._process.join()


def send(pid: int, number: int) -> None:
    """Send a process a signal; nothing if it has ended just now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def python(
    *words: object,
    ranks: int | None = None,
    cwd: Path = ROOT,
    env: Mapping[str, str] = ENVIRONMENT,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run to the end, as :func:`subprocess.run` does; with ``ranks``, so many as torchrun would.

    They find each other by a store that this process holds, as the agent of torchrun does. When one
    fails the others are ended, and its exit status is the one returned.
    """
    environments = [env]
    if ranks is not None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [{**env, **_rank_among(rank, ranks, store.port)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "stdout", Path(folder) / "stderr"
        every = [Python(words, streams, cwd=cwd, env=one) for one in environments]
        deadline = time.monotonic() + timeout
        try:
            while (status := _first_failure(every)) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            for process in every:
                process.kill()
        if status is None:
            raise subprocess.TimeoutExpired(str(words), timeout)
        out, err = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess(words, status, out, err)


def partialfc(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a command as a user does."""
    return python("-m", "partialfc", *words, cwd=cwd)


def _first_failure(processes: Sequence[Python]) -> int | None:
    """The status of one that failed; 0 if all are done, and ``None`` as long as any runs.

    After a stall several may have: then of one that failed by itself, and did not lose another.
    """
    codes = [process.poll() for process in processes]
    failed = sorted(filter(None, codes), key=lambda code: code == LostRankError.exit_code)
    return failed[0] if failed else None if None in codes else 0


def _rank_among(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _become(words: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup did to the tests
    for number, path in zip((1, 2), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
