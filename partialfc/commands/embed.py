"""Images to embeddings, in a .npy or .parquet file.

    partialfc embed runs/mine photos --out photos.parquet
    partialfc embed model.pt photos --landmarks points.txt --out photos.npy
    torchrun --nproc-per-node=8 -m partialfc embed runs/mine faces.rec --out faces.npy

IMAGES is a folder (its .jpg, .jpeg and .png, at any depth; the folder of an image is its identity)
or a .rec pack. Images are taken as aligned faces and resized, unless --landmarks has a line for
each: the image's path below the folder, then x y of left eye, right eye, nose, left and right
corner of the mouth, in pixels; they are then aligned by arcface's template. A detector such as
insightface's or MTCNN gives these points.
"""

# Shape suffixes: N = images, D = embedding.

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._command import command_parser
from partialfc.commands._embed.files import Embeddings, write_embeddings
from partialfc.commands.evaluate import AUTOCAST, embedder, settings_of
from partialfc.data.images.align import align
from partialfc.data.images.formats import decode_image
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.pairs import Image
from partialfc.evaluation.embedding import embed_images
from partialfc.runtime.process import running

ENDINGS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class Images:
    """What is embedded: names, identities, and how image i is read."""

    names: list[str]
    identities: list[str]
    read: Callable[[int], Image]


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
    with running(settings_of(options.device)) as runtime:
        share = -(-len(images.names) // runtime.ranks.size)
        with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:
            task = bar.add_task("embedding", total=share)
            rows_ND = embed_images(
                embedder(trained, runtime, options.precision),
                str(options.images),
                len(images.names),
                images.read,
                runtime,
                size=size,
                flip=flip if options.flip is None else options.flip,
                threads=options.threads,
                progress=lambda done: bar.advance(task, done),
            )
        if runtime.leads:
            found = Embeddings(images.names, images.identities, rows_ND.astype(np.float32))
            write_embeddings(options.out, found)
            print(f"{options.out}: {len(rows_ND):,} embeddings of {rows_ND.shape[1]}")
    return 0


def _images(path: Path, landmarks: Path | None, size: int) -> Images:
    if path.suffix == ".rec":
        if landmarks is not None:
            raise ValueError("--landmarks: a pack has aligned images; leave it out.")
        pack = open_pack(path)
        identities = pack.identities(np.arange(len(pack)))
        return Images(
            [str(i) for i in range(len(pack))], [str(i) for i in identities.tolist()], pack.jpeg
        )
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"{path}: no image in it (.jpg, .jpeg, .png), or no such folder.")
    names = [file.relative_to(path).as_posix() for file in files]
    identities_N = [file.parent.name if file.parent != path else "" for file in files]
    points = _points(landmarks, names) if landmarks is not None else None

    def read(index: int) -> Image:
        view = np.frombuffer(files[index].read_bytes(), np.uint8)
        try:
            if points is None:
                return decode_image(view, size)
            return align(decode_image(view), points[index])
        except ValueError as error:
            raise ValueError(f"{files[index]}: {error}") from error

    return Images(names, identities_N, read)


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
