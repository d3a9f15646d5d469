"""What a checkpoint costs the training: steps beside a save next to steps without one.

One rank trains a head of that many identities and a small backbone. Groups of steps without and
with a save behind them take turns; the copy into memory, in which training stands still, is
measured apart. With a core to spare for the thread that writes, and without (--busy: other
processes keep all cores busy, as the ranks of a full machine do).
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.checkpoint import Saver
from partialfc.cores import usable_cores
from partialfc.distributed.ranks import Ranks
from partialfc.model.build import Model, assemble
from partialfc.model.step import train_step
from partialfc.runtime.process import Runtime
from partialfc.writing import write_json
from tools.bench._faults.model import FACTS, settings
from tools.bench.conditions import conditions

BATCH, SIZE, DIM = 128, 32, 512


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", type=int, default=200_000, help="rows of the head")
    parser.add_argument("--saves", type=int, default=5, help="groups of steps with a save")
    parser.add_argument("--busy", action="store_true", help="keep every core busy beside it")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--json", type=Path, help="where the record goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    beside = [
        multiprocessing.Process(target=_spin, daemon=True)
        for _ in range(usable_cores() if options.busy else 0)
    ]
    for process in beside:
        process.start()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(Path(name), options.identities, options.saves)
    result["busy"] = options.busy
    for process in beside:
        process.terminate()
    if options.json:
        write_json(options.json, {**conditions(), **result})
    show(result)
    return 0


def measure(folder: Path, identities: int, saves: int) -> dict[str, Any]:
    """Return medians of seconds, and the bytes of a checkpoint."""
    runtime = Runtime(Ranks(), torch.device("cpu"))
    model = build(runtime, identities)
    clock = Clock(model, identities)
    clock.group(10)
    alone: list[float] = []
    beside: list[float] = []
    copies, written = [], []
    with Saver(folder / "checkpoints", FACTS, runtime, keep=1) as saver:
        saver.save(1, model)  # its copies are made once, and used again
        saver.wait()
        for number in track(range(saves), "saves", console=Console(stderr=True)):
            start = time.monotonic()
            saver.save(number + 2, model)
            copies.append(time.monotonic() - start)
            count = 0
            while saver.pending or not count:
                beside.append(clock.step())
                count += 1
            saver.wait()
            assert saver.last is not None
            written.append(saver.last.seconds)
            alone += clock.group(count)
        size = saver.last.bytes if saver.last else 0
    return {
        "identities": identities,
        "bytes": size,
        "saves": saves,
        "step_seconds": statistics.fmean(alone),
        "step_seconds_beside_a_save": statistics.fmean(beside),
        "steps_beside_a_save": len(beside),
        "slower": statistics.fmean(beside) / statistics.fmean(alone) - 1,
        "copy_seconds": statistics.median(copies),
        "save_seconds": statistics.median(written),
    }


def build(runtime: Runtime, identities: int) -> Model:
    """A head whose states weigh more than its backbone, as those of millions of identities do."""
    head = PartialFC(
        identities,
        DIM,
        ArcFace(),
        sample_rate=0.05,
        optimizer=RowSGD(lr=0.1, momentum=0.9, unsampled="move"),
    )
    layers = (nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 1024), nn.ReLU(), nn.Linear(1024, DIM))
    return assemble(settings(), runtime, nn.Sequential(*layers), head)


class Clock:
    """Takes steps and says how long each of them took."""

    def __init__(self, model: Model, identities: int) -> None:
        self._model = model
        self._images = torch.randn(BATCH, 3, SIZE, SIZE)
        self._identities = torch.randint(0, identities, (BATCH,))
        self._config = settings()

    def step(self) -> float:
        """Take one."""
        start = time.monotonic()
        train_step(self._model, self._config, self._images, self._identities, 0.01)
        return time.monotonic() - start

    def group(self, count: int) -> list[float]:
        """Take some."""
        return [self.step() for _ in range(count)]


def _spin() -> None:
    while True:
        pass


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("", "", box=None)
    table.add_row("checkpoint", f"{result['bytes'] / 2**20:,.0f} MiB")
    table.add_row("copy, training stands still", f"{result['copy_seconds'] * 1e3:.0f} ms")
    table.add_row("written behind it in", f"{result['save_seconds']:.2f} s")
    table.add_row("step without a save", f"{result['step_seconds'] * 1e3:.1f} ms")
    table.add_row(
        "step beside a save",
        f"{result['step_seconds_beside_a_save'] * 1e3:.1f} ms, {result['slower']:+.1%} "
        f"({result['steps_beside_a_save']} steps)",
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
