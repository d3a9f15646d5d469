"""Images to embeddings, in a .npy or .parquet file.

    partialfc embed runs/mine photos --out photos.parquet
    partialfc embed runs/mine photos --align --out photos.parquet
    partialfc embed model.pt photos --landmarks points.txt --out photos.npy
    torchrun --nproc-per-node=8 -m partialfc embed runs/mine faces.rec --out faces.npy

IMAGES is a folder (its images at any depth; the folder of an image is its identity) or a .rec pack.
Images are turned as their EXIF says, taken as aligned faces, and resized. With --align the largest
face of each is found and cut out first, as partialfc align does, which has other rules and other
detectors. With --landmarks, faces are cut out by the points of a file: a line for each image, its
path below the folder, then x y of left eye, right eye, nose, left and right corner of the mouth, in
pixels of the turned image.

A run on arrays embeds the rows of an .npy instead.

A .npy has names in a .csv beside it and, of a pack, a .origin.json that says which one: so it can
teach a run on that pack (losses.teacher.from).

An image that cannot be used is left out, told, and listed by --bad. Exit status: 0 all images are
embedded, 1 all but those, 2 nothing is.
"""

# Shape suffixes: N = images, D = embedding.

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from partialfc.alignment.aligner import Aligner, open_detector
from partialfc.alignment.landmarks import Points, read_landmarks
from partialfc.alignment.mean_face import unaligned
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._bad_files import HELP, Fault, end_of, ends_in_words, reason_of, tell_faults
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._embed.arrays import embed_array
from partialfc.commands._embed.files import Embeddings, write_embeddings
from partialfc.commands.evaluate import AUTOCAST, embedder, settings_of
from partialfc.data.files.index import SUFFIXES, is_hidden, is_image
from partialfc.data.images.formats import MOST_BYTES, decode_image
from partialfc.data.names import Names, own_names
from partialfc.data.packs.labels import BAD
from partialfc.data.packs.pack import open_pack
from partialfc.data.source import labels_of
from partialfc.data.tars.places import refuse_tars
from partialfc.data.vectors import Origin
from partialfc.distributed.ranks import sum_over_ranks
from partialfc.evaluation.embedding import embed_images
from partialfc.runtime.process import Runtime, running
from partialfc.writing import read_bytes

Pixels = NDArray[np.uint8]

_LOOKED_AT = 256
"""Images whose mean is looked at."""


@dataclass(frozen=True, slots=True)
class Images:
    """What is embedded.

    Attributes:
        names: Of the images, [N].
        identities: Of the images, or "" where they are not known; [N].
        read: Returns the RGB pixels of image i; ValueError or OSError if it cannot be used.
        others: Files that are no images by their names, counted by the ends of these.
        fingerprint: Of the pack, if it is one.
    """

    names: list[str]
    identities: list[str]
    read: Callable[[int], Pixels]
    others: Counter[str] = field(default_factory=Counter)
    fingerprint: str | None = None


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    if options.out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out {options.out}: must end in .npy or .parquet.")
    if options.out.suffix == ".parquet":
        import pyarrow  # noqa: F401  # before the images are embedded
    trained = open_backbone(options.model, image_size=options.image_size)
    if trained.config is not None and (shape := trained.config.data.shape) is not None:
        return embed_array(options, trained, shape)
    size = trained.known.image_size
    images = _images(options, size)
    flip = trained.config.verification.flip if trained.config else True
    reading = _Reading(images.read, size)
    with running(settings_of(options.device)) as runtime:
        share = -(-len(images.names) // runtime.ranks.size)
        with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:
            task = bar.add_task("embedding", total=share)
            watched = _Watched(embedder(trained, runtime, options.precision))
            rows_ND = embed_images(
                watched,
                str(options.images),
                len(images.names),
                reading,
                runtime,
                size=size,
                flip=flip if options.flip is None else options.flip,
                threads=options.threads,
                progress=lambda done: bar.advance(task, done),
            )
        bad_N = _bad_on_any(reading, len(images.names), runtime)
        if runtime.leads:
            faults = [
                Fault(images.names[i], reading.reason(i)) for i in np.flatnonzero(bad_N).tolist()
            ]
            good = np.flatnonzero(~bad_N).tolist()
            names, identities = ([of[i] for i in good] for of in (images.names, images.identities))
            if good:
                origin = None
                if images.fingerprint is not None:
                    left_out = tuple(np.flatnonzero(bad_N).tolist())
                    origin = Origin(images.fingerprint, len(images.names), left_out)
                rows_ND = rows_ND[good].astype(np.float32)
                write_embeddings(options.out, Embeddings(names, identities, rows_ND, origin))
            tell_faults(faults, options.bad)
            if not good:
                raise ValueError(f"{options.images}: none of its images can be used.")
            if hint := watched.hint(len(good)):
                print(f"hint: {hint}", file=sys.stderr)
            if images.others:
                print(ends_in_words(images.others), file=sys.stderr)
            print(f"{options.out}: {len(good):,} embeddings of {rows_ND.shape[1]}")
    # A rank that ends with 1 has the others ended, and this one may still be writing.
    return 1 if runtime.leads and bad_N.any() else 0


class _Reading:
    """Reads images; one that cannot be used is black, and its reason is kept."""

    def __init__(self, read: Callable[[int], Pixels], size: int) -> None:
        self._read, self._size = read, size
        self.reasons: dict[int, str] = {}

    def __call__(self, index: int) -> Pixels:
        try:
            return self._read(index)
        except (ValueError, OSError) as error:
            self.reasons[index] = reason_of(error)
            return np.zeros((self._size, self._size, 3), np.uint8)

    def reason(self, index: int) -> str:
        """Return why an image cannot be used, also one that another rank has read."""
        if index not in self.reasons:
            self(index)
        return self.reasons.get(index, "another rank could not read it")


class _Watched:
    """Embeds, and keeps the mean of the first images: do they look like aligned faces?"""

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self._embed = embed
        self._sum: Tensor | None = None
        self._images = 0

    def __call__(self, images: Tensor) -> Tensor:
        if self._images < _LOOKED_AT:
            grey = images.float().mean(1).sum(0)
            self._sum = grey if self._sum is None else self._sum + grey
            self._images += len(images)
        return self._embed(images)

    def hint(self, good: int) -> str | None:
        """Return what is to be said of ``good`` images that are plainly not aligned."""
        if self._sum is None:
            return None
        return unaligned(self._sum.cpu().numpy(), min(good, self._images))


def _bad_on_any(reading: _Reading, count: int, runtime: Runtime) -> NDArray[np.bool_]:
    """Which images some rank could not use, [N]. Collective: one all-reduce."""
    bad_N = torch.zeros(count, dtype=torch.int32, device=runtime.device)
    bad_N[list(reading.reasons)] = 1
    return sum_over_ranks(bad_N, runtime.ranks).cpu().numpy() > 0


def _images(options: argparse.Namespace, size: int) -> Images:
    path, landmarks = options.images, options.landmarks
    refuse_tars(path)
    if options.align and landmarks is not None:
        raise ValueError("--landmarks has the points of the faces; leave --align out.")
    if path.suffix == ".rec":
        if options.align or landmarks is not None:
            word = "--align" if options.align else "--landmarks"
            raise ValueError(f"{word}: a pack has aligned images; leave it out.")
        pack = open_pack(path)
        people = own_names(pack)
        return Images(
            [str(i) for i in range(len(pack))],
            [_identity(i, people) for i in labels_of(pack).tolist()],
            lambda index: decode_image(pack.record(index)[1], size),
            fingerprint=pack.fingerprint,
        )
    others: Counter[str] = Counter()
    files = sorted(_files(path, others))
    if not files:
        raise ValueError(
            f"{path}: no image in it ({', '.join(sorted(SUFFIXES))}), or no such folder. "
            f"{ends_in_words(others)}"
        )
    names = [file.relative_to(path).as_posix() for file in files]
    identities_N = [file.parent.name if file.parent != path else "" for file in files]
    points = _points(landmarks, names) if landmarks is not None else None
    if options.align:
        open_detector(None)  # what is wrong with it is said before anything is done

    def read(index: int) -> Pixels:
        view = np.frombuffer(read_bytes(files[index], most=MOST_BYTES), np.uint8)
        if points is not None:  # whoever gave them has chosen
            return Aligner(smallest=0, blurred=0).one(decode_image(view), points[index])
        return Aligner().one(decode_image(view)) if options.align else decode_image(view, size)

    return Images(names, identities_N, read, others)


def _files(path: Path, others: Counter[str]) -> Iterator[Path]:
    """The images at any depth of a folder, without hidden ones; the other files are counted."""
    for file in path.rglob("*"):
        if not any(map(is_hidden, file.relative_to(path).parts)) and not file.is_dir():
            if is_image(file.name):
                yield file
            else:
                others[end_of(file.name)] += 1


def _identity(number: int, names: Names | None) -> str:
    """Of an image of a pack: the name, or the number of who has none, or "" if it is not known."""
    if number == BAD:
        return ""
    name = names[number] if names is not None else None
    return str(number) if name is None else name


def _points(path: Path, names: list[str]) -> list[Points]:
    """The points of the faces of each image, in the order of the names."""
    found = read_landmarks(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{path}: no points of {missing[0]}, and of {len(missing) - 1} others; leave an image "
            "without a face out of the folder."
        )
    return [found[name] for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("embed", __doc__)
    parser.add_argument("model", type=Path, help="run, checkpoint or file of weights")
    add_plugin_option(parser)
    parser.add_argument("images", type=Path, help="folder of images, or a .rec pack")
    parser.add_argument("--out", type=Path, required=True, help="a .npy or .parquet file")
    parser.add_argument("--bad", type=Path, help=HELP)
    parser.add_argument("--align", action="store_true", help="cut out the largest face of each")
    parser.add_argument("--landmarks", type=Path, help="five points of each image, to align it")
    parser.add_argument("--image-size", type=int, default=112, help="of a file's model (112)")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32", help="(fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--threads", type=int, default=4, help="that decode, a rank (4)")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="add the mirrored image (as the run did; files: yes)",
    )
    return parser
