"""Split a folder of identities into train, validation and test, so that none is in two of them.

    partialfc split photos split --validation 0.1 --test 0.2 --pairs 6000
    partialfc split lfw split --people peopleDevTrain.txt --validation 0
    partialfc train configs/my_photos.toml data.train=split/train

An identity goes whole into one part, chosen by the seed and its place among the sorted names; with
--people the named ones make train and validation, and all others test. OUT gets train/, validation/
and test/ with hard links to the images, or copies where the file system has none.

--pairs writes so many pairs of each held-out part, half of them of one person: validation.bin and
test.bin for verification, images as partialfc pack stores them, and their list in pairs.txt of the
part (path, path, 1 for one person). test/query.txt (images of test identities that have several)
and test/distractors.txt (of the others) are for a protocol of your own: path, identity.
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from partialfc.commands._command import command_parser, tracked
from partialfc.commands._split.pairs import drawn_pairs
from partialfc.data.files.index import is_hidden, is_image
from partialfc.data.sets.pairs import write_pairs
from partialfc.data.sets.people import read_people
from partialfc.data.tars.places import refuse_tars
from partialfc.errors import in_words
from partialfc.keyed import key, permute

Images = dict[str, list[Path]]

PARTS = ("train", "validation", "test")
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a file system that has no hard links, of two of them, and of files of others."""
_SIZE, _QUALITY = 112, 95
"""Of images in a .bin: what ``partialfc pack`` does if nothing else is said."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.people is not None and options.test is not None:
        parser.error("--test: with --people, test is everybody whom the list does not name.")
    options.test = 0.1 if options.test is None and options.people is None else options.test or 0.0
    _check(parser, options)
    out = options.out.parent.resolve() / options.out.name  # relative links need the real folder
    refuse_tars(options.source)  # before a URL becomes a path
    images = images_of(options.source.resolve())
    if options.people is None:
        shares = {"validation": options.validation, "test": options.test}
        parts = split(sorted(images), shares, options.seed)
    else:
        parts = split_by_list(images, options.people, options.validation, options.seed)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        fill(partial, parts, images, options)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(
            f"{in_words(error)}\nNothing was made; --put symlink or copy may work.", file=sys.stderr
        )
        return 2
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)
    for part in PARTS:
        count = sum(len(images[name]) for name in parts[part])
        print(f"{part:<10} {len(parts[part]):>9,} identities {count:>11,} images")
    return 0


def fill(
    out: Path, parts: Mapping[str, list[str]], images: Images, options: argparse.Namespace
) -> None:
    """Make a folder of parts: links are relative to where they lie, so beside its final place.

    Raises:
        OSError: If a file cannot be made.
        ValueError: If there are not as many pairs as asked for.
    """
    if options.pairs:  # before the links, as there may be too few
        out.mkdir()
        for part in PARTS[1:]:
            if parts[part]:
                of_part = {name: images[name] for name in parts[part]}
                write_pairs_of(out, part, of_part, options.pairs, options.seed)
    copied = 0
    for part, names in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        for name in tracked(names, f"{part}: {len(names)} identities"):
            folder = out / part / name
            folder.mkdir()
            for image in images[name]:
                copied += put(options.put, image, folder / image.name)
    if copied and options.put == "hardlink":
        print(f"{copied:,} images are copies: the file system of OUT cannot link to them.")
    query, distractors = query_and_distractors(
        {name: images[name] for name in parts["test"]}, options.distractors, options.seed
    )
    write_list(out / "test" / "query.txt", query, images)
    write_list(out / "test" / "distractors.txt", distractors, images)
    print(f"{len(query):,} query identities, {len(distractors):,} of distractors in the lists")


def put(how: str, source: Path, target: Path) -> bool:
    """Put an image where it belongs; return whether it is a copy.

    A link leads to the file itself, where ``source`` is a symbolic link: training follows none.
    """
    if how == "symlink":
        target.symlink_to(os.path.relpath(source, target.parent))
        return False
    file = source.resolve()
    if how == "hardlink":
        try:
            os.link(file, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            return False
    shutil.copy2(file, target)
    return True


def write_pairs_of(out: Path, part: str, images: Images, count: int, seed: int) -> None:
    """Write ``PART.bin`` and ``PART/pairs.txt``.

    Raises:
        ValueError: If there are fewer pairs.
    """
    from partialfc.commands.pack import Conversion  # Pillow and rich; --help needs none

    encode = Conversion(Path("/"), Path("/"), _SIZE, _QUALITY).jpeg
    pairs, jpegs = drawn_pairs(images, count, seed, lambda path: encode(str(path)))
    same = [left.parent == right.parent for left, right in pairs]
    files = [jpegs[image] for pair in pairs for image in pair]
    write_pairs(out / f"{part}.bin", files, same)
    (out / part).mkdir()
    lines = [
        "\t".join([*(f"{image.parent.name}/{image.name}" for image in pair), str(int(one))]) + "\n"
        for pair, one in zip(pairs, same, strict=True)
    ]
    (out / part / "pairs.txt").write_text("".join(lines), encoding="utf-8")
    print(f"{part}.bin: {count:,} pairs, half of them of one person")


def images_of(source: Path) -> Images:
    """Return the sorted images of every identity that has one; hidden files are none.

    Raises:
        OSError: If the folder cannot be read.
        ValueError: If it holds fewer than three identities, or tar shards.
    """
    refuse_tars(source)
    found: Images = {}
    for folder in sorted(p for p in source.iterdir() if p.is_dir() and not is_hidden(p.name)):
        images = [path for path in folder.iterdir() if is_image(path.name) and path.is_file()]
        if images:
            found[folder.name] = sorted(image.absolute() for image in images)
    if len(found) < 3:
        raise ValueError(
            f"{source}: {len(found)} folders with images, and three parts need three identities. "
            "It must hold one folder of images per identity."
        )
    return found


def split_by_list(
    identities: Mapping[str, object], path: Path, validation: float, seed: int
) -> dict[str, list[str]]:
    """Return the identities of each part, the listed ones in ``train`` and ``validation``.

    Listed people without a folder are told on stderr, and left out.

    Raises:
        OSError: If the list cannot be read.
        ValueError: If none of the listed people is there, or the list is none.
    """
    listed = read_people(path)
    here = sorted(name for name in listed if name in identities)
    if not here:
        raise ValueError(
            f"{path}: none of its {len(listed):,} people, such as {listed[0]!r}, has a folder; "
            f"folders are named like {next(iter(identities))!r}."
        )
    if missing := [name for name in listed if name not in identities]:
        print(
            f"{path}: {len(missing):,} of {len(listed):,} people have no folder with images: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            file=sys.stderr,
        )
    rest = set(identities) - set(here)
    return {**split(here, {"validation": validation}, seed), "test": sorted(rest)}


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


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("split", __doc__)
    parser.add_argument("source", type=Path, help="folder with one folder of images per identity")
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--validation", type=float, default=0.1, help="part of identities (0.1)")
    parser.add_argument("--test", type=float, help="part of identities (0.1)")
    parser.add_argument("--people", type=Path, help="list of names; see above")
    parser.add_argument("--pairs", type=int, default=0, help="of each held-out part; even, >= 20")
    parser.add_argument(
        "--distractors", type=float, default=0.5, help="part of test identities (0.5)"
    )
    parser.add_argument("--seed", type=int, default=2048, help="another one splits differently")
    parser.add_argument(
        "--put",
        choices=("copy", "hardlink", "symlink"),
        default="hardlink",
        help="(hardlink); training follows no symlink",
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with what is wrong with an option."""
    for name in ("validation", "test", "distractors"):
        if not 0 <= getattr(options, name) < 1:
            parser.error(f"--{name} must be in [0, 1), got {getattr(options, name)}.")
    if options.validation + options.test >= 1:
        parser.error(
            f"--validation {options.validation} and --test {options.test} leave nothing to train"
            " on."
        )
    if options.pairs and (options.pairs < 20 or options.pairs % 2):
        parser.error(f"--pairs must be even and at least 20, for ten folds; got {options.pairs}.")
    if options.out.exists():
        parser.error(f"{options.out} exists already; choose a new folder.")
