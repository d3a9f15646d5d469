"""Measure heads in a process of their own: the worker of tools/bench/head.py, one per rank.

``python tools/bench/measure.py CASE_JSON OUT`` times the heads of a case in turns, or takes the
peak memory of one of them; rank 0 writes what it found to OUT. RANK, WORLD_SIZE and the rest come
from the environment.

Shape suffixes: b = rows of this rank's batch, B = rows of the global batch, D = embedding.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import gc
import importlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench.ceilings import ceilings_of, over_ranks, three_products, timed

TEXTBOOKS = ("textbook", "textbook_tf32")
WARM_UP = 3
"""Steps of each head before anything is measured; the first makes its optimizer's states."""

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SCALE, ANGULAR = 64.0, 0.5

Result = dict[str, Any]
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the benchmark, and what to measure of it."""

    classes: int
    """C, class centers over all ranks."""
    batch: int
    """B, images of the global batch."""
    dim: int
    """D."""
    rate: float
    """Fraction of the centers used per step, in (0, 1]."""
    dtype: str
    """What our head multiplies matrices in: fp32, bf16 or tf32."""
    centers: str
    """How our head stores centers: fp32, bf16 or fp16."""
    momentum: str
    """How our head stores momentum: fp32, bf16 or int8."""
    device: str
    """cpu or cuda."""
    heads: tuple[str, ...]
    """In the order of their turns: ``ours`` (ArcFace), one of :data:`TEXTBOOKS`, or the name of a
    margin."""
    threads: int
    """Of each rank."""
    steps: int
    """Timed steps of each head, at least."""
    seconds: float
    """Go on with further steps until this many seconds have passed."""
    memory: bool = False
    """Take the peak memory of the only head instead of times."""


def main(arguments: list[str]) -> None:
    """Measure the case ``arguments[0]``; rank 0 writes the result to ``arguments[1]``."""
    settings = json.loads(arguments[0])
    case = Case(**{**settings, "heads": tuple(settings["heads"])})
    with joined(case) as device:
        result = memory_of(case, device) if case.memory else times_of(case, device)
        if int(os.environ.get("RANK", "0")) == 0:
            Path(arguments[1]).write_text(json.dumps(result))


@contextmanager
def joined(case: Case) -> Iterator[torch.device]:
    """Join the other ranks, if any; yield this rank's device."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    elif several:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        if several:
            dist.destroy_process_group()


def build(name: str, case: Case, device: torch.device) -> tuple[Any, Step]:
    """Return a head and its full step: forward, backward to the embeddings, update of the rows."""
    rule: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    settings: dict[str, Any] = {"sample_rate": case.rate, "device": device}
    if name in TEXTBOOKS:
        # By name, for mypy not to follow it into the tests, which are not typed.
        textbook = importlib.import_module("tests.reference").TextbookHead
        settings |= {"scale": SCALE, "angular": ANGULAR, "tf32": name == "textbook_tf32"}
        head = textbook(case.classes, case.dim, **settings, **rule)
        return head, head.step
    from partialfc import PartialFC, RowSGD
    from partialfc.margins import MARGINS, ArcFace

    if case.momentum != "fp32":
        rule["momentum_format"] = case.momentum
    if case.centers != "fp32":
        settings["center_format"] = case.centers
    if case.dtype != "fp32":
        settings["compute"] = case.dtype
    margin = ArcFace(scale=SCALE, angular=ANGULAR) if name == "ours" else MARGINS[name]()
    head = PartialFC(case.classes, case.dim, margin, optimizer=RowSGD(**rule), **settings)

    def step(embeddings_bD: Tensor, identities_b: Tensor) -> Tensor:
        loss: Tensor = head(embeddings_bD, identities_b)
        loss.backward()  # type: ignore[no-untyped-call]
        head.optimizer.step()
        return loss.detach()

    return head, step


def batch_of(case: Case, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return batch ``number``: this rank's embeddings [b, D] and all ranks' identities [B]."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(1000 * number + rank)
    embeddings_bD = torch.randn(case.batch // size, case.dim, generator=generator)
    generator.manual_seed(1000 * number + 999)
    identities_B = torch.randint(0, case.classes, (case.batch,), generator=generator)
    return embeddings_bD.to(device), identities_B.to(device)


def own_part(identities_B: Tensor) -> Tensor:
    """Return the part of a global batch that is this rank's."""
    if not dist.is_initialized():
        return identities_B
    return identities_B.chunk(dist.get_world_size())[dist.get_rank()]


def stored_tensors(head: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a head keeps between steps: centers (and their row scales), optimizer states."""
    centers = [*head.parameters(), *head.buffers()]
    known = {tensor.data_ptr() for tensor in centers}
    states = [
        value
        for state in head.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.data_ptr() not in known
    ]
    return [tensor.detach() for tensor in centers], states


def bytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sampled_rows(head: Any, identities_B: Tensor) -> int:
    """Return n, the rows of this rank in a step with these identities."""
    rows = (
        head.sampler(head.optimizer.steps, identities_B).rows
        if hasattr(head, "sampler")
        else head.sampled
    )
    return len(head.centers) if rows is None else len(rows)


def times_of(case: Case, device: torch.device) -> Result:
    """Time the heads in turns, and the machine's ceilings before and after; collective."""
    before = ceilings_of(case.dim, case.batch, device)
    heads: dict[str, tuple[Any, Step]] = {}
    found: dict[str, Result] = {name: {} for name in case.heads}
    for name in case.heads:
        start = time.perf_counter()
        heads[name] = build(name, case, device)
        seconds = time.perf_counter() - start
        found[name]["construction_seconds"] = over_ranks(seconds, "MAX", device)
    times, products, losses, identities_B = _take_turns(case, heads, device)
    for name, (head, _) in heads.items():
        if not np.isfinite(losses[name]):
            raise FloatingPointError(f"the loss of {name} is {losses[name]}")
        centers, states = stored_tensors(head)
        found[name] |= {
            "step_seconds": percentiles(times[name]),
            "sampled_rows": int(over_ranks(sampled_rows(head, identities_B), "SUM", device)),
            "centers_bytes": int(over_ranks(bytes_of(centers), "SUM", device)),
            "state_bytes": int(over_ranks(bytes_of(states), "SUM", device)),
            "last_loss": losses[name],
        }
    del head, centers, states
    heads.clear()
    after = ceilings_of(case.dim, case.batch, device)
    ceilings = {key: max(before[key], after[key]) for key in before}
    return {"heads": found, "ceilings": ceilings, "three_products_seconds": percentiles(products)}


def _take_turns(
    case: Case, heads: dict[str, tuple[Any, Step]], device: torch.device
) -> tuple[dict[str, list[float]], list[float], dict[str, float], Tensor]:
    """A B A B ... on the same batches, a new one each round, and the bare products at its end.

    Returns the seconds of the slowest rank after the warm-up, those of the products, the last
    losses, the last identities.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    rows = max(1, round(case.rate * case.classes / size))
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    bare = three_products(rows, case.dim, case.batch, dtype, device)
    products: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in heads}
    losses: dict[str, float] = {}
    number, start, passed = 0, 0.0, 0.0
    while number < WARM_UP + case.steps or passed < case.seconds:
        if number == WARM_UP:
            start = time.perf_counter()
        embeddings_bD, identities_B = batch_of(case, number, device)
        identities_b = own_part(identities_B)
        for name, (_, step) in heads.items():
            own_bD = embeddings_bD.clone().requires_grad_()
            seconds, loss = timed(device, step, own_bD, identities_b)
            losses[name] = float(loss)
            if number >= WARM_UP:
                times[name].append(over_ranks(seconds, "MAX", device))
        seconds, _ = timed(device, bare)
        if number >= WARM_UP:
            products.append(over_ranks(seconds, "MAX", device))
        number += 1
        passed = over_ranks(time.perf_counter() - start, "MAX", device) if start else 0.0
    return times, products, losses, identities_B


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the usual percentiles and the number of values."""
    names = {"min": 0, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "max": 100}
    found = {name: float(np.percentile(values, percent)) for name, percent in names.items()}
    return {**found, "steps": len(values)}


class Memory:
    """Bytes in use by this rank: the allocator's on a GPU, the resident set of the process else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Return the bytes at this moment."""
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def reset(self) -> bool:
        """Forget the peak so far; false where the system does not allow it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        """Return the most bytes since :meth:`reset`, or since the start of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; the process's peak where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def memory_of(case: Case, device: torch.device) -> Result:
    """Take the peak memory of the only head beyond what it keeps between steps; collective.

    extra = peak over steps - bytes before the head was built - bytes of centers and states.

    A tiny head of the same kind takes a step before anything is counted, so that thread pools and
    what libraries load once are not. The batches are made before, too. Pages of the states that no
    step has touched yet do not reside; they are written once, since they are subtracted in full.
    What remains is what the steps need: logits, tiles, gradients, samples, and what the C library
    does not return to the system.
    """
    (name,) = case.heads
    tiny = replace(case, classes=max(64, case.batch), rate=1.0)
    head, step = build(name, tiny, device)
    embeddings_bD, identities_B = batch_of(tiny, 0, device)
    step(embeddings_bD.requires_grad_(), own_part(identities_B))
    del head, step
    batches = [batch_of(case, number, device) for number in range(WARM_UP + case.steps)]
    memory = Memory(device)
    baseline = memory.now()
    head, step = build(name, case, device)
    stored, reset = 0, False
    for number, (embeddings_bD, identities_B) in enumerate(batches):
        if number == WARM_UP:
            centers, states = stored_tensors(head)
            kept = [*centers, *states]
            stored = bytes_of(kept)
            for tensor in kept:
                tensor.mul_(1)
            gc.collect()
            reset = memory.reset()
        step(embeddings_bD.requires_grad_(), own_part(identities_B))
        embeddings_bD.grad = None
    extra = memory.peak() - baseline - stored
    return {
        "extra_peak_bytes": int(over_ranks(extra, "MAX", device)),
        "extra_peak_bytes_all_ranks": int(over_ranks(extra, "SUM", device)),
        "baseline_bytes": int(over_ranks(baseline, "MAX", device)),
        "stored_bytes": int(over_ranks(stored, "MAX", device)),
        "peak_was_reset": reset,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not sys.exit: with ranks, torch 2.13's threads now and then abort an interpreter that ends.
    os._exit(0)
