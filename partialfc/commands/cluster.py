"""Group embeddings into clusters, whose numbers are labels to train on.

    partialfc embed MODEL packs/mine.rec --out mine.npy
    partialfc cluster mine.npy --clusters 1000 --top 8 --out mine_clusters

EMBEDDINGS is a .npy of partialfc embed, which is mapped and read in pieces. Spherical k-means (by
faiss) looks at 256 rows for each cluster at most, drawn by --seed; then every row gets its nearest
clusters. OUT gets

  labels.npy     int64 [images, top]: numbers of the nearest clusters, the nearest first. One row
                 for each image of the pack; -1 for an image that could not be embedded
  distances.npy  fp32 [images, top]: 1 - cosine to them, 0 the same direction, 2 the opposite
  centers.npy    fp32 [clusters, embedding]: unit rows, for head.start
  cluster.json   how it was made, and the sizes of the clusters

A stopped run goes on with the same words, from its last iteration or its last 16,384 images, and
ends with the same bytes on the same machine and number of threads. Memory: five times the centers,
a piece of rows, and 8 bytes for each row that k-means looks at.
"""

# Shape suffixes: N = images, K = clusters of an image, n = images at hand, C = clusters,
# D = embedding, M = rows that k-means looks at.

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from partialfc.commands._cluster import kmeans
from partialfc.commands._cluster.assignment import LABELS, Journal, assign
from partialfc.commands._cluster.rows import PIECE, Rows
from partialfc.commands._command import command_parser, in_pieces
from partialfc.commands._numbers import positive
from partialfc.writing import atomic_write

FORMAT = "partialfc cluster 1"
CENTERS, _STATE = "centers.npy", "kmeans.safetensors"


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    import faiss  # noqa: F401  # before anything is read

    rows = Rows(options.embeddings)
    if options.clusters > rows.count:
        raise ValueError(
            f"--clusters {options.clusters:,}: {options.embeddings} has {rows.count:,} rows, and "
            "no more clusters can be made of them."
        )
    if options.top > options.clusters:
        raise ValueError(f"--top {options.top}: must be at most --clusters {options.clusters}.")
    made = {
        "format": FORMAT,
        "embeddings": rows.digest,
        "clusters": options.clusters,
        "top": options.top,
        "iterations": options.iterations,
        "seed": options.seed,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out / "cluster.json", made)
    if journal.results is not None:
        print(f"{options.out}: it is made already; cluster.json has its numbers.")
        return 0
    return in_pieces("cluster", lambda: _cluster(rows, made, options.out, journal))


def _cluster(rows: Rows, made: dict[str, Any], folder: Path, journal: Journal) -> int:
    clusters, iterations = made["clusters"], made["iterations"]
    state, digest = folder / _STATE, json.dumps(made, sort_keys=True)
    place_M, first = kmeans.begin(rows, clusters, made["seed"])
    now = kmeans.read(state, (clusters, rows.dim), digest) or first
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("k-means", total=iterations * len(place_M))
        bar.advance(task, now.iteration * len(place_M))
        while now.iteration < iterations:
            better = kmeans.improve(rows, place_M, now, lambda done: bar.advance(task, done))
            if np.array_equal(better.center_CD, now.center_CD):
                break
            now = better
            kmeans.write(state, now, digest)
            bar.update(task, description=f"k-means: mean cosine {now.cosine:.4f}")
        bar.update(task, completed=iterations * len(place_M))
        with atomic_write(folder / CENTERS) as partial, partial.open("wb") as file:
            np.save(file, now.center_CD)
        task = bar.add_task("labels", total=rows.images)
        assign(rows, now.center_CD, made["top"], folder, journal, lambda n: bar.advance(task, n))
    results = _results(folder, clusters, now)
    journal.reached(rows.images, results)
    state.unlink(missing_ok=True)
    sizes = results["images_of_a_cluster"]
    print(
        f"{folder}: {rows.count:,} of {rows.images:,} images in {clusters:,} clusters of "
        f"{sizes['least']:,} to {sizes['most']:,} images, {sizes['median']:,} in the middle; "
        f"k-means took {now.iteration} iterations"
    )
    return 0


def _results(folder: Path, clusters: int, found: kmeans.Clusters) -> dict[str, Any]:
    """Sizes of the clusters, by the nearest one of each image."""
    count = np.zeros(clusters, np.int64)
    label_NK = np.lib.format.open_memmap(folder / LABELS, mode="r")
    for start in range(0, len(label_NK), PIECE):
        own_n = label_NK[start : start + PIECE, 0]
        count += np.bincount(own_n[own_n >= 0], minlength=clusters)
    share = np.percentile(count, (0, 50, 100)).astype(int).tolist()
    return {
        "iterations": found.iteration,
        "mean_cosine": None if math.isnan(found.cosine) else found.cosine,
        "empty": int((count == 0).sum()),
        "images_of_a_cluster": dict(zip(("least", "median", "most"), share, strict=True)),
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("cluster", __doc__)
    parser.add_argument("embeddings", type=Path, help="a .npy of partialfc embed")
    parser.add_argument("--clusters", type=positive, required=True, help="how many")
    parser.add_argument("--top", type=positive, default=1, help="nearest of each image (1)")
    parser.add_argument("--iterations", type=positive, default=20, help="at most (20)")
    parser.add_argument("--seed", type=_seed, default=2048, help="of what is drawn (2048)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    return parser


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**63:
        raise argparse.ArgumentTypeError(f"{word}: must be an integer in [0, 2^63)")
    return int(word)
