"""Speed and memory of the protocols, on synthetic embeddings of overlapping identities.

    python tools/bench/protocols.py --json OUT.json            # 100,000 images all to all
    python tools/bench/protocols.py --images 20000 --json OUT.json

All-to-all verification is run at a quarter, a half and all of --images, each in a fresh process, so
that its peak memory is its own; the embeddings alone are subtracted. At 5,000 images it is compared
with the whole fp64 matrix. The others: ten-fold verification, templates and 1:1 as IJB-C has them,
rank-k and distractors, at the sizes that are printed.

Shape suffixes: N = images, D = embedding.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from partialfc.protocols.all_to_all import combine, search
from partialfc.protocols.distractors import with_distractors
from partialfc.protocols.identification import rank_k
from partialfc.protocols.templates import pair_scores, templates
from partialfc.protocols.verification import tar_at_far, verify
from partialfc.writing import write_json
from tools.bench.conditions import conditions

DIM, PER_IDENTITY, TARGETS = 512, 6.6, (1e-6,)
COMPARED = 5000


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="all to all (100,000)")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--one", type=int, help="all to all alone, at one size, as JSON")
    options = parser.parse_args(arguments)
    if options.images < 4 or (options.one is not None and options.one < 2):
        parser.error(f"--images must be >= 4, got {options.images}.")
    if options.one is not None:
        print(json.dumps(all_to_all(options.one)))
        return 0
    record: dict[str, Any] = {"conditions": conditions(), "threads": torch.get_num_threads()}
    record["equal_to_the_whole_matrix"] = compared(COMPARED)
    record["all_to_all"] = []
    for size in (options.images // 4, options.images // 2, options.images):
        record["all_to_all"].append(in_fresh_process(size))
        if options.json is not None:  # what is measured is not lost to a limit of time
            write_json(options.json, record)
    record["others"] = others()
    if options.json is not None:
        write_json(options.json, record)
    show(record)
    return 0 if record["equal_to_the_whole_matrix"]["equal"] else 1


def embeddings(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return fp32 embeddings, some 6.6 of an identity as in MFR-ALL, and their identities.

    Three in four of the genuine pairs lie above every impostor pair, the others among them.
    """
    generator = np.random.default_rng(seed)
    identities = max(1, round(count / PER_IDENTITY))
    identity_N = generator.integers(0, identities, count)
    centers = generator.standard_normal((identities, DIM), dtype=np.float32)
    noise = generator.standard_normal((count, DIM), dtype=np.float32)
    noise *= generator.uniform(0.3, 3.0, (count, 1)).astype(np.float32)
    return centers[identity_N] + noise, identity_N


def all_to_all(count: int) -> dict[str, Any]:
    """Measure one run in this process."""
    rows_ND, identity_N = embeddings(count)
    before = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    part = search(rows_ND, identity_N, TARGETS)
    found = combine([part], identity_N, TARGETS)
    return {
        "images": count,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "pairs": found.num_genuine + found.num_impostor,
        "tar": found.tar_at_far[TARGETS[0]],
        "threshold": found.threshold_at_far[TARGETS[0]],
        "bytes_beyond_embeddings": _peak() - before,
        "bytes_of_matrix": count * count * 8,
    }


def in_fresh_process(count: int) -> dict[str, Any]:
    """Measure one run in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compared(count: int) -> dict[str, Any]:
    """Compare with all scores in one matrix."""
    targets = (1e-3, 1e-4, 1e-5, 1e-6)
    rows_ND, identity_N = embeddings(count, seed=1)
    found = combine([search(rows_ND, identity_N, targets)], identity_N, targets).tar_at_far
    unit_ND = rows_ND.astype(np.float64)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    upper = np.triu_indices(count, 1)
    scores = (unit_ND @ unit_ND.T)[upper]
    same = (identity_N[:, None] == identity_N)[upper]
    falling = np.sort(scores[~same])[::-1]
    whole = {
        t: float((scores[same] > falling[math.floor(t * len(falling))]).mean()) for t in targets
    }
    return {
        "images": count,
        "tiled": {f"{k:g}": v for k, v in found.items()},
        "whole": {f"{k:g}": v for k, v in whole.items()},
        "equal": dict(found) == whole,
    }


def others() -> dict[str, Any]:
    """Seconds of the other protocols."""
    generator = np.random.default_rng(0)
    rows_ND, _ = embeddings(12_000)
    same = np.arange(6_000) % 2 == 0
    rows_ND[1::2][same] = rows_ND[0::2][same] + 0.5 * rows_ND[1::2][same]
    times = {"ten-fold verification, 6,000 pairs": _time(lambda: verify(rows_ND, same))}
    images = 100_000
    faces, _ = embeddings(images)
    template = generator.integers(0, 5_000, images)
    media = generator.integers(0, 8, images)
    score = np.ones(images)
    made = templates(faces, template, media, score)
    times["templates, 100,000 images"] = _time(lambda: templates(faces, template, media, score))
    first, second = generator.integers(0, 5_000, (2, 1_000_000))
    scores = pair_scores(made, first, second)
    times["1:1, 1,000,000 pairs of templates"] = _time(lambda: pair_scores(made, first, second))
    truth = generator.random(len(scores)) < 0.01
    times["TAR at FAR, 1,000,000 pairs"] = _time(lambda: tar_at_far(scores, truth))
    gallery, mates = faces[:20_000], faces[20_000:30_000]
    found = np.arange(10_000)
    times["rank-k, 10,000 probes in 20,000"] = _time(
        lambda: rank_k(gallery, np.arange(20_000), mates, found)
    )
    probes = embeddings(3_500, seed=3)
    times["3,500 probes against 100,000 distractors"] = _time(
        lambda: with_distractors(probes[0], probes[1], faces, ks=(1,))
    )
    return times


def show(record: dict[str, Any]) -> None:
    """Print the figures."""
    table = Table(box=None, header_style="bold")
    for column in (
        "all-to-all",
        "seconds",
        "of CPU",
        "pairs/s",
        "memory",
        "fp64 matrix",
        "TAR@FAR 1e-6",
    ):
        table.add_column(column, justify="right")
    for row in record["all_to_all"]:
        table.add_row(
            f"{row['images']:,}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['pairs'] / row['seconds']:.2e}",
            f"{row['bytes_beyond_embeddings'] / 2**20:,.0f} MiB",
            f"{row['bytes_of_matrix'] / 2**20:,.0f} MiB",
            f"{row['tar']:.6f}",
        )
    console = Console(width=100)
    console.print(table)
    same = record["equal_to_the_whole_matrix"]
    console.print(f"{same['images']:,} images against the whole matrix: equal = {same['equal']}")
    for name, seconds in record["others"].items():
        console.print(f"{name}: {seconds:.2f} s")


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak() -> int:
    """Peak resident bytes of this program; getrusage's is also the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())
