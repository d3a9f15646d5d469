"""Small runs of launch/train.py on real handwriting, as a user starts them."""

import signal
import subprocess
import sys

from partialfc.records.metrics import read_metrics
from tests.support.processes import python, send
from tools.bench._faults.runs import descendants

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

UNVERIFIED = (
    "verification.pairs=[]",
    "verification.identification=[]",
    "verification.every_steps=0",
)
"""For tests that say nothing of the sets: most of a short run is their embedding."""


def words(packs, folder, *overrides):
    """A script and its arguments."""
    return [
        "launch/train.py",
        "configs/omniglot.toml",
        f"data.train={packs / 'train.rec'}",
        f"verification.pairs=['{packs / 'heldout_pairs.bin'}']",
        f"verification.identification=['{packs / 'heldout.rec'}']",
        f"run.folder={folder}",
        "run.epochs=",
        "schedule.warmup_steps=2",
        "data.global_batch=24",
        "backbone.name=convnet_s",
        "log.every_steps=1",
        *overrides,
    ]


def command(packs, folder, *overrides, ranks=None):
    """The command line, under torchrun where there are ranks."""
    start = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks else [sys.executable]
    return [*start, *words(packs, folder, *overrides)]


def held(step, script_and_arguments):
    """What :func:`words` and :func:`command` give, standing before a step: see held_run.py."""
    at = script_and_arguments.index("launch/train.py")
    before, after = script_and_arguments[:at], script_and_arguments[at + 1 :]
    return [*before, "tests/support/held_run.py", str(step), *after]


def run(packs, folder, *overrides, ranks=None) -> subprocess.CompletedProcess:
    """Run to the end, on one rank without the others' collectives or on several."""
    return python(*words(packs, folder, *overrides), ranks=ranks)


_DIES = """
import os, signal, sys, time
import partialfc.training.run as training
from partialfc.commands.train import main
step = training.train_step
def dies(model, config, *rest):
    if model.heads.steps == int(sys.argv[1]):
        due = model.heads.steps // config.checkpoint.every_steps * config.checkpoint.every_steps
        written = config.run.folder / "checkpoints" / f"step_{due:08d}"
        until = time.monotonic() + 300
        while due and not written.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, config, *rest)
training.train_step = dies
os._exit(main(sys.argv[2:]))
"""


def killed_at(step, packs, folder, *overrides, ranks=2) -> subprocess.CompletedProcess:
    """Run on several ranks until each kills itself, as kill -9 does, before it takes a step.

    The checkpoint that was due before is there, however slow the machine is.
    """
    return killed(step, words(packs, folder, *overrides), ranks=ranks)


def killed(step, script_and_arguments, *, ranks) -> subprocess.CompletedProcess:
    """Run what :func:`words` are like, in the same way."""
    return python("-c", _DIES, step, *script_and_arguments[1:], ranks=ranks)


def kill_all(process: subprocess.Popen) -> None:
    """End a process and all below it, as kill -9 does; some may have ended just now."""
    for pid in (process.pid, *descendants(process.pid)):
        send(pid, signal.SIGKILL)
    process.wait()


def losses(folder):
    """The loss of each step that a run has noted."""
    records = read_metrics(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}
