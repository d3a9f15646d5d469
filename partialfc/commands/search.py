"""Find faces in a gallery, or compare them one by one, in files of partialfc embed.

    partialfc search people.parquet photos.parquet --top 5               # nearest neighbours
    partialfc search people.parquet photos.parquet --threshold 0.35
    partialfc search people.npy photos.npy --calibrate labelled.npy --far 1e-4 --out found.csv
    partialfc search left.npy right.npy --pairs --threshold 0.35     # row i against row i

Scores are cosines, exact, by faiss. With a threshold, a cosine too, a query that does not exceed it
is nobody's. --calibrate takes the threshold from embeddings with identities: the one that at most
the part --far of all pairs of different identities exceeds. That holds for images like those;
measure it on your own.
"""

# Shape suffixes: G = gallery, Q = queries, N = rows of a file, K = places that are found,
# D = embedding.

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from partialfc.commands._command import command_parser
from partialfc.commands._embed.files import Embeddings, read_embeddings
from partialfc.commands._numbers import cosine, positive, rate
from partialfc.protocols import unit_rows
from partialfc.protocols.all_to_all import combine, search
from partialfc.writing import atomic_write

SHOWN = 20
CHUNK = 4096
FAR = 1e-4
Rows = list[tuple[str, int, str, str, float]]
"""Query, rank, what is found, its identity, cosine."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.calibrate is not None and options.threshold is not None:
        parser.error("--threshold and --calibrate: give one of them.")
    if options.far is not None and options.calibrate is None:
        parser.error("--far: needs --calibrate with embeddings of known identities.")
    if options.pairs and options.top is not None:
        parser.error("--top: not with --pairs, where each row has one other.")
    gallery, queries = read_embeddings(options.gallery), read_embeddings(options.queries)
    if gallery.rows_ND.shape[1] != queries.rows_ND.shape[1]:
        raise ValueError(
            f"{options.gallery} has embeddings of {gallery.rows_ND.shape[1]}, "
            f"{options.queries} of {queries.rows_ND.shape[1]}; both must be of one model."
        )
    threshold = options.threshold
    if options.calibrate is not None:
        far = FAR if options.far is None else options.far
        threshold = calibrated(read_embeddings(options.calibrate), far)
        print(f"threshold {threshold:.6f}: at most {far:g} of different pairs exceed it")
    rows = compare(gallery, queries) if options.pairs else find(gallery, queries, options.top or 1)
    if options.out is not None:
        _write(options.out, rows, threshold)
    _show(rows, threshold)
    if threshold is not None:
        accepted = sum(row[4] > threshold for row in rows if row[1] == 1)
        print(f"{accepted:,} of {len(queries.names):,} queries have a score above {threshold:.4f}")
    else:
        print("Nearest neighbours; --threshold or --calibrate says which are the same person.")
    return 0


def find(gallery: Embeddings, queries: Embeddings, top: int) -> Rows:
    """Return the ``top`` nearest of the gallery for every query, the nearest first."""
    import faiss

    unit_GD = unit_rows(gallery.rows_ND, "gallery").astype(np.float32)
    unit_QD = unit_rows(queries.rows_ND, "queries").astype(np.float32)
    index = faiss.IndexFlatIP(unit_GD.shape[1])
    index.add(unit_GD)
    top = min(top, len(unit_GD))
    rows: Rows = []
    for start in range(0, len(unit_QD), CHUNK):
        scores, places = index.search(unit_QD[start : start + CHUNK], top)
        for query, (score_K, place_K) in enumerate(zip(scores, places, strict=True), start):
            for rank, (score, place) in enumerate(zip(score_K, place_K, strict=True), 1):
                rows.append(_row(queries.names[query], rank, gallery, int(place), score))
    return rows


def compare(left: Embeddings, right: Embeddings) -> Rows:
    """Return the score of row i of one with row i of the other.

    Raises:
        ValueError: If they are not equally many.
    """
    if len(left.names) != len(right.names):
        raise ValueError(f"--pairs: {len(left.names)} rows and {len(right.names)}; must be equal.")
    scores: NDArray[np.float64] = np.einsum(
        "nd,nd->n", unit_rows(left.rows_ND, "left"), unit_rows(right.rows_ND, "right")
    )
    return [
        _row(name, 1, left, place, score)
        for place, (name, score) in enumerate(zip(right.names, scores, strict=True))
    ]


def calibrated(known: Embeddings, far: float) -> float:
    """Return the cosine that at most the part ``far`` of pairs of two identities exceeds.

    Raises:
        ValueError: If identities are missing, or pairs are too few to tell.
    """
    if "" in known.identities:
        raise ValueError("--calibrate: an image has no identity; it is the name of its folder.")
    identity_N = np.unique(known.identities, return_inverse=True)[1]
    part = search(known.rows_ND, identity_N, (far,))
    found = combine([part], identity_N, (far,))
    threshold = found.threshold_at_far[far]
    if not math.isfinite(threshold):
        raise ValueError(
            f"--far {far:g}: {found.num_impostor:,} pairs of different identities are too few; "
            f"at least {math.ceil(1 / far):,} are needed."
        )
    return threshold


def _row(
    query: str, rank: int, gallery: Embeddings, place: int, score: Any
) -> tuple[str, int, str, str, float]:
    return query, rank, gallery.names[place], gallery.identities[place], float(score)


def _write(path: Path, rows: Rows, threshold: float | None) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        more = [] if threshold is None else ["accepted"]
        writer.writerow(["query", "rank", "found", "identity", "cosine", *more])
        for *words, score in rows:
            accepted = [] if threshold is None else [int(score > threshold)]
            writer.writerow([*words, f"{score:.6f}", *accepted])


def _show(rows: Rows, threshold: float | None) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("query", "rank", "found", "identity", "cosine", ""):
        table.add_column(column, overflow="fold")
    for query, rank, name, identity, score in rows[:SHOWN]:
        mark = "" if threshold is None else "yes" if score > threshold else "no"
        table.add_row(query, str(rank), name, identity, f"{score:.4f}", mark)
    Console(markup=False).print(table)
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN:,} more; --out writes all")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("search", __doc__)
    parser.add_argument("gallery", type=Path, help="embeddings to search in")
    parser.add_argument("queries", type=Path, help="embeddings to search for")
    parser.add_argument("--top", type=positive, help="nearest of each query (1)")
    parser.add_argument("--pairs", action="store_true", help="row i against row i instead")
    parser.add_argument(
        "--threshold", type=cosine, help="cosine that is exceeded by the same person"
    )
    parser.add_argument("--calibrate", type=Path, help="embeddings that give the threshold")
    parser.add_argument("--far", type=rate, help=f"false accept rate of --calibrate ({FAR:g})")
    parser.add_argument("--out", type=Path, help="a .csv file for all results")
    return parser
