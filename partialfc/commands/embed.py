"""Images to embeddings, in a .npy or .parquet file.

    partialfc embed runs/mine photos --out photos.parquet
    partialfc embed model.pt photos --landmarks points.txt --out photos.npy
    torchrun --nproc-per-node=8 -m partialfc embed runs/mine faces.rec --out faces.npy

IMAGES is a folder (its images at any depth; the folder of an image is its identity) or a .rec pack.
Images are turned as their EXIF says, taken as aligned faces, and resized, unless --landmarks has a
line for each: the image's path below the folder, then x y of left eye, right eye, nose, left and
right corner of the mouth, in pixels of the turned image; they are then aligned by arcface's
template. A detector such as insightface's or MTCNN gives these points.

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

from partialfc.alignment.crop import align
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._bad_files import HELP, Fault, end_of, ends_in_words, reason_of, tell_faults
from partialfc.commands._command import command_parser
from partialfc.commands._embed.files import Embeddings, write_embeddings
from partialfc.commands.evaluate import AUTOCAST, embedder, settings_of
from partialfc.data.files.index import is_hidden, is_image
from partialfc.data.images.formats import MOST_BYTES, SUFFIXES, decode_image
from partialfc.data.packs.labels import BAD
from partialfc.data.packs.pack import open_pack
from partialfc.data.source import labels_of
from partialfc.distributed.ranks import sum_over_ranks
from partialfc.evaluation.embedding import embed_images
from partialfc.runtime.process import Runtime, running
from partialfc.writing import read_bytes

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Images:
    """What is embedded.

    Attributes:
        names: Of the images, [N].
        identities: Of the images, or "" where they are not known; [N].
        read: Returns the RGB pixels of image i; ValueError or OSError if it cannot be used.
        others: Files that are no images by their names, counted by the ends of these.
    """

    names: list[str]
    identities: list[str]
    read: Callable[[int], Pixels]
    others: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    if options.out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out {options.out}: must end in .npy or .parquet.")
    if options.out.suffix == ".parquet":
        import pyarrow  # noqa: F401  # before the images are embedded
    trained = open_backbone(options.model, image_size=options.image_size)
    size = trained.known.image_size
    images = _images(options.images, options.landmarks, size)
    flip = trained.config.verification.flip if trained.config else True
    reading = _Reading(images.read, size)
    with running(settings_of(options.device)) as runtime:
        share = -(-len(images.names) // runtime.ranks.size)
        with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:
            task = bar.add_task("embedding", total=share)
            rows_ND = embed_images(
                embedder(trained, runtime, options.precision),
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
            tell_faults(faults, options.bad)
            if bad_N.all():
                raise ValueError(f"{options.images}: none of its images can be used.")
            good = np.flatnonzero(~bad_N).tolist()
            names, identities = ([of[i] for i in good] for of in (images.names, images.identities))
            found = Embeddings(names, identities, rows_ND[good].astype(np.float32))
            write_embeddings(options.out, found)
            if images.others:
                print(ends_in_words(images.others), file=sys.stderr)
            print(f"{options.out}: {len(good):,} embeddings of {rows_ND.shape[1]}")
    return 1 if bad_N.any() else 0


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


def _bad_on_any(reading: _Reading, count: int, runtime: Runtime) -> NDArray[np.bool_]:
    """Which images some rank could not use, [N]. Collective: one all-reduce."""
    bad_N = torch.zeros(count, dtype=torch.int32, device=runtime.device)
    bad_N[list(reading.reasons)] = 1
    return sum_over_ranks(bad_N, runtime.ranks).cpu().numpy() > 0


def _images(path: Path, landmarks: Path | None, size: int) -> Images:
    if path.suffix == ".rec":
        if landmarks is not None:
            raise ValueError("--landmarks: a pack has aligned images; leave it out.")
        pack = open_pack(path)
        return Images(
            [str(i) for i in range(len(pack))],
            ["" if i == BAD else str(i) for i in labels_of(pack).tolist()],
            lambda index: decode_image(pack.record(index)[1], size),
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

    def read(index: int) -> Pixels:
        view = np.frombuffer(read_bytes(files[index], most=MOST_BYTES), np.uint8)
        if points is None:
            return decode_image(view, size)
        return align(decode_image(view), points[index])

    return Images(names, identities_N, read, others)


def _files(path: Path, others: Counter[str]) -> Iterator[Path]:
    """The images at any depth of a folder, without hidden ones; the other files are counted."""
    for file in path.rglob("*"):
        if not any(map(is_hidden, file.relative_to(path).parts)) and not file.is_dir():
            if is_image(file.name):
                yield file
            else:
                others[end_of(file.name)] += 1


def _points(path: Path, names: list[str]) -> list[NDArray[np.float64]]:
    """Five points of each image, in the order of the names."""
    found: dict[str, NDArray[np.float64]] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = text.rsplit(maxsplit=10)
        if not words:
            continue
        try:
            found[words[0]] = np.array(words[1:], dtype=np.float64).reshape(5, 2)
        except ValueError:
            raise ValueError(f"{path}, line {line}: must be a name and ten numbers.") from None
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
    parser.add_argument("images", type=Path, help="folder of images, or a .rec pack")
    parser.add_argument("--out", type=Path, required=True, help="a .npy or .parquet file")
    parser.add_argument("--bad", type=Path, help=HELP)
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
