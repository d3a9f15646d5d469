"""Errors of the head against fp64, per precision and format, beside those of ordinary code.

    python tools/bench/precision.py --json tools/bench/results/precision.json

The errors are relative, in norm: of the loss, of the embeddings' gradient and of the centers'.
"Ordinary code" stores all logits, multiplies matrices in the same dtype and lets autograd derive.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from partialfc import ArcFace, PartialFC, Precision, RowSGD
from partialfc.head.centers import stored_centers
from partialfc.head.options import CenterFormat, Compute
from partialfc.head.rows.formats import FIRST_SCALE
from tools.bench.conditions import conditions

PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)
"""The change of fp32 centers is minus their gradient."""

# By name, for mypy not to follow it into the tests, which are not typed.
reference = importlib.import_module("tests.support.reference")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="OUT", help="write the record")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(options.classes, options.dim, generator=generator) * 0.01
    identities = torch.randint(0, options.classes, (options.batch,), generator=generator)
    # Half way through a training: the own center at about 60 degrees, others at 90.
    noise = torch.randn(options.batch, options.dim, generator=generator) * 0.017
    embeddings = centers[identities] + noise
    rows = []
    for scale in (16.0, 30.0, 64.0, 128.0):
        margin = ArcFace(scale=scale, gradient="exact")
        rows += errors_at(margin, embeddings, centers, identities, options.device)
    table = Table(title=f"Relative error against fp64: C {options.classes:,}, D {options.dim}")
    for name in ("s", "", "loss", "gradient of embeddings", "of centers"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row['scale']:g}", row["what"], *(f"{e:.1e}" for e in row["errors"]))
    Console().print(table)
    if options.json:
        record = {**conditions(), "arguments": vars(options) | {"json": None}, "rows": rows}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def errors_at(
    margin: ArcFace, embeddings: Tensor, centers: Tensor, identities: Tensor, device: str
) -> list[dict[str, Any]]:
    """Return a row for every precision and format of the head, and for ordinary code."""
    found = []

    def add(what: str, values: tuple[Tensor, ...], stored: Tensor) -> None:
        positive = reference.positive_logit(margin)
        truth = reference.gradients_of(embeddings, stored, identities, positive, scale=margin.scale)
        errors = [reference.relative_error(v.cpu(), t) for v, t in zip(values, truth, strict=False)]
        found.append({"scale": margin.scale, "what": what, "errors": errors})

    computes: tuple[Compute, ...] = get_args(Compute)
    formats: tuple[CenterFormat, ...] = get_args(CenterFormat)
    for compute in computes:
        if compute == "tf32" and device == "cpu":
            continue
        for center_format in formats:
            head = PartialFC(
                len(centers),
                centers.shape[1],
                margin,
                optimizer=PLAIN,
                precision=Precision(compute=compute, center_format=center_format),
                device=device,
            )
            head.centers.data.copy_(centers / FIRST_SCALE.get(head.centers.dtype, 1.0))
            stored = stored_centers(head.centers, head.optimizer.states()).clone()
            own = embeddings.clone().to(device).requires_grad_()
            loss = head(own, identities.to(device))
            loss.backward()
            head.optimizer.step()
            assert own.grad is not None
            values = [loss.detach(), own.grad]
            if center_format == "fp32":
                values.append(stored - head.centers.detach().cpu())
            add(f"{compute}, {center_format} centers", tuple(values), stored)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        values = reference.plain_gradients(embeddings, centers, identities, margin, dtype)
        add(f"ordinary {name} code", values, centers)
    return found


if __name__ == "__main__":
    sys.exit(main())
