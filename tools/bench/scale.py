"""Time and memory of the head at very many identities, by where its rows lie and how.

    python tools/bench/scale.py --identities 1e6,2e7 --dim 64 --rows 20000 --state fp32+fp32 \\
        --place device,host --json OUT.json
    python tools/bench/scale.py --identities 1e7 --dim 512 --rate 0.001,0.01 --state fp16+int8
    python tools/bench/scale.py --identities 1e7 --dim 64 --rate 0.001 --checkpoint FOLDER

A row is a process of its own. A step is forward, backward to the embeddings and the update of the
sampled rows. ``--state`` is how centers and momentum are stored, ``--place`` where they lie between
steps: on the ``device``, ``states`` alone or both in ``host`` memory, both in mapped ``files`` of
--folder; ``--passes`` goes through the classes in ``tiles`` or by the ``fused`` kernels. Lists
separated by commas give every combination. Extra memory is what the process grew by over centers
and momentum, whole.
``--checkpoint`` also saves, verifies and loads each row's state there, and says what that took.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partialfc import ArcFace, Kernels, Memory, PartialFC, Precision, RowSGD
from partialfc.commands._estimate.gpus import GPUS, HEAD_SHARE, MEMORY, PRODUCTS
from tools.bench.conditions import conditions
from tools.bench.text import table

_WARM_UP = 3
_START, _LOCKED, _HOST_ROWS = 10.0, 2e9, 3e9
"""Guesses for a machine with a GPU: seconds until a process has its head, and bytes/s at which host
memory is locked and filled, and at which two threads gather or scatter its rows."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
_H200 = 770e12
"""What an H200 multiplies in bf16 in a second, FLOP; the floor is four products at that rate."""

_FACTS = {"bench": "scale"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    identities: int
    dim: int
    batch: int
    rate: float
    centers: Any
    momentum: Any
    unsampled: Any
    place: str
    device: str
    folder: str
    checkpoint: str
    passes: str
    threads: int
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Measure every combination, print the table and write the record."""
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(Case(**json.loads(options.worker)))))
        return 0
    cases = list(_cases(options))
    if options.device == "cuda":
        expected = sum(expected_seconds(case) for case in cases)
        sys.stderr.write(f"{len(cases)} rows, about {expected / 60:.1f} minutes on an H200\n")
    if options.dry_run:
        return 0
    until = time.monotonic() + options.budget
    about = conditions()
    rows: list[dict[str, Any]] = []
    missing = dict.fromkeys(cases, "no time was left")
    try:
        for case in cases:
            if time.monotonic() > until:
                break
            command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # the others may have room
                sys.stderr.write(done.stderr)
                missing[case] = _why(done.stderr, case)
            else:
                del missing[case]
                no_paths = {"folder": bool(case.folder), "checkpoint": bool(case.checkpoint)}
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({**asdict(case), **no_paths, **found})
            sys.stderr.write(f"{_named(case)}: {missing.get(case, 'measured')}\n")
            _save(options.json, about, rows, missing)
    except KeyboardInterrupt:  # by who gave it a time
        sys.stderr.write("interrupted\n")
    _save(options.json, about, rows, missing)
    print(shown(rows))
    return int(bool(missing))


def _save(
    path: Path | None, about: dict[str, Any], rows: list[dict[str, Any]], missing: dict[Case, str]
) -> None:
    if path is not None:
        named = [f"{_named(case)} ({why})" for case, why in missing.items()]
        text = json.dumps({**about, "rows": rows, "not_measured": named}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def _named(case: Case) -> str:
    size = f"C {case.identities:,}, D {case.dim}, r {case.rate:g}"
    return f"{size}, {case.centers}+{case.momentum} in {case.place}, {case.passes}"


def _why(stderr: str, case: Case) -> str:
    """The last line of a process that failed; of one that found no memory, what it needs."""
    last = next(iter(stderr.strip().splitlines()[-1:]), "its process was killed")
    if "OutOfMemory" not in last:
        return last
    kept = {"device": (case.centers, case.momentum), "states": (case.centers,)}
    needed = case.identities * case.dim * sum(_BYTES[one] for one in kept.get(case.place, ()))
    cards = sorted(GPUS.values(), key=lambda gpu: gpu.memory)
    fits = (gpu.name for gpu in cards if gpu.memory > needed + 2**32)
    return f"out of memory: about {needed >> 30} GiB, {next(fits, 'no card that is known')}"


def expected_seconds(case: Case) -> float:
    """Return what a row should take on an H200, by the rates that partialfc estimate assumes."""
    gpu, rows = GPUS["h200"], case.rate * case.identities
    center, state = (_BYTES[name] * case.dim * rows for name in (case.centers, case.momentum))
    step = 8 * case.batch * case.dim * rows / (gpu.bf16 * PRODUCTS * HEAD_SHARE)
    step += (4 * center + 2 * state) / (gpu.bandwidth * MEMORY)
    moved = {"device": 0.0, "states": state}.get(case.place, center + state)
    step = max(step, 2 * moved / _HOST_ROWS)
    held = moved / case.rate  # locked, and written once
    return _START + held / _LOCKED + max((_WARM_UP + 5) * step, case.seconds + _WARM_UP * step)


def measure(case: Case) -> dict[str, Any]:
    """Build the head, step it, and take its memory; in this process."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    where = {
        "device": Memory(),
        "states": Memory(states_in="host"),
        "host": Memory(centers_in="host", states_in="host"),
        "files": Memory(centers_in="host", states_in="host", host_folder=Path(case.folder)),
    }[case.place]
    began = time.perf_counter()
    head = PartialFC(
        case.identities,
        case.dim,
        ArcFace(),
        sample_rate=case.rate,
        optimizer=RowSGD(momentum_format=case.momentum, unsampled=case.unsampled),
        precision=Precision(
            compute="fp32" if device.type == "cpu" else "bf16", center_format=case.centers
        ),
        memory=where,
        kernels=Kernels(fused=case.passes == "fused"),
        device=device,
    )
    states = head.optimizer.states()
    if case.place != "files":
        for name, state in states.items():  # memory that is zero takes no room before it is written
            state.fill_(1 if name.endswith("_scale") else 0)
    built = time.perf_counter() - began
    held = head.centers.nbytes + sum(state.nbytes for state in states.values())
    with peak(device) as memory:
        seconds = steps_of(head, case, device)
    sampled = head.sampler(0, torch.arange(case.batch, device=device)).rows
    rows = len(head.centers) if sampled is None else len(sampled)
    found = {
        "sampled_rows": rows,
        "build_seconds": built,
        "step_seconds": {name: _quantile(seconds, q) for name, q in (("p50", 0.5), ("p10", 0.1))},
        "steps": len(seconds),
        "held_bytes": held,
        "bytes_per_identity": held / case.identities,
        "extra_bytes": memory[0],
        "floor_seconds": 8 * case.batch * case.dim * rows / _H200
        if device.type == "cuda"
        else None,
    }
    if case.checkpoint:
        found["saved"] = checkpointed(head, case, device)
    return found


def steps_of(head: PartialFC, case: Case, device: torch.device) -> list[float]:
    """Seconds of each step after the warm-up, with the next step's rows on their way."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(case.batch, case.dim, generator=generator)
        identities = torch.randint(0, case.identities, (case.batch,), generator=generator)
        return images.to(device), identities.to(device)

    seconds: list[float] = []
    ahead = batch()
    while len(seconds) < _WARM_UP + 5 or sum(seconds) < case.seconds:
        now, ahead = ahead, batch()
        _wait(device)
        began = time.perf_counter()
        if head.draws_ahead:
            head.sample_step(ahead[1], ahead=True)
        head(now[0].requires_grad_(), now[1]).backward()
        head.optimizer.step()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    head.optimizer.settle()
    return sorted(seconds[_WARM_UP:])


def checkpointed(head: PartialFC, case: Case, device: torch.device) -> dict[str, float]:
    """Save, verify and load; seconds of each and the memory beyond what is held."""
    # Here, for figures without checkpoints need none of what settings and checkpoints import.
    from partialfc.checkpoint import loading as checkpoint
    from partialfc.config import Config
    from partialfc.distributed.ranks import Ranks
    from partialfc.model.build import assemble
    from partialfc.runtime.process import Runtime

    config = Config.model_validate(
        {"data": {"train": "none.rec"}, "precision": {"compute": "fp32"}}
    )
    runtime = Runtime(Ranks.of(), device)
    model = assemble(config, runtime, nn.Linear(case.dim, case.dim), head)
    folder = Path(case.checkpoint) / "scale"
    took: dict[str, float] = {}
    try:
        for name in ("save", "verify", "load"):
            began = time.perf_counter()
            with peak(device) as memory:
                if name == "save":
                    path = checkpoint.save(folder, 1, model, _FACTS, runtime, keep=1)
                elif name == "verify":
                    assert checkpoint.newest(folder, runtime) == path
                else:
                    checkpoint.load(path, model, _FACTS, runtime)
            took[f"{name}_seconds"] = time.perf_counter() - began
            took[f"{name}_extra_bytes"] = memory[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return took


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list whose one element will be the bytes that this process grew by at most.

    On a GPU its allocator's; otherwise memory that no file stands for, looked at every 2 ms.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        found = [0]
        yield found
        found[0] = torch.cuda.max_memory_allocated() - start
        return
    start, ended = _anonymous_bytes(), threading.Event()
    found = [0]

    def watch() -> None:
        while not ended.wait(0.002):
            found[0] = max(found[0], _anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _quantile(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for identities, dim, state, place, passes in product(
        options.identities,
        options.dim,
        *(getattr(options, name).split(",") for name in ("state", "place", "passes")),
    ):
        centers, _, momentum = state.partition("+")
        rates = [n / identities for n in options.rows] if options.rows else options.rate
        for rate in rates:
            yield Case(
                identities=int(identities),
                dim=int(dim),
                batch=options.batch,
                rate=rate,
                centers=centers,
                momentum=momentum or "fp32",
                unsampled=options.unsampled,
                place=place,
                device=options.device,
                folder=str(options.folder or tempfile.gettempdir()),
                checkpoint=str(options.checkpoint or ""),
                passes=passes,
                threads=options.threads,
                seconds=options.seconds,
            )


def shown(rows: list[dict[str, Any]]) -> str:
    """Return what people read of the record."""
    names = ("identities", "D", "rows a step", "centers+momentum", "in", "built, s")
    more = ("step, ms (p10)", "of the floor", "held, GiB", "B/identity", "extra, MiB")
    lines = []
    for row in rows:
        saved, step = row.get("saved", {}), row["step_seconds"]
        line = (
            f"{row['identities']:,}",
            str(row["dim"]),
            f"{row['sampled_rows']:,}",
            f"{row['centers']}+{row['momentum']}",
            f"{row['place']}, {row['passes']}",
            f"{row['build_seconds']:.0f}",
            f"{step['p50'] * 1e3:.1f} ({step['p10'] * 1e3:.1f})",
            f"{row['floor_seconds'] / step['p50']:.0%}" if row["floor_seconds"] else "",
            f"{row['held_bytes'] / 2**30:.2f}",
            f"{row['bytes_per_identity']:.0f}",
            f"{row['extra_bytes'] / 2**20:.0f}",
            "/".join(f"{saved[f'{name}_seconds']:.0f}" for name in ("save", "verify", "load"))
            if saved
            else "",
        )
        lines.append(line)
    title = "A step of the head; memory beyond what is held"
    return table(title, (*names, *more, "save/verify/load, s"), lines, left=("in",))


def _numbers(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text}")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--identities", type=_numbers, default=[1e6], metavar="N,…")
    parser.add_argument("--dim", type=_numbers, default=[512], metavar="D,…")
    parser.add_argument("--rate", type=_numbers, default=[0.01], metavar="R,…", help="sample rates")
    parser.add_argument("--rows", type=_numbers, metavar="N,…", help="sampled rows, for --rate")
    parser.add_argument("--batch", type=int, default=128, help="global batch (128)")
    parser.add_argument(
        "--state", default="fp32+fp32", help="fp32, bf16, fp16 or fp8 + fp32, bf16, int8"
    )
    parser.add_argument(
        "--unsampled",
        default="move",
        choices=("move", "stay"),
        help="rows that are not sampled (move)",
    )
    parser.add_argument("--place", default="device", help="device, states, host, files")
    parser.add_argument("--passes", default="tiles", help="tiles, fused (a kernel each)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, help="of mapped files (the system's for temporary)")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="save and load there too")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--seconds", type=float, default=5, help="of steps, at least (5)")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="S", help="begin no row after S seconds"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how long it should take")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
