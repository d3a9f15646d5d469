"""Split a folder of identities into train, validation and test, so that none is in two of them.

    partialfc split photos split --validation 0.1 --test 0.2
    partialfc pack split/train packs/train.rec

An identity goes whole into one part, chosen by the seed and its place among the sorted names. OUT
gets train/, validation/ and test/ with links to the images, and two lists for the identification
rate at a false-positive rate: test/query.txt, images of test identities that have several, and
test/distractors.txt, images of the other test identities. A line is a path inside test/, a tab, and
the identity. The lists are for your own protocol: nothing here reads them.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from partialfc.commands._command import command_parser, tracked
from partialfc.commands._pack.sources import SUFFIXES
from partialfc.keyed import key, permute

Images = dict[str, list[Path]]

PARTS = ("train", "validation", "test")
PUT: dict[str, Callable[[Path, Path], object]] = {
    "symlink": lambda source, target: target.symlink_to(os.path.relpath(source, target.parent)),
    "hardlink": lambda source, target: os.link(source, target),
    "copy": shutil.copy2,
}


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("split", __doc__)
    parser.add_argument("source", type=Path, help="folder with one folder of images per identity")
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--validation", type=float, default=0.1, help="part of identities (0.1)")
    parser.add_argument("--test", type=float, default=0.1, help="part of identities (0.1)")
    parser.add_argument(
        "--distractors", type=float, default=0.5, help="part of test identities (0.5)"
    )
    parser.add_argument("--seed", type=int, default=2048, help="another one splits differently")
    parser.add_argument("--put", choices=sorted(PUT), default="symlink", help="symlink by default")
    options = parser.parse_args(arguments)
    for name in ("validation", "test", "distractors"):
        if not 0 <= getattr(options, name) < 1:
            parser.error(f"--{name} must be in [0, 1), got {getattr(options, name)}.")
    if options.validation + options.test >= 1:
        parser.error(
            f"--validation {options.validation} and --test {options.test} leave nothing to train"
            " on."
        )
    if options.out.exists():
        parser.error(f"{options.out} exists already; choose a new folder.")
    out = options.out.parent.resolve() / options.out.name  # relative links need the real folder
    images = images_of(options.source.resolve())
    shares = {"validation": options.validation, "test": options.test}
    parts = split(sorted(images), shares, options.seed)
    query, distractors = query_and_distractors(
        {name: images[name] for name in parts["test"]}, options.distractors, options.seed
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Links are relative to where they lie, so the folder is made beside its final place.
        for part, names in parts.items():
            for name in tracked(names, f"{part}: {len(names)} identities"):
                folder = partial / part / name
                folder.mkdir(parents=True)
                for image in images[name]:
                    PUT[options.put](image, folder / image.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{error}\nNothing was made; --put symlink or copy may work.", file=sys.stderr)
        return 2
    (partial / "test").mkdir(parents=True, exist_ok=True)
    write_list(partial / "test" / "query.txt", query, images)
    write_list(partial / "test" / "distractors.txt", distractors, images)
    partial.rename(out)
    counts = {part: sum(len(images[name]) for name in names) for part, names in parts.items()}
    for part in PARTS:
        print(f"{part:<10} {len(parts[part]):>9,} identities {counts[part]:>11,} images")
    print(f"{len(query):,} query identities, {len(distractors):,} of distractors in the lists")
    return 0


def images_of(source: Path) -> Images:
    """Return the sorted images of every identity that has one.

    Raises:
        OSError: If the folder cannot be read.
        ValueError: If it holds fewer than three identities.
    """
    found: Images = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        images = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        if images:
            found[folder.name] = sorted(image.absolute() for image in images)
    if len(found) < 3:
        raise ValueError(
            f"{source}: {len(found)} folders with images, and three parts need three identities. "
            "It must hold one folder of images per identity."
        )
    return found


def split(
    identities: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, list[str]]:
    """Return the sorted identities of each part; every one is in exactly one.

    Args:
        identities: Sorted names.
        shares: Part of the identities by name of the part, at least one where it is above 0; the
            rest is ``train``.
        seed: Of the choice.
    """
    count = len(identities)
    order = permute(np.arange(count), count, key(seed, "split")).tolist()
    parts, start = {}, 0
    for name, share in shares.items():
        size = max(1, round(share * count)) if share else 0
        parts[name] = sorted(identities[i] for i in order[start : start + size])
        start += size
    if start >= count:
        sizes = " and ".join(f"{len(parts[name])} for {name}" for name in shares)
        raise ValueError(
            f"{count} identities are too few: {sizes} leave none to train on. "
            "Ask for smaller shares."
        )
    return {"train": sorted(identities[i] for i in order[start:]), **parts}


def query_and_distractors(images: Images, share: float, seed: int) -> tuple[list[str], list[str]]:
    """Return the test identities that are looked for, and those that nobody is looked for among.

    An identity with one image has no pair, so it is a distractor.
    """
    several = sorted(name for name in images if len(images[name]) > 1)
    count = min(len(several), round((1 - share) * len(images)))
    order = permute(np.arange(count), max(1, len(several)), key(seed, "distractors"))
    query = sorted(several[i] for i in order.tolist())
    return query, sorted(set(images) - set(query))


def write_list(path: Path, names: Sequence[str], images: Images) -> None:
    """Write a line for every image of some identities."""
    lines = [f"{name}/{image.name}\t{name}\n" for name in names for image in images[name]]
    path.write_text("".join(lines), encoding="utf-8")
