"""Kill, stop, corrupt and move a run, and count what it survives: the table of the README.

Real processes of launch/train.py and torchrun on this machine, in a scratch folder. A run that is
killed K times, a quarter of them during a save, must end with the losses, weights, centers and
states of one that was not, to the bit.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from partialfc.distributed.ranks import Ranks
from partialfc.records.ledger import KINDS, goodput, read_ledger
from partialfc.runtime.process import Runtime
from partialfc.writing import write_json
from tools.bench._faults.crash import corruptions, crash_points
from tools.bench._faults.elastic import joined
from tools.bench._faults.model import BATCH, IMAGES, ORDER
from tools.bench._faults.operations import one_rank, operations
from tools.bench._faults.runs import Run, command, in_save, losses, steps_in, tensors, torchrun
from tools.bench.conditions import ROOT, conditions

EVERY = 8
"""Steps between checkpoints of the run that is killed."""
STEPS_PER_KILL = 12
PARTS = ("kills", "elastic", "crash", "corruption", "stopped", "operations")
PATHS = ((4, 2, 8), (1, 3), (3, 1))
COMMON = (
    "verification.pairs=[]",
    "verification.identification=[]",
    "verification.every_steps=0",
    "run.epochs=",
    "schedule.warmup_steps=2",
    "data.global_batch=48",
    "backbone.name=convnet_s",
    "log.every_steps=1",
    "log.tensorboard=false",
)


def main() -> int:
    """Run the benchmark; return 1 if anything was not survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of a random rank")
    parser.add_argument("--corruptions", type=int, default=1000, help="damaged checkpoints")
    parser.add_argument("--ranks", type=int, default=2, help="of the run that is killed")
    parser.add_argument("--hang-seconds", type=float, default=60.0, help="run.hang_seconds")
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help=f"some of {', '.join(PARTS)}; the others are left out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of steps, ranks and damages")
    parser.add_argument("--json", type=Path, help="where the record goes")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pack(scratch)
        parts: dict[str, Callable[[], Any]] = {
            "kills": lambda: kills(scratch, arguments.kills, arguments.ranks, chance),
            "elastic": lambda: [elastic(scratch, path) for path in track(PATHS, "ranks")],
            "crash": lambda: crashes(scratch),
            "corruption": lambda: corrupt(scratch, arguments.corruptions),
            "stopped": lambda: stopped(scratch, arguments.hang_seconds),
            "operations": lambda: operated(scratch, chance),
        }
        result: dict[str, Any] = {}
        for part in arguments.only.split(","):
            result[part] = parts[part]()
            if arguments.json:  # after every part: all of them take a quarter of an hour
                write_json(arguments.json, {**conditions(), **result})
    return show(result)


def pack(scratch: Path) -> None:
    """Real handwriting: 40 identities."""
    archive = ROOT / "tests" / "fixtures" / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "200", "--size", "32"]
    words = [sys.executable, "tools/omniglot.py", str(archive), str(scratch), *size]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def start(scratch: Path, folder: Path, ranks: int, *overrides: str) -> Run:
    """Start a run of handwriting."""
    where = (f"data.train={scratch / 'train.rec'}", f"run.folder={folder}")
    words = command("configs/omniglot.toml", [*where, *COMMON, *overrides], ranks)
    return Run(words, scratch / f"{folder.name}.log")


def kills(scratch: Path, count: int, ranks: int, chance: random.Random) -> dict[str, Any]:
    """Kill a run ``count`` times and compare what it ends with to a run that was left alone."""
    total = STEPS_PER_KILL * (count + 1)
    settings = (f"run.steps={total}", f"checkpoint.every_steps={EVERY}")
    straight, killed = scratch / "straight", scratch / "killed"
    if start(scratch, straight, ranks, *settings).wait(600):
        raise SystemExit((scratch / "straight.log").read_text(encoding="utf-8")[-3000:])
    gone, saves = [], 0
    began = time.time()
    for number in track(range(count), "kills"):
        run = start(scratch, killed, ranks, *settings)
        in_a_save = number % 4 == 3 or number == count - 1
        wanted = STEPS_PER_KILL * number + 1 + chance.randrange(STEPS_PER_KILL)
        run.until(lambda wanted=wanted: steps_in(killed) >= wanted)  # type: ignore[misc]
        if in_a_save:
            catch_a_save(run, killed)
            saves += 1
        everyone, victims = run.everyone(), run.ranks()
        kill_at = time.monotonic()
        os.kill(victims[chance.choice(sorted(victims))], signal.SIGKILL)
        for process in victims.values() if in_a_save else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        run.wait(60)
        while any(Path(f"/proc/{process}").exists() for process in everyone):
            time.sleep(0.01)
        gone.append(time.monotonic() - kill_at)
    code = start(scratch, killed, ranks, *settings).wait(600)
    wall = time.time() - began
    sums = goodput(read_ledger(killed / "ledger.jsonl"))
    equal = same(straight, killed, total)
    survived = count if code == 0 and all(equal.values()) else 0
    return {
        "tried": count,
        "survived": survived,
        "during_a_save": saves,
        "ranks": ranks,
        "steps": total,
        "equal": equal,
        "seconds_to_last_process_gone": {
            "median": statistics.median(gone) if gone else 0.0,
            "largest": max(gone, default=0.0),
        },
        "wall_seconds": wall,
        "spent": {kind: sums[kind] for kind in KINDS},
        "spent_sum": sums["wall"],
        "goodput": sums["goodput"],
    }


def catch_a_save(run: Run, folder: Path) -> None:
    """Stop all ranks in the middle of a save: one that is still not committed then."""
    while True:
        run.until(lambda: in_save(folder))
        for process in run.ranks().values():
            os.kill(process, signal.SIGSTOP)
        if in_save(folder):
            return
        for process in run.ranks().values():
            os.kill(process, signal.SIGCONT)


def same(one: Path, other: Path, step: int) -> dict[str, bool]:
    """What is equal to the bit at the end of two runs."""
    expected, found = tensors(one, step), tensors(other, step)
    equal = {n: n in found and np.array_equal(v, found[n]) for n, v in expected.items()}

    def all_of(beginning: str) -> bool:
        values = [value for name, value in equal.items() if name.startswith(beginning)]
        return bool(values) and all(values)

    return {
        "losses": losses(one) == losses(other) and len(losses(one)) == step,
        "backbone": all_of("backbone:"),
        "momentum_of_backbone": all_of("optimizer:"),
        "centers": all_of("centers:centers"),
        "momentum_of_centers": all_of("centers:momentum"),
    }


def elastic(scratch: Path, path: tuple[int, ...]) -> dict[str, Any]:
    """Train an epoch on changing numbers of ranks, next to the first of them alone."""
    steps = ORDER.steps_per_epoch
    name = "-".join(map(str, path))
    legs = legs_of(scratch / f"elastic-{name}", path, steps)
    straight = legs_of(scratch / f"straight-{name}", path[:1], steps)
    ids = [number for step in legs for number in step["ids"]]
    losses_of = [[step["loss"] for step in one] for one in (legs, straight)]
    differ = [abs(a - b) / abs(b) for a, b in zip(*losses_of, strict=True)]
    return {
        "path": name,
        "steps": steps,
        "sample_ids_equal": [s["ids"] for s in legs] == [s["ids"] for s in straight],
        "sampled_equal": [s["sampled"] for s in legs] == [s["sampled"] for s in straight],
        "epoch_seen_once": len(ids) == len(set(ids)) == IMAGES // BATCH * BATCH,
        "tensors_equal_after_load_and_save": all(step.get("again", True) for step in legs),
        "largest_difference_of_a_loss": max(differ),
    }


def legs_of(folder: Path, path: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """Run the legs; return every step as one rank would have seen it."""
    found: list[dict[str, Any]] = []
    for number, ranks in enumerate(path):
        last = steps * (number + 1) // len(path)
        out = folder / f"out{number}"
        run_leg(ranks, folder / "checkpoints", last, out)
        parts = [
            json.loads((out / f"rank_{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]
        found += joined(parts)
        if number + 1 < len(path):  # what the next number of ranks loads, it saves again
            copy = folder / f"again{number}" / "checkpoints"
            name = f"step_{last:08d}"
            shutil.copytree(folder / "checkpoints" / name, copy / name)
            run_leg(path[number + 1], copy, last, out, "again")
            one, other = (tensors(copy.parent, step) for step in (last, last + 1))
            found[-1]["again"] = one.keys() == other.keys() and all(
                value.tobytes() == other[name].tobytes() for name, value in one.items()
            )
    return found


def run_leg(ranks: int, folder: Path, last: int, out: Path, *more: str) -> None:
    """One leg under torchrun."""
    leg = ["tools/bench/_faults/elastic.py", str(folder), str(last), str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        torchrun(ranks, *leg),
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=environment,
    )


def crashes(scratch: Path) -> dict[str, Any]:
    """A save dies at every operation, as a process and as a machine."""
    problems: list[str | None] = []
    for power in track((False, True), "crash points"):
        with contextlib.redirect_stdout(io.StringIO()):
            folder = scratch / f"crash-{power}"
            problems += list(crash_points(folder, alone(), power=power))[:-1]
    return {"points": len(problems), "invalid": [problem for problem in problems if problem]}


def corrupt(scratch: Path, count: int) -> dict[str, Any]:
    """Damage checkpoints."""
    tried: dict[str, int] = {}
    accepted = []
    with contextlib.redirect_stdout(io.StringIO()):
        damages = corruptions(scratch / "corrupt", alone(), count)
        for what, taken in track(damages, "corruptions", count, console=Console(stderr=True)):
            kind = what.split()[0]
            tried[kind] = tried.get(kind, 0) + 1
            accepted += [what] if taken else []
    return {"tried": count, "kinds": tried, "accepted": accepted}


def alone() -> Runtime:
    """One rank, no process group."""
    return Runtime(Ranks(), torch.device("cpu"))


def stopped(scratch: Path, seconds: float) -> dict[str, Any]:
    """Stop one of three ranks; wait until it is named, and until all are gone."""
    folder = scratch / "stopped"
    run = start(scratch, folder, 3, "run.steps=1000000", f"run.hang_seconds={seconds}")
    run.until(lambda: steps_in(folder) >= 5)
    everyone = run.everyone()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    began = time.monotonic()
    run.until(lambda: "rank 1 gave no sign of life" in run.text(), 20 * seconds)
    named = time.monotonic() - began
    run.wait(120)
    while any(Path(f"/proc/{process}").exists() for process in everyone):
        time.sleep(0.01)
    stacks = sorted(path.name for path in (folder / "stacks").rglob("rank_*.txt"))
    return {
        "hang_seconds": seconds,
        "seconds_to_name": named,
        "seconds_to_last_process_gone": time.monotonic() - began,
        "stacks": stacks,
    }


def operated(scratch: Path, chance: random.Random) -> dict[str, Any]:
    """Full disk, closed pipe, damaged records, two starts, signals, centers in others' hands."""
    words = one_rank("configs/omniglot.toml", [f"data.train={scratch / 'train.rec'}"], COMMON)
    return {
        name: {"tried": len(held), "held": sum(held)}
        for name, held in operations(scratch, words, chance).items()
    }


Line = tuple[str, str, bool]


def show(result: dict[str, Any]) -> int:
    """Print the table; return 1 if a line of it is not as it must be."""
    lines = [line for name, part in result.items() for line in LINES[name](part)]
    table = Table("", "", "", box=None)
    for name, text, fine in lines:
        table.add_row(name, text, "[green]yes[/]" if fine else "[red]NO[/]")
    Console(width=120).print(table)
    return 0 if all(fine for *_, fine in lines) else 1


def _of_kills(one: dict[str, Any]) -> Iterator[Line]:
    gone = one["seconds_to_last_process_gone"]
    off = abs(one["spent_sum"] / one["wall_seconds"] - 1)
    during = f"{one['during_a_save']} during a save"
    fine = one["survived"] == one["tried"]
    yield "kills survived", f"{one['survived']} of {one['tried']}, {during}", fine
    for name, equal in one["equal"].items():
        yield f"  {name.replace('_', ' ')}", "equal to the bit" if equal else "not equal", equal
    times = f"{gone['median']:.1f} s median, {gone['largest']:.1f} s largest"
    yield "killed rank to last process gone", times, gone["largest"] < 30
    clock = f"{one['spent_sum']:.1f} of {one['wall_seconds']:.1f} s, off {off:.2%}"
    yield "ledger against the clock", clock, off < 0.01


def _of_elastic(paths: list[dict[str, Any]]) -> Iterator[Line]:
    for one in paths:
        difference = one["largest_difference_of_a_loss"]
        exact = ("sample_ids_equal", "sampled_equal", "epoch_seen_once")
        fine = all(one[name] for name in (*exact, "tensors_equal_after_load_and_save"))
        text = f"largest relative difference of a loss {difference:.1e}"
        yield f"ranks {one['path']}", text, fine and difference < 1e-4


def _of_crash(one: dict[str, Any]) -> Iterator[Line]:
    invalid = one["invalid"]
    yield "crash points", f"{one['points']}, invalid states {len(invalid)}", not invalid


def _of_corruption(one: dict[str, Any]) -> Iterator[Line]:
    accepted = one["accepted"]
    yield "corruptions", f"{one['tried']}, accepted {len(accepted)}", not accepted


def _of_stopped(one: dict[str, Any]) -> Iterator[Line]:
    named = one["seconds_to_name"]
    fine = named < 120 and len(one["stacks"]) == 2
    yield "SIGSTOP to the rank's name", f"{named:.0f} s, {len(one['stacks'])} stacks", fine
    yield "  to the last process gone", f"{one['seconds_to_last_process_gone']:.0f} s", True


def _of_operations(every: dict[str, Any]) -> Iterator[Line]:
    for name, one in every.items():
        yield name, f"{one['held']} of {one['tried']}", one["held"] == one["tried"]


LINES: dict[str, Callable[[Any], Iterator[Line]]] = {
    "kills": _of_kills,
    "elastic": _of_elastic,
    "crash": _of_crash,
    "corruption": _of_corruption,
    "stopped": _of_stopped,
    "operations": _of_operations,
}


if __name__ == "__main__":
    sys.exit(main())
