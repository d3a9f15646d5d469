"""Saves that die at every operation, damaged checkpoints, and what the loader says of them."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from partialfc.checkpoint import Saver
from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.runtime.process import Runtime
from tools.bench._faults.disk import Died, DyingDisk, damage
from tools.bench._faults.model import FACTS, small_model, take_step

STEPS = (1, 2, 3)


def crash_points(scratch: Path, runtime: Runtime, *, power: bool) -> Iterator[str | None]:
    """Save with a disk that dies in operation 1, 2, .. until a save comes through; one rank.

    The folder holds two checkpoints and keeps two, so that the save deletes one as well.

    Yields:
        What is wrong after each death, or ``None``: the newest checkpoint must be the complete old
        one or the complete new one, every folder with the name of a checkpoint must be valid, and
        the next save must work.
    """
    model = small_model(runtime)
    before = scratch / "before"
    for step in STEPS[:2]:
        take_step(model, step, runtime)
        checkpoint.save(before, step, model, FACTS, runtime, keep=2)
    take_step(model, STEPS[2], runtime)
    for operations in range(10_000):
        folder = scratch / "now"
        shutil.copytree(before, folder)
        died = False
        disk = DyingDisk(operations, power=power)
        try:
            with Saver(folder, FACTS, runtime, keep=2, disk=disk) as saver:
                saver.save(STEPS[2], model)
        except Died:
            died = True
        yield _problem(folder, before, runtime, died)
        shutil.rmtree(folder)
        if not died:
            return


def _problem(folder: Path, before: Path, runtime: Runtime, died: bool) -> str | None:
    for path in checkpoint_folder.steps(folder):
        if problem := checkpoint.verify(path):
            return f"{path.name}: {problem}"
    found = checkpoint.newest(folder, runtime)
    allowed = STEPS[1:] if died else STEPS[2:]
    if found is None or checkpoint_folder.step_of(found) not in allowed:
        return f"the newest is {found}"
    if found.name == "step_00000002":
        for file in found.iterdir():
            if file.read_bytes() != (before / found.name / file.name).read_bytes():
                return f"{file.name} is another"
    if checkpoint_folder.leftovers(folder):
        return "what was left half-done is still there"
    model = small_model(runtime)
    step = checkpoint.load(found, model, FACTS, runtime)
    checkpoint.save(folder, step + 1, model, FACTS, runtime, keep=2)
    return checkpoint.verify(folder / f"step_{step + 1:08d}")


def corruptions(scratch: Path, runtime: Runtime, count: int) -> Iterator[tuple[str, bool]]:
    """Damage the newest of two checkpoints; yield what was done and whether the loader took it.

    Every one must be refused, and the checkpoint before it be found instead.
    """
    model, chance = small_model(runtime), random.Random(0)
    take_step(model, 0, runtime)
    for step in (1, 2):
        checkpoint.save(scratch / "sound", step, model, FACTS, runtime, keep=2)
    for _ in range(count):
        folder = scratch / "damaged"
        shutil.copytree(scratch / "sound", folder)
        what = damage(folder / "step_00000002", chance)
        found = checkpoint.newest(folder, runtime)
        yield what, found is None or found.name != "step_00000001"
        shutil.rmtree(folder)
