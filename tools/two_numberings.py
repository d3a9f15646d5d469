"""What two packs of the same people under two numberings cost, and what a mask and a map save.

    python tools/two_numberings.py --people 400 --steps 600

Renders the demo's faces and writes three packs: one with all images of its first people, and two
with half of the images of each person, the second with the people in another order. A network is
trained on the one pack, and on the two: as if nobody was in both, with
data.sets.NAME.same_people = "unknown", and with data.sets.NAME.map. All see as many images, and all
are measured on the demo's pairs of other people. The accuracies are printed, and kept in --record.

Shape suffixes: N = images, C = people.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from partialfc.cores import usable_cores
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.identity_map import write_identity_map
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.keyed import key, permute
from partialfc.writing import write_json
from tools.bench.conditions import conditions
from tools.demo import ROOT, render

BATCH = 128
WAYS = {
    "one pack": None,
    "two packs": {},
    "two packs, same_people": {"same_people": "unknown"},
    "two packs, map": {"map": "b.map"},
}


def main(arguments: list[str] | None = None) -> int:
    """Do all of it; return the exit code of what failed, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=400, help="of the demo's 1,200")
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} images each")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way")
    parser.add_argument("--out", type=Path, default=Path("runs/two_numberings"))
    parser.add_argument("--record", type=Path, help="a .json to keep the figures in")
    parser.add_argument("override", nargs="*", help="key.sub=value, on top of configs/demo.toml")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    render()
    shutil.rmtree(options.out, ignore_errors=True)
    write_packs(open_dataset([Path("packs/demo/train.rec")]), options.people, options.out)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(1, options.seeds + 1):
        for way in WAYS:
            run = options.out / f"{way.replace(', ', '_').replace(' ', '_')}_{seed}"
            words = [f"run.seed={seed}", f"run.steps={options.steps}", *options.override]
            code = train(run, [*settings_of(way, options.out), *words])
            if code:
                return code
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            found[way].append(summary["verification"]["accuracy"])
    if options.record:
        write_json(options.record, {**conditions(), "batch": BATCH, "accuracy": found})
    show(found)
    return 0


def write_packs(faces: DataSet, people: int, out: Path) -> None:
    """Write one pack of all images of some people, two of half of them, and the map of these.

    Args:
        faces: Those of the demo.
        people: How many of its identities.
        out: Folder for ``one.rec``, ``a.rec``, ``b.rec`` and ``b.map``.
    """
    label_N = faces.labels()
    sample_N = np.flatnonzero(label_N < people)
    turn_N = sample_N - np.searchsorted(label_N, label_N[sample_N])  # an identity's images in turn
    other_C = permute(np.arange(people), people, key(0, "numbering"))
    for name, chosen_N, number_C in (
        ("one", sample_N, np.arange(people)),
        ("a", sample_N[turn_N % 2 == 0], np.arange(people)),
        ("b", sample_N[turn_N % 2 == 1], other_C),
    ):
        number_N = number_C[label_N[chosen_N]]
        in_order = np.argsort(number_N, kind="stable")
        rows = zip(number_N[in_order].tolist(), chosen_N[in_order].tolist(), strict=True)
        images = ((number, faces.jpeg(sample)) for number, sample in rows)
        write_insightface_pack(out / f"{name}.rec", images, people)
    a, b = (open_dataset([out / f"{name}.rec"]) for name in "ab")
    write_identity_map(
        out / "b.map", zip(other_C.tolist(), range(people), strict=True), of=b, onto=a
    )


def settings_of(way: str, out: Path) -> list[str]:
    """Return the overrides that say what a batch is made of."""
    more = WAYS[way]
    if more is None:
        return [f"data.train={out / 'one.rec'}", f"data.global_batch={BATCH}"]
    sets = {name: [f"train='{out / name}.rec'", f"images={BATCH // 2}"] for name in "ab"}
    sets["b"] += [f"{k}='{out / v if k == 'map' else v}'" for k, v in more.items()]
    inner = ", ".join(f"{name}={{{', '.join(words)}}}" for name, words in sets.items())
    return ["data.train=", f"data.sets={{{inner}}}", f"data.global_batch={BATCH}"]


def train(run: Path, overrides: Sequence[str]) -> int:
    """Train with the demo's settings; return the exit code."""
    command = [
        *(sys.executable, "-m", "partialfc", "train", "configs/demo.toml", f"run.folder={run}"),
        *("run.epochs=", "head.sample_rate=1"),
        *("verification.every_steps=0", "checkpoint.every_steps=0", "log.progress=false"),
        *overrides,
    ]
    environment = {"OMP_NUM_THREADS": str(usable_cores()), **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode


def show(found: dict[str, list[float]]) -> None:
    """Print the accuracies."""
    table = Table("trained on", "ten-fold accuracy on others", box=None, header_style="bold")
    for way, values in found.items():
        table.add_row(way, ", ".join(f"{value:.4f}" for value in values))
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
