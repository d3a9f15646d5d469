"""Faces without labels, from embeddings to a network, beside the same training with labels.

    python tools/unlabelled.py --record tools/bench/results/unlabelled.json

Renders faces of three groups of people. A network is trained on the labelled ones; it embeds the
others, whose clusters are what a second one is trained on; a third is trained on their true labels.
Both begin with the first. All three are measured on pairs of the third group, whom none has seen.
Everything lies in --out, and what is there already is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from partialfc.cores import usable_cores
from partialfc.writing import write_json
from tools._faces.packs import write_demo_packs
from tools.bench.conditions import conditions

_FEWEST_PAIRS = 20
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Do all of it and print the accuracies; return the exit status."""
    options = _parser().parse_args(arguments)
    out: Path = options.out.absolute()
    os.chdir(ROOT)
    for name, people, seed, pairs in (
        ("known", options.known, 1, _FEWEST_PAIRS),  # nobody looks at them
        ("unknown", options.people, 2, options.pairs),
    ):
        write_demo_packs(
            out / name,
            identities=people,
            images_per_identity=options.images,
            verification_identities=200,
            pairs=pairs,
            seed=seed,
            workers=usable_cores(),
        )
    pack, embeddings = out / "unknown" / "train.rec", out / "unknown.npy"
    found = {"known": _trained(options, out, "known", f"data.train={out / 'known' / 'train.rec'}")}
    if not embeddings.exists():
        _partialfc("embed", out / "runs" / "known", pack, "--out", embeddings)
    clusters = out / f"clusters_{options.clusters}_{options.top}"
    words = ("--clusters", options.clusters, "--top", options.top, "--out", clusters)
    _partialfc("cluster", embeddings, *words)
    begin = (f"data.train={pack}", f"run.start_from={out / 'runs' / 'known'}")
    labels = (
        f"data.labels={clusters / 'labels.npy'}",
        f"data.identities={options.clusters}",
        f"head.start={clusters / 'centers.npy'}",
    )
    found["clusters"] = _trained(options, out, clusters.name, *begin, *labels)
    found["labels"] = _trained(options, out, "labels", *begin, "head.start=pack:mean")
    for name, accuracy in found.items():
        print(f"{name:10} {accuracy:.4f}")
    if options.record is not None:
        asked = {
            name: str(value)
            for name, value in vars(options).items()
            if name not in ("out", "record")
        }
        record = {**conditions(), "asked": asked, "accuracy": found}
        write_json(options.record, record)
    return 0


def _trained(options: argparse.Namespace, out: Path, name: str, *words: str) -> float:
    """Train, if nobody has; return the accuracy on people whom no training has."""
    folder = out / "runs" / name
    pairs = out / "unknown" / "verification.bin"
    _partialfc(
        "train",
        "configs/demo.toml",
        f"run.folder={folder}",
        "run.epochs=",
        f"run.steps={options.steps}",
        "schedule.warmup_steps=10",
        "verification.every_steps=0",
        "head.sample_rate=1",
        f"verification.pairs=['{pairs}']",
        "data.global_batch=128",
        "optimizer.lr=0.1",
        *words,
    )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return float(summary["verification"]["accuracy"])


def _partialfc(*words: object) -> None:
    command = [sys.executable, "-m", "partialfc", *map(str, words)]
    subprocess.run(command, check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--known", type=int, default=150, help="people with labels (150)")
    parser.add_argument("--people", type=int, default=300, help="people without (300)")
    parser.add_argument("--images", type=int, default=10, help="of each (10)")
    parser.add_argument("--pairs", type=int, default=1000, help="that are verified (1000)")
    parser.add_argument("--clusters", type=int, default=300, help="(300)")
    parser.add_argument("--top", type=int, default=8, help="labels of an image (8)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (200)")
    parser.add_argument("--out", type=Path, default=Path("runs/unlabelled"), help="folder")
    parser.add_argument("--record", type=Path, help="JSON for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
