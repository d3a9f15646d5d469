"""Runs of launch/train.py as processes, and how to find, kill and stop their ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[3]


def command(config: str, overrides: Sequence[str], ranks: int, *launcher: str) -> list[str]:
    """Return the command line of a run on this machine."""
    return torchrun(ranks, "launch/train.py", config, *overrides, launcher=launcher)


def torchrun(ranks: int, *words: str, launcher: Sequence[str] = ()) -> list[str]:
    """Return the command line of a script on so many ranks of this machine."""
    start = launcher or ("--standalone", f"--nproc-per-node={ranks}")
    return [sys.executable, "-m", "torch.distributed.run", *start, *words]


class Run:
    """A run that goes on beside us, with its output in a file."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.began = time.monotonic()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that live, by rank."""
        found = {}
        for process in descendants(self.process.pid):
            try:
                environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:
                continue
            rank = next((e[5:] for e in environment if e.startswith(b"RANK=")), None)
            if rank is not None and b"launch/train.py" in words:
                found[int(rank)] = process
        return found

    def everyone(self) -> list[int]:
        """The launcher and all below it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def until(self, happened: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for something to happen.

        Raises:
            AssertionError: If the run ends, or it takes too long; with the end of its output.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            late = time.monotonic() > deadline
            if late or self.process.poll() is not None:
                state = "it did not happen" if late else f"it ended, {self.process.returncode}"
                raise AssertionError(f"{state}:\n{self.text()[-3000:]}")
            time.sleep(0.002)

    def wait(self, seconds: float = 300) -> int:
        """Return the exit code of the launcher."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end in {seconds} s:\n{self.text()[-3000:]}") from None

    def kill(self) -> None:
        """End all of it at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in descendants(self.process.pid):
            with suppress(ProcessLookupError):  # ended just now
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """All that it has said."""
        return self.log.read_text(errors="replace", encoding="utf-8")


def descendants(process: int) -> list[int]:
    """All processes below one."""
    found = []
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


def steps_in(folder: Path) -> int:
    """The last step that a run has recorded."""
    return max(losses(folder), default=0)


def losses(folder: Path) -> dict[int, float]:
    """The loss of every recorded step; a line that is being written is left out."""
    found, path = {}, folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in record:
            found[record["step"]] = record["loss"]
    return found


def tensors(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; those of ranks are joined by global row."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in sorted((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        for name, value in load_file(path).items():
            parts.setdefault(f"{path.stem.split('_')[0]}:{name}", []).append(value)
    return {n: np.concatenate(p) if len(p) > 1 else p[0] for n, p in parts.items()}


def in_save(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return bool(list((folder / "checkpoints").glob(".step_*.partial")))
