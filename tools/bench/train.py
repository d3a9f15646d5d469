"""Images per second of a whole training step on one rank: backbone, head and both updates.

    python tools/bench/train.py --device cuda --batch 512,128 --rate 0.1,1 --json OUT.json
    python tools/bench/train.py --backbone convnet_s --size 32 --batch 16 --classes 2000 --steps 2

Images are random and lie on the device, so that no loader is measured; the backbone runs in bf16
under autocast, channels_last, with gradients clipped to a norm of 5 and torch's SGD. ``ours`` and
``fused`` are the head of partialfc, ``textbook`` and ``textbook_tf32`` the algorithm of
arcface_torch (tests/support/reference.py) behind the same backbone. For r50 and a million
identities arcface_torch publishes 4,803 images/s of eight V100 at rate 0.1, and 3,449 at rate 1.

A row that finds no memory fails alone; the record is written after each.

Shape suffixes: b = rows of the batch.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from partialfc.backbones import build_backbone
from partialfc.cores import usable_cores
from tools.bench._head.ceilings import ceilings_of
from tools.bench._head.measure import NO_TIME, WARM_UP, Case, build
from tools.bench._head.turns import LostError, Step, Turns
from tools.bench.conditions import conditions
from tools.bench.text import table

HEADS = ("ours", "fused", "textbook", "textbook_tf32")
CLIP = 5.0
_DISTINCT = 4
"""Batches, again and again."""

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure every combination, print the table and write the record."""
    options = _parser().parse_args(arguments)
    until = time.monotonic() + options.budget
    device = torch.device(options.device)
    torch.set_num_threads(max(1, usable_cores()))
    torch.backends.cudnn.benchmark = True
    cases = _cases(options)
    if options.dry_run:
        sys.stderr.write(
            f"{len(cases)} rows, about {sum(map(_expected, cases)):.0f} s on an H200\n"
        )
        return 0
    about = {**conditions(), "backbone": options.backbone, "size": options.size}
    about["flop_per_image"] = flop_per_image(options, device)
    about["ceilings"] = ceilings_of(options.dim, max(case.batch for case in cases), device)
    rows: list[Row] = []
    try:
        for case in cases:
            found: Row = {"not_measured": NO_TIME}
            if time.monotonic() < until:
                found = images_per_second(case, options, device, about)
            row = {"classes": case.classes, "batch": case.batch, "rate": case.rate}
            rows.append({**row, "head": case.heads[0], "dtype": case.dtype, **found})
            sys.stderr.write(f"{_named(rows[-1])}: {_said(rows[-1])}\n")
            _save(options.json, about, rows)
    except LostError as error:
        sys.stderr.write(f"the device is lost: {error}\n")
        rows.append({**_unmeasured(cases[len(rows)]), "failed": error.why})
    except KeyboardInterrupt:  # by who gave it a time
        sys.stderr.write("interrupted\n")
    rows += [{**_unmeasured(case), "not_measured": NO_TIME} for case in cases[len(rows) :]]
    with_ratios(rows)
    _save(options.json, about, rows)
    print(shown(rows, options.backbone))
    return int(any("failed" in row or "not_measured" in row for row in rows))


def images_per_second(
    case: Case, options: argparse.Namespace, device: torch.device, about: Row
) -> Row:
    """Return images/s and memory of a row, or why there are none."""
    (name,) = case.heads
    turns = Turns([name], lambda _: trained(case, options, device), device)
    size = options.size
    batches = [
        (
            torch.randn(case.batch, 3, size, size, device=device),
            torch.randint(0, case.classes, (case.batch,)).to(device),
        )
        for _ in range(_DISTINCT)
    ]
    number, start = 0, time.perf_counter()
    while turns.heads and (number < WARM_UP + case.steps or time.perf_counter() < start):
        following = batches[(number + 1) % _DISTINCT][1].cpu()
        counted = number >= WARM_UP
        turns.take(*batches[number % _DISTINCT], counted=counted, following_b=following)
        number += 1
        if number == WARM_UP:
            start = time.perf_counter() + case.seconds
    found: Row = turns.results()[name]
    if "step_seconds" in found:
        found["images_per_second"] = case.batch / found["step_seconds"]["median"]
        ceiling = about["ceilings"]["bf16"]
        flop = found["images_per_second"] * about["flop_per_image"]
        found["fraction_of_bf16_products"] = flop / ceiling
    return found


def trained(case: Case, options: argparse.Namespace, device: torch.device) -> tuple[Any, Step]:
    """Return a head, and the full step from images: the backbone is the step's own."""
    head, step_of_head = build(case.heads[0], case, device)
    backbone = new_backbone(options, device)
    optimizer = torch.optim.SGD(
        backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def step(images: Tensor, identities: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            pixels = images.detach().contiguous(memory_format=torch.channels_last)
            embeddings = backbone(pixels)
        loss = step_of_head(embeddings.float(), identities)  # and the backward of all
        nn.utils.clip_grad_norm_(backbone.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return head, step


def new_backbone(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return the backbone on the device, channels_last, to be trained."""
    torch.manual_seed(1)
    backbone = build_backbone(
        options.backbone, embedding_dim=options.dim, image_size=options.size
    ).to(device)
    last: Callable[..., nn.Module] = backbone.to
    return last(memory_format=torch.channels_last).train()


def flop_per_image(options: argparse.Namespace, device: torch.device) -> float:
    """Return the FLOP of forward and backward of the backbone, a multiply-add as two."""
    backbone, images = new_backbone(options, device), 2
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(images, 3, options.size, options.size, device=device)).sum().backward()
    return float(counter.get_total_flops()) / images


def with_ratios(rows: list[Row]) -> None:
    """Add to each row of ours how many times the images/s it has of another head's row."""
    for row in rows:
        for other in rows:
            same = all(row[key] == other[key] for key in ("classes", "batch", "rate"))
            both = "images_per_second" in row and "images_per_second" in other
            if same and both and row["head"] in ("ours", "fused") and other is not row:
                ratio = row["images_per_second"] / other["images_per_second"]
                row[f"times_images_of_{other['head']}"] = ratio


def shown(rows: list[Row], backbone: str) -> str:
    """Return the table: one line a row."""
    names = ("C", "B", "r", "head", "images/s", "median", "p10-p90", "of bf16 products", "memory")
    lines = []
    for row in rows:
        line = [f"{row['classes']:,}", f"{row['batch']:,}", f"{row['rate']:g}", row["head"]]
        if "step_seconds" not in row:
            lines.append([*line, _said(row)])
            continue
        times = row["step_seconds"]
        extra = row.get("extra_peak_bytes")
        lines.append(
            [
                *line,
                f"{row['images_per_second']:,.0f}",
                f"{times['median'] * 1e3:.1f} ms",
                f"{times['p10'] * 1e3:.1f}-{times['p90'] * 1e3:.1f}",
                f"{row['fraction_of_bf16_products']:.0%}",
                "?" if extra is None else f"{extra / 2**30:.1f} GiB",
            ]
        )
    title = f"A training step with {backbone} in bf16; memory beyond centers and their states"
    return table(title, names, lines, left=("head",))


def _said(row: Row) -> str:
    if "images_per_second" in row:
        return f"{row['images_per_second']:,.0f} images/s"
    for key in ("out_of_memory", "failed", "not_measured", "skipped"):
        if key in row:
            return f"{key.replace('_', ' ')}: {row[key]}"
    return "failed"


def _named(row: Row) -> str:
    return f"C {row['classes']:,}, B {row['batch']:,}, r {row['rate']:g}: {row['head']}"


def _unmeasured(case: Case) -> Row:
    return {
        "classes": case.classes, "batch": case.batch, "rate": case.rate,
        "head": case.heads[0], "dtype": case.dtype,
    }  # fmt: skip


def _save(path: Path | None, about: Row, rows: list[Row]) -> None:
    if path is None:
        return
    missing = [f"{_named(row)} ({_said(row)})" for row in rows if "images_per_second" not in row]
    text = json.dumps({**about, "rows": rows, "not_measured": missing}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _expected(case: Case) -> float:
    """Seconds on an H200, as of a backbone with 5,000 images/s; a third of them is for cuDNN."""
    return 4.0 + max((WARM_UP + case.steps) * case.batch / 5000, case.seconds)


def _cases(options: argparse.Namespace) -> list[Case]:
    heads = options.heads.split(",")
    if unknown := set(heads) - set(HEADS):
        raise SystemExit(f"--heads {', '.join(unknown)}: must be of {', '.join(HEADS)}.")
    return [
        Case(
            classes=options.classes,
            batch=int(batch),
            dim=options.dim,
            rate=float(rate),
            dtype="bf16",
            centers="fp32",
            momentum="fp32",
            device=options.device,
            heads=(name,),
            threads=usable_cores(),
            steps=options.steps,
            seconds=options.seconds,
        )
        for name, rate, batch in product(heads, options.rate.split(","), options.batch.split(","))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="iresnet50", help="by its name (iresnet50)")
    parser.add_argument("--size", type=int, default=112, help="side of an image in pixels (112)")
    parser.add_argument("--classes", type=int, default=1_000_000, help="C (1000000)")
    parser.add_argument("--batch", default="512", help="images of a step; a list (512)")
    parser.add_argument("--rate", default="0.1", help="sample rate in (0, 1]; a list (0.1)")
    parser.add_argument("--dim", type=int, default=512, help="length of an embedding (512)")
    parser.add_argument("--heads", default="ours", help=f"of {', '.join(HEADS)} (ours)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a row, at least (5)")
    parser.add_argument("--seconds", type=float, default=2, help="and for as long (2)")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="S", help="begin no row after S seconds"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how long it should take")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
