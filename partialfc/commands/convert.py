"""Convert packs and verification sets.

    partialfc convert pack A.rec B.rec OUT.rec --drop bad.jsonl  # merge, leave out, renumber
    partialfc convert pack A.rec OUT.rec --layout plain          # images and nothing else
    partialfc convert split A.rec PARTS --parts 4                # 4 packs that are A together
    partialfc convert folder A.rec FOLDER                        # <identity>/<image>.jpg
    partialfc convert bin PAIRS.txt OUT.bin                      # lines: path, path, 0 or 1
    partialfc convert bin pairsDevTest.txt OUT.bin --images lfw  # LFW's own lists
    partialfc convert pairs IN.bin FOLDER                        # images and pairs.txt

JPEG bytes are never encoded again. Identities of a pack follow those of the packs before it; those
that are left without an image are taken out (--keep-empty keeps them and their numbers). For a pack
A.rec there may be a folder, a list or tar shards, also at a URL. OUT.identities.json lists the name
of each, or its old number where the packs have no names.
"""

# Shape suffixes: N = images, C = identities.

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.commands._command import command_parser, tracked
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.images.formats import is_png
from partialfc.data.names import names_of, names_path
from partialfc.data.packs.writer import PackWriter, write_insightface_pack
from partialfc.data.sets.pair_lists import read_pair_list
from partialfc.data.sets.pairs import read_pairs, write_pairs


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("convert", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="packs to one pack")
    pack.add_argument("packs", type=Path, nargs="+", metavar="IN.rec")
    pack.add_argument("out", type=Path, metavar="OUT.rec")
    pack.add_argument("--layout", choices=("insightface", "plain"), default="insightface")
    pack.add_argument("--drop", type=Path, action="append", default=[], help="list of bad records")
    pack.add_argument("--keep-empty", action="store_true", help="identities without images stay")
    pack.set_defaults(run=to_pack)

    split = commands.add_parser("split", help="a pack to several, cut between identities")
    split.add_argument("pack", type=Path, metavar="IN.rec")
    split.add_argument("out", type=Path, metavar="FOLDER")
    split.add_argument("--parts", type=int, required=True)
    split.set_defaults(run=to_parts)

    folder = commands.add_parser("folder", help="a pack to a folder of folders")
    folder.add_argument("pack", type=Path, metavar="IN.rec")
    folder.add_argument("out", type=Path, metavar="FOLDER")
    folder.set_defaults(run=to_folder)

    bin_ = commands.add_parser("bin", help="a list of pairs to an LFW-style .bin")
    bin_.add_argument("list", type=Path, metavar="PAIRS.txt")
    bin_.add_argument("out", type=Path, metavar="OUT.bin")
    bin_.add_argument("--images", type=Path, help="folder that the paths begin at (the list's)")
    bin_.set_defaults(run=to_bin)

    pairs = commands.add_parser("pairs", help="an LFW-style .bin to a folder and its list of pairs")
    pairs.add_argument("bin", type=Path, metavar="IN.bin")
    pairs.add_argument("out", type=Path, metavar="FOLDER")
    pairs.set_defaults(run=to_pairs)

    options = parser.parse_args(arguments)
    if options.out.exists():
        raise ValueError(f"{options.out} exists already: remove it, or choose another name.")
    options.run(options)
    return 0


def to_pack(options: argparse.Namespace) -> None:
    """Merge packs, leave listed records out and number the identities anew."""
    dataset = open_dataset(options.packs, options.drop)
    identity_N = dataset.labels()
    old_C = np.arange(dataset.num_identities)
    if not options.keep_empty:
        old_C, identity_N = np.unique(identity_N, return_inverse=True)
    write_pack(options.out, dataset, identity_N, len(old_C), options.layout)
    names = names_of(dataset)
    if names or not options.keep_empty:
        kept = [names[old] if names else old for old in old_C.tolist()]
        text = json.dumps(kept, indent=0) + "\n"
        names_path(options.out).write_text(text, encoding="utf-8")
    print(
        f"{options.out}: {len(dataset):,} images of {len(old_C):,} identities; "
        f"{dataset.num_skipped:,} images and {dataset.num_identities - len(old_C):,} identities "
        f"left out"
    )


def to_parts(options: argparse.Namespace) -> None:
    """Cut a pack between identities into parts of about as many images."""
    dataset = open_dataset([options.pack])
    identity_N = dataset.labels()
    some, count = np.unique(identity_N, return_counts=True)  # identities that have images
    if not 1 <= options.parts <= len(some):
        raise ValueError(
            f"--parts must be in [1, {len(some)}], the identities with images, got {options.parts}."
        )
    cut = np.arange(1, options.parts)
    at = np.searchsorted(np.cumsum(count), cut * len(dataset) / options.parts) + 1
    at = np.minimum.accumulate(np.minimum(at, len(some) - cut[::-1])[::-1])[::-1]
    at = np.maximum.accumulate(np.maximum(at, cut) - cut) + cut  # no part is empty
    edges = [0, *some[at].tolist(), dataset.num_identities]
    options.out.mkdir()
    for part, (first, end) in enumerate(pairwise(edges)):
        path = options.out / f"{options.pack.stem}_{part:03d}.rec"
        chosen = np.flatnonzero((identity_N >= first) & (identity_N < end))
        write_pack(
            path, dataset, identity_N[chosen] - first, end - first, "insightface", samples=chosen
        )
        print(f"{path}: {len(chosen):,} images, identities {first} to {end - 1}")


def to_folder(options: argparse.Namespace) -> None:
    """Write every image as it is, one folder for each identity."""
    dataset = open_dataset([options.pack])
    width = len(str(max(dataset.num_identities - 1, 0)))
    labels = dataset.labels().tolist()
    images = dataset.jpegs(np.arange(len(labels)))
    for (sample, identity), image in zip(
        tracked(list(enumerate(labels)), "images"), images, strict=True
    ):
        folder = options.out / f"{identity:0{width}d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample:08d}{ending_of(image)}").write_bytes(image)
    print(f"{options.out}: {len(labels):,} images of {len(set(labels)):,} identities")


def to_bin(options: argparse.Namespace) -> None:
    """Write the images of a list of pairs, paths relative to the list or to ``--images``."""
    folder, pairs = read_pair_list(options.list, options.images)
    files = [folder / file for pair in pairs for file in (pair.first, pair.second)]
    images = [file.read_bytes() for file in tracked(files, "images")]
    same = [pair.same for pair in pairs]
    write_pairs(options.out, images, same)
    print(f"{options.out}: {len(same):,} pairs, {sum(same):,} of one identity")


def to_pairs(options: argparse.Namespace) -> None:
    """Write the images of a .bin and the list that makes it again; pixels become .png files."""
    found = read_pairs(options.bin)
    options.out.mkdir(parents=True)
    names = []
    for number, image in enumerate(tracked(found.images, "images")):
        pair, side = divmod(number, 2)
        ending = ending_of(image) if isinstance(image, bytes) else ".png"
        name = f"{pair:06d}_{'ab'[side]}{ending}"
        if isinstance(image, bytes):
            (options.out / name).write_bytes(image)
        else:
            Image.fromarray(np.ascontiguousarray(image)).save(options.out / name)
        names.append(name)
    lines = zip(names[0::2], names[1::2], found.same.tolist(), strict=True)
    text = "".join(f"{a}\t{b}\t{int(same)}\n" for a, b, same in lines)
    (options.out / "pairs.txt").write_text(text, encoding="utf-8")
    print(f"{options.out / 'pairs.txt'}: {len(found.same):,} pairs")


def ending_of(image: bytes) -> str:
    """Return how the name of an image's file ends, ``.jpg`` or ``.png``."""
    return ".png" if is_png(np.frombuffer(image[:8], np.uint8)) else ".jpg"


def write_pack(
    path: Path,
    dataset: DataSet,
    identity_N: NDArray[np.int64],
    num_identities: int,
    layout: str,
    samples: NDArray[np.int64] | None = None,
) -> None:
    """Write samples of a data set, all by default, with identities [N] of their own."""
    samples = np.arange(len(dataset)) if samples is None else samples
    order = np.arange(len(samples))
    if layout == "insightface":
        order = np.argsort(identity_N, kind="stable")

    def images() -> Iterator[tuple[int, bytes]]:
        jpegs = dataset.jpegs(samples[order])
        for i, jpeg in zip(tracked(order.tolist(), path.name), jpegs, strict=True):
            yield int(identity_N[i]), jpeg

    if layout == "insightface":
        write_insightface_pack(path, images(), num_identities)
        return
    with PackWriter(path) as writer:
        for key, (identity, jpeg) in enumerate(images()):
            writer.write(key, identity, jpeg)
