"""Find the people that two data sets have in common, and those that a test set has too.

    partialfc overlap a.rec b.rec --model runs/mine --far 1e-7 --out common
    partialfc overlap a.rec b.rec --model model.pt --threshold 0.6 --out common
    partialfc overlap a.rec --against lfw.bin test.rec --model runs/mine --far 1e-7 --out leaks
    torchrun --nproc-per-node=8 -m partialfc overlap a.rec b.rec --model runs/mine ...

A data set is a pack, a folder or a list, or several with commas, as data.train of one set has
them. Each identity is the mean of its embeddings. One whose nearest identity of the other data set
has a cosine above the threshold is the same person.

OUT gets overlap.csv with the pairs, nearest first; map.tsv, which says which identities of B are
those of A, so that they train one class center (data.sets.NAME.map); skip.jsonl, a list that leaves
the images of these identities of B out (data.skip); and overlap.json. With --against, leak.csv has
the identities of A and B that a test set has too, and leak_a.jsonl and leak_b.jsonl leave their
images out. A test set is a data set, or a .bin of pairs, whose images are compared one by
one with the same threshold.

--far takes the threshold from the data sets themselves: the cosine that at most this part of all
pairs of two identities of one data set exceeds; of two data sets, the larger. So about
far * identities of A * identities of B pairs are found by chance. Two identities of one data set
that are one person raise the threshold, so fewer are found.
"""

# Shape suffixes: M = identities with a usable image, Q = those that are looked for, n = samples at
# hand, D = embedding.

import argparse
import csv
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._numbers import cosine, positive, rate
from partialfc.commands.evaluate import AUTOCAST, embedder, settings_of
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.identity_map import write_identity_map
from partialfc.data.sets.pairs import read_pairs
from partialfc.data.skip_list import write_skip_list
from partialfc.evaluation.embedding import embed_images
from partialfc.evaluation.means import Means, People, mean_embeddings, people_of, single_images
from partialfc.protocols.all_to_all import combine, search
from partialfc.protocols.nearest import nearest
from partialfc.runtime.process import Runtime, running
from partialfc.writing import atomic_write, write_json

_MOST_OF_A_SET = 100_000
"""Identities of a data set whose pairs give the threshold: 5e9 pairs, 22 s on two cores."""

_LETTERS = ("a", "b")


class Same(NamedTuple):
    """An identity of a data set that is one of another."""

    identity: int
    other: int
    cosine: float


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if len(options.sets) > 2 or (len(options.sets) < 2 and not options.against):
        parser.error("name two data sets, or one and --against with test sets.")
    datasets = [open_dataset([Path(path) for path in word.split(",")]) for word in options.sets]
    if options.far is not None:  # before hours of embedding
        _enough_pairs(options.far, [_pairs_of(dataset.num_identities) for dataset in datasets])
    tests = [_test_set(path) for path in options.against]
    options.out.mkdir(parents=True, exist_ok=True)
    with running(settings_of(options.device)) as runtime:
        everyone = [*map(people_of, datasets), *tests]
        found = _means(options, everyone, runtime)
    # The others have left: nobody waits for a search that may be long.
    if means := [one for one in found if one is not None]:
        _report(options, datasets, everyone, means, runtime.device)
    return 0


def _test_set(path: Path) -> People:
    if path.suffix == ".bin":
        return single_images(str(path), read_pairs(path))
    return people_of(open_dataset([path]))


def _means(
    options: argparse.Namespace, everyone: list[People], runtime: Runtime
) -> list[Means | None]:
    """The mean embeddings of all sets. Collective."""
    trained = open_backbone(options.model, image_size=options.image_size)
    trained.require_images()
    flip = trained.config.verification.flip if trained.config else True
    embed = partial(
        embed_images,
        embedder(trained, runtime, options.precision),
        runtime=runtime,
        size=trained.known.image_size,
        flip=flip if options.flip is None else options.flip,
        threads=options.threads,
    )
    found = []
    with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:
        for people in everyone:
            task = bar.add_task(escape(people.name), total=people.images)
            found.append(
                mean_embeddings(
                    people,
                    embed,
                    runtime,
                    size=trained.known.image_size,
                    folder=options.out,
                    progress=partial(bar.advance, task),
                )
            )
    return found


def _report(
    options: argparse.Namespace,
    datasets: list[DataSet],
    everyone: list[People],
    means: list[Means],
    device: torch.device,
) -> None:
    """Find the same people, write the files and print the numbers."""
    for people, one in zip(everyone, means, strict=True):
        if not len(one.identity_M):
            raise ValueError(f"{people.name}: none of its images can be used.")
    count = len(datasets)
    find = partial(same_people, device=device)
    threshold = options.threshold
    if threshold is None:
        threshold = threshold_at(options.far, means[:count], device=device)
    facts = {
        "model": str(options.model),
        "threshold": threshold,
        "far": options.far,
        "sets": [
            {
                "name": people.name,
                "identities": len(one.identity_M),
                "images": people.images,
                "unusable": one.unusable,
            }
            for people, one in zip(everyone, means, strict=True)
        ],
    }
    for people, one in zip(everyone, means, strict=True):
        print(
            f"{people.name}: {len(one.identity_M):,} identities of {people.images:,} images, "
            f"{one.unusable:,} of them cannot be used"
        )
    print(f"threshold {threshold:.6f}" + (f" at a FAR of {options.far:g}" if options.far else ""))
    if count == 2:
        facts["common"] = _write_common(options, datasets, find(means[1], means[0], threshold))
        chance = (options.far or math.nan) * len(means[0].identity_M) * len(means[1].identity_M)
        told = "" if math.isnan(chance) else f", about {chance:.2g} of them by chance"
        a, b = (dataset.name for dataset in datasets)
        print(f"{facts['common']:,} identities of {b} are in {a}{told}")
    if options.against:
        leaks = {
            (number, test): find(means[number], means[count + test], threshold)
            for number in range(count)
            for test in range(len(options.against))
        }
        facts["leaks"] = _write_leaks(options, datasets, leaks)
    write_json(options.out / "overlap.json", facts)
    print(f"{options.out}: {', '.join(_written(count, bool(options.against)))}")


def same_people(
    queries: Means, gallery: Means, threshold: float, *, device: torch.device
) -> list[Same]:
    """Return who is in both: each of the queries whose nearest of the gallery is above the
    threshold, the nearest pair first."""
    found = nearest(queries.unit_MD, gallery.unit_MD, device=device)
    above_M = np.flatnonzero(found.cosine_Q > threshold)
    above_M = above_M[np.argsort(-found.cosine_Q[above_M], kind="stable")]
    columns = queries.identity_M[above_M], gallery.identity_M[found.place_Q[above_M]]
    lists = (column.tolist() for column in (*columns, found.cosine_Q[above_M]))
    return [Same(*row) for row in zip(*lists, strict=True)]


def threshold_at(far: float, means: list[Means], *, device: torch.device) -> float:
    """Return the cosine that at most the part ``far`` of the pairs of two identities of one data
    set exceeds: the larger of the data sets that have enough pairs to tell.

    Raises:
        ValueError: If none has.
    """
    pairs = [_pairs_of(len(one.identity_M)) for one in means]
    _enough_pairs(far, pairs)
    thresholds = []
    for one, count in zip(means, pairs, strict=True):
        if not _tells(far, count):
            continue
        unit_MD = one.unit_MD[:: _step(len(one.unit_MD))]
        identity_M = np.arange(len(unit_MD))
        part = search(unit_MD, identity_M, (far,), device=device)
        thresholds.append(combine([part], identity_M, (far,)).threshold_at_far[far])
    return max(thresholds)


def _step(identities: int) -> int:
    """Every how many of them are taken for the threshold."""
    return max(1, -(-identities // _MOST_OF_A_SET))


def _pairs_of(identities: int) -> int:
    """How many pairs of two identities give the threshold."""
    taken = -(-identities // _step(identities))
    return taken * (taken - 1) // 2


def _tells(far: float, pairs: int) -> bool:
    """Whether one pair of so many is at most this part of them, as ``combine`` counts."""
    return far * pairs + 1e-9 >= 1


def _enough_pairs(far: float, pairs: list[int]) -> None:
    if not _tells(far, max(pairs)):
        raise ValueError(
            f"--far {far:g}: {max(pairs):,} pairs of two identities of one data set are too few to "
            f"tell; at least {math.ceil(1 / far):,} are needed. Give a larger one, or --threshold."
        )


def _write_common(options: argparse.Namespace, datasets: list[DataSet], pairs: list[Same]) -> int:
    first, second = datasets
    _write_csv(
        options.out / "overlap.csv",
        ("identity of b", "identity of a", "cosine"),
        ((one.identity, one.other, f"{one.cosine:.6f}") for one in pairs),
    )
    write_identity_map(
        options.out / "map.tsv",
        ((one.identity, one.other) for one in pairs),
        of=second,
        onto=first,
    )
    why = {one.identity: f"identity {one.other} of {first.name}" for one in pairs}
    _write_skipped(options.out / "skip.jsonl", second, why)
    return len(pairs)


def _write_leaks(
    options: argparse.Namespace,
    datasets: list[DataSet],
    leaks: dict[tuple[int, int], list[Same]],
) -> list[dict[str, object]]:
    """Write the leaks, and a list of each data set without them; return their numbers."""
    names, tests = [dataset.name for dataset in datasets], [str(path) for path in options.against]
    _write_csv(
        options.out / "leak.csv",
        ("data set", "identity", "test set", "identity or image", "cosine"),
        (
            (names[number], one.identity, tests[test], one.other, f"{one.cosine:.6f}")
            for (number, test), found in leaks.items()
            for one in found
        ),
    )
    for number, dataset in enumerate(datasets):
        why = {
            one.identity: f"in {tests[test]}"
            for (of, test), found in leaks.items()
            for one in found
            if of == number
        }
        _write_skipped(options.out / f"leak_{_LETTERS[number]}.jsonl", dataset, why)
    facts = []
    for (number, test), found in leaks.items():
        others = len({one.other for one in found})
        print(f"{len(found):,} identities of {names[number]} are in {tests[test]}")
        facts.append(
            {"set": names[number], "test": tests[test], "identities": len(found), "of it": others}
        )
    return facts


def _write_skipped(path: Path, dataset: DataSet, why: dict[int, str]) -> None:
    """Write a list of all images of some identities."""
    wanted = np.fromiter(why, np.int64, len(why))

    def records() -> Iterator[tuple[int, int]]:
        people = people_of(dataset)
        for start in range(0, len(dataset), 1 << 16):
            sample_n = np.arange(start, min(start + (1 << 16), len(dataset)))
            identity_n = people.identities_of(sample_n)
            its_n = np.isin(identity_n, wanted)
            yield from zip(sample_n[its_n].tolist(), identity_n[its_n].tolist(), strict=True)

    write_skip_list(path, (dataset.bad(sample, why[identity]) for sample, identity in records()))


def _written(count: int, leaks: bool) -> list[str]:
    """The files of a report."""
    files = ["overlap.json"]
    if count == 2:
        files += ["overlap.csv", "map.tsv", "skip.jsonl"]
    if leaks:
        files += ["leak.csv", *(f"leak_{letter}.jsonl" for letter in _LETTERS[:count])]
    return files


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("overlap", __doc__)
    parser.add_argument("sets", nargs="+", metavar="SET", help="data set A, and data set B")
    parser.add_argument("--model", type=Path, required=True, help="run, checkpoint or weights")
    add_plugin_option(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--far", type=rate, help="false accept rate of pairs of two identities")
    which.add_argument("--threshold", type=cosine, help="cosine that the same person exceeds")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="TEST", help="test sets"
    )
    parser.add_argument("--threads", type=positive, default=4, help="that decode, a rank (4)")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32", help="(fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--image-size", type=positive, default=112, help="of a file's model (112)")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="add the mirrored image (as the run did; files: yes)",
    )
    return parser
