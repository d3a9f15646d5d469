"""Runs on several hosts that are one machine: what a host would lose is a folder of its own."""

import subprocess
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from tests.support.processes import ENVIRONMENT, Python, _first_failure, _rank_among
from tests.support.runs import UNVERIFIED, words

SMALL = (
    *UNVERIFIED,
    "backbone.name=tests.support.pooled:Pooled",
    "backbone.options={}",
    "log.tensorboard=false",
    "data.loader=torch",
)

_DIES = """
import os, signal, sys
import partialfc.training.run as training
from partialfc.checkpoint.peers.run import Peers
from partialfc.checkpoint.saving import Saver
from partialfc.commands.train import main
at, step, copy, save = int(sys.argv[1]), training.train_step, Peers.copy, Saver.save
def dies(model, *rest):
    if model.heads.steps == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, *rest)
def waits(self, *given, **named):
    copy(self, *given, **named)
    self._copier.wait()
def written(self, *given):
    save(self, *given)
    self.wait()
training.train_step, Peers.copy, Saver.save = dies, waits, written
os._exit(main(sys.argv[2:]))
"""
"""Each rank kills itself before a step; the copies and checkpoints before it are complete."""


def disk_of(folder: Path, host: int) -> Path:
    """The run's folder on a host that has a disk of its own."""
    return folder.parent / f"{folder.name}_disk{host}"


def memory_of(folder: Path, host: int) -> Path:
    """The memory of a host."""
    return folder.parent / f"{folder.name}_host{host}"


def on_hosts(
    packs: Path, folder: Path, *overrides: str, hosts, each: int = 1, dies_at: int = -1
) -> subprocess.CompletedProcess:
    """Run on hosts of these numbers, each with as many ranks, as torchrun would; all may die."""
    size = len(hosts) * each
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as streams:
        files = Path(streams) / "stdout", Path(streams) / "stderr"
        running = []
        for rank in range(size):
            group, local = divmod(rank, each)
            place = {
                **_rank_among(rank, size, store.port),
                "GROUP_RANK": str(group),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(each),
            }
            kept = []
            if any("peers_every_steps" in word for word in overrides):
                kept = [f"checkpoint.peers_folder={memory_of(folder, hosts[group])}"]
            local = "checkpoint.shared=false" in overrides
            at = disk_of(folder, hosts[group]) if local else folder
            start = words(packs, at, *SMALL, *overrides, *kept)[1:]
            command = ["-c", _DIES, dies_at, *start]
            running.append(Python(command, files, env={**ENVIRONMENT, **place}))
        until = time.monotonic() + 400
        try:
            while (status := _first_failure(running)) is None and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            for process in running:
                process.kill()
        out, err = (file.read_text() for file in files)
    assert status is not None, err
    return subprocess.CompletedProcess(overrides, status, out, err)
