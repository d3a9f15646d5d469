"""Measure heads in a process of their own: the worker of tools/bench/head.py, one per rank.

``python tools/bench/_head/measure.py JOB_JSON OUT`` goes through the cases of a job: it times the
heads of a case, in turns on a CPU, which others may share, and on a GPU one after the other with
their memory, so that the card holds one at a time; or it takes the peak memory of one head. What is
found is a line of OUT as soon as it is known; a ``partial`` one has the heads so far. A job is
``{"cases": [...], "until": T}``: nothing begins after the time.time() T.

Shape suffixes: b = rows of this rank's batch, B = rows of the global batch, D = embedding, K =
identities of a row.
"""

import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench._head.baselines import BASELINES, AbsentError, Size, baseline
from tools.bench._head.ceilings import (
    ceilings_of,
    multiply_backward,
    over_ranks,
    three_products,
    timed,
)
from tools.bench._head.memory import Memory, bytes_of, stored_tensors
from tools.bench._head.search import search_seconds
from tools.bench._head.tensor_parallel import PARALLEL, TensorParallel
from tools.bench._head.turns import LostError, Step, Turns, percentiles

TEXTBOOKS = ("textbook", "textbook_tf32")
STAY = "stay"  # ours, whose unsampled rows stay
WARM_UP = 3
"""Steps of each head before anything is measured; the first makes its optimizer's states."""

DISTINCT = 8
"""Batches of a case, again and again: drawing one takes longer than a step on a GPU."""

NO_TIME = "no time was left"
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SCALE, ANGULAR = 64.0, 0.5

_USUAL_TILE: dict[str, int] = {}

Result = dict[str, Any]


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
    """How our head stores centers: fp32, bf16, fp16 or fp8."""
    momentum: str
    """How our head stores momentum: fp32, bf16 or int8."""
    unsampled: str = "move"
    """What rows that are not sampled do in ours: move, as in the textbook heads, or stay."""
    device: str
    """cpu or cuda."""
    heads: tuple[str, ...]
    """In the order of their turns: ``ours``, ``fused`` (by the fused kernels), :data:`STAY`, one of
    :data:`TEXTBOOKS`, ``BASELINES`` or ``PARALLEL``, a margin, or one of :func:`several_heads`."""
    threads: int
    """Of each rank."""
    steps: int
    """Timed steps of each head, at least."""
    seconds: float
    """Go on with further steps until this many seconds have passed."""
    longest: float | None = None
    """Begin no further step of a head after so many seconds, if one was timed; ``None``: do."""
    margin: str = "arcface"
    """Of these heads: arcface, or normalized_softmax for none."""
    tile_mib: int | None = None
    """Size of a tile of ours; ``None`` for that of
    :data:`partialfc.head.tiles.passes.TILE_BYTES`."""
    memory: bool = False
    """Take the peak memory of the only head instead of times."""


def main(arguments: list[str]) -> int:
    """Measure the job ``arguments[0]`` and write lines to ``arguments[1]``; the exit code."""
    job = json.loads(arguments[0])
    cases = [Case(**{**settings, "heads": tuple(settings["heads"])}) for settings in job["cases"]]
    with joined(cases[0]) as device, Path(arguments[1]).open("a", encoding="utf-8") as out:
        ceilings: dict[str, float] = {}

        def tell(found: Result) -> None:
            print(json.dumps(found), file=out, flush=True)

        for case in cases:
            if over_ranks(time.time() - job["until"], "MAX", device) > 0:
                break
            if not case.memory and not ceilings:
                multiply_backward(device)
                ceilings = ceilings_of(case.dim, max(one.batch for one in cases), device)
            try:
                if case.memory:
                    found = memory_of(case, device)
                else:
                    found = times_of(case, device, ceilings, job["until"], tell)
            except LostError as error:
                found = {"lost": error.name, "why": error.why}
            tell(found)
            if "lost" in found:
                return 1
    return 0


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
    angular = ANGULAR if case.margin == "arcface" else 0.0
    if name in PARALLEL:
        if case.rate < 1 or angular or not dist.is_initialized():
            raise AbsentError("it takes all centers without a margin, on several ranks")
        parallel = TensorParallel(name, case.classes, case.dim, SCALE, rule, device)
        return parallel, parallel.step
    if name in BASELINES:
        if case.rate < 1 or dist.is_initialized():
            raise AbsentError("it takes all centers, on one rank")
        dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
        sizes = {"classes": case.classes, "batch": case.batch, "dim": case.dim}
        other = baseline(name, Size(**sizes, dtype=dtype, angular=angular), SCALE, rule, device)
        return other, other.step
    if name in TEXTBOOKS:
        # By name, for mypy not to follow it into the tests, which are not typed.
        textbook = importlib.import_module("tests.support.reference").TextbookHead
        settings |= {"scale": SCALE, "angular": angular, "tf32": name == "textbook_tf32"}
        head = textbook(case.classes, case.dim, **settings, **rule)
        return head, head.step
    from partialfc import Kernels, PartialFC, Precision, RowSGD, Several
    from partialfc.head.options import CenterFormat, Compute, NegativesName
    from partialfc.head.tiles import passes
    from partialfc.margins import MARGINS, ArcFace, Margin, NormalizedSoftmax

    usual = _USUAL_TILE.setdefault(case.device, passes.TILE_BYTES[case.device])
    passes.TILE_BYTES[case.device] = usual if case.tile_mib is None else case.tile_mib << 20
    rule["unsampled"] = STAY if name == STAY else case.unsampled
    if case.momentum != "fp32":
        rule["momentum_format"] = case.momentum
    settings["precision"] = Precision(
        compute=cast(Compute, case.dtype), center_format=cast(CenterFormat, case.centers)
    )
    settings["kernels"] = Kernels(fused=name == "fused")
    most, in_turn = positives_of(name)
    if most and not in_turn:
        settings["positives"] = Several(most=most)
    if name in get_args(NegativesName):
        settings["negatives"] = name
    plain = name in ("ours", "fused", STAY, *get_args(NegativesName)) or most > 0
    margin: Margin = MARGINS[name]() if not plain else NormalizedSoftmax(scale=SCALE)
    if plain and angular:
        margin = ArcFace(scale=SCALE, angular=angular)
    head = PartialFC(case.classes, case.dim, margin, optimizer=RowSGD(**rule), **settings)

    def loss_of(embeddings_bD: Tensor, identities_b: Tensor) -> Tensor:
        if not most:
            return cast(Tensor, head(embeddings_bD, identities_b))
        apart_K = torch.arange(most, device=device) * (case.classes // most)
        identities_bK = (identities_b.unsqueeze(1) + apart_K) % case.classes
        if not in_turn:
            return cast(Tensor, head(embeddings_bD, identities_bK))
        return torch.stack([head(embeddings_bD, one_b) for one_b in identities_bK.T]).mean()

    def step(embeddings_bD: Tensor, identities_b: Tensor) -> Tensor:
        loss = loss_of(embeddings_bD, identities_b)
        loss.backward()  # type: ignore[no-untyped-call]
        head.optimizer.step()
        return loss.detach()

    return head, step


def several_heads(most: str) -> tuple[str, ...]:
    """Return the heads that compare rows of so many identities, a list: each K in one pass, and in
    K passes one after another, as code does that copies the loss for every identity of a row."""
    counts = [int(one) for one in most.split(",")]
    in_turn = [f"K={count} in turn" for count in counts if count > 1]
    return (*(f"K={count}" for count in counts), *in_turn)


def positives_of(name: str) -> tuple[int, bool]:
    """Return K of such a head and whether it takes them in turn; 0 for any other head."""
    count, _, in_turn = name.removeprefix("K=").partition(" ")
    return (int(count), bool(in_turn)) if name.startswith("K=") else (0, False)


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


def sampled_rows(head: Any, identities_B: Tensor) -> int:
    """Return n, the rows of this rank in a step with these identities."""
    rows = (
        head.sampler(head.optimizer.steps, identities_B).rows
        if hasattr(head, "sampler")
        else head.sampled
    )
    return len(head.centers) if rows is None else len(rows)


def times_of(
    case: Case,
    device: torch.device,
    before: dict[str, float],
    until: float = math.inf,
    tell: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Time the heads on the same batches, and the bare products after each round; collective.

    On a CPU they take turns: A B A B ... On a GPU each is built, timed and gone before the next,
    and the bare products between its steps tell whether the card was as fast for all of them.
    Seconds are those of the slowest rank after the warm-up. The machine's ceilings are the better
    ones of ``before`` and, on a CPU, those afterwards.

    Args:
        case: What to measure.
        device: Of this rank.
        before: The ceilings so far.
        until: The time.time() after which no head begins.
        tell: Gets the result so far after each head, marked ``partial``.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    rows = max(1, round(case.rate * case.classes / size))
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    bare = three_products(rows, case.dim, case.batch, dtype, device)
    together = [case.heads] if device.type == "cpu" else [(name,) for name in case.heads]
    result: Result = {"heads": {}, "ceilings": before}
    products: list[float] = []
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for names in together:
        if over_ranks(time.time() - until, "MAX", device) > 0:
            result["heads"] |= {name: {"not_measured": NO_TIME} for name in names}
            continue
        found, seconds = _in_turns(names, case, device, bare, kept)
        products += seconds
        result["heads"] |= found
        if products:
            result["three_products_seconds"] = percentiles(products)
        tell({**result, "partial": True})
    del bare, kept
    if device.type == "cuda":
        torch.cuda.empty_cache()  # in whole for the next case
    else:
        after = ceilings_of(case.dim, case.batch, device)
        result["ceilings"] = {key: max(before[key], after[key]) for key in before}
    return result


def _in_turns(
    names: tuple[str, ...],
    case: Case,
    device: torch.device,
    bare: Callable[[], None],
    kept: dict[int, tuple[Tensor, Tensor]],
) -> tuple[Result, list[float]]:
    """Return what was found of these heads, and the seconds of the bare products; collective."""
    turns = Turns(names, lambda name: build(name, case, device), device)
    searches = {
        name: search_seconds(turn.head, device)
        for name, turn in turns.heads.items()
        if getattr(turn.head, "nearest", None) is not None
    }
    products: list[float] = []
    number, start, passed = 0, 0.0, 0.0
    while turns.heads and (number < WARM_UP + case.steps or passed < case.seconds):
        if number > WARM_UP and case.longest is not None and passed > case.longest:
            break
        if number == WARM_UP:
            start = time.perf_counter()
        for place in (number % DISTINCT, (number + 1) % DISTINCT):
            kept[place] = kept.get(place) or batch_of(case, place, device)
        embeddings_bD, identities_B = kept[number % DISTINCT]
        following_b = None
        if not any(positives_of(name)[0] for name in names):  # these have others of their own
            following_b = own_part(kept[(number + 1) % DISTINCT][1]).cpu()
        counted = number >= WARM_UP
        turns.take(embeddings_bD, own_part(identities_B), counted=counted, following_b=following_b)
        seconds, _ = timed(device, bare)
        if number >= WARM_UP:
            products.append(over_ranks(seconds, "MAX", device))
        number += 1
        passed = over_ranks(time.perf_counter() - start, "MAX", device) if start else 0.0
    found = turns.results()
    for name in turns.heads:
        rows = over_ranks(sampled_rows(turns.heads[name].head, identities_B), "SUM", device)
        found[name] |= {"sampled_rows": int(rows), **searches.get(name, {})}
        if device.type == "cuda":
            found[name]["three_products_seconds"] = percentiles(products)["median"]
    del turns
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found, products


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
    gc.collect()
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
    code = main(sys.argv[1:])
    # Not sys.exit: with ranks, torch 2.13's threads now and then abort an interpreter that ends.
    os._exit(code)
