"""Turn the Omniglot background set into a pack and held-out sets.

Omniglot (Lake et al., Science 2015) is real handwriting: 964 characters, 20 drawings of each. A
character in each of its four rotations is an identity, so there are 3,856. The last characters are
held out, and no identity of theirs is trained on:

    train.rec            the training pack
    heldout.rec          the held-out characters, upright; the first drawing of each is the gallery
    heldout_rotated.rec  all held-out identities: harder, for a rotated O is an O
    heldout_pairs.bin    verification pairs of all held-out identities
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from partialfc.data.images.jpeg import encode
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.pairs import write_pairs
from partialfc.keyed import key, uniform

_SEED = 2048
_ROTATIONS = 4


def main(arguments: list[str] | None = None) -> int:
    """Write the packs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("npz", type=Path, help="omniglot_background.npz")
    parser.add_argument("folder", type=Path, help="where the packs go")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels (64)")
    parser.add_argument("--held-out", type=int, default=164, help="characters held out (164)")
    parser.add_argument("--characters", type=int, help="use the first characters only, for tests")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="part of the training labels made wrong (0)"
    )
    parser.add_argument("--pairs", type=int, default=6000, help="verification pairs (6000)")
    options = parser.parse_args(arguments)
    try:
        with np.load(options.npz, allow_pickle=False) as file:
            drawings = file["images"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.npz}: not the Omniglot archive with an array 'images': {error}")
    drawings = drawings[: options.characters]
    if not 0 < options.held_out < len(drawings):
        parser.error(
            f"--held-out must be in [1, {len(drawings) - 1}], one less than the characters, "
            f"got {options.held_out}."
        )
    if options.pairs < 20 or options.pairs % 20:
        parser.error(f"--pairs must be a multiple of 20, got {options.pairs}: ten balanced folds.")

    if not 0 <= options.noise < 1:
        parser.error(f"--noise must be in [0, 1), got {options.noise}.")

    options.folder.mkdir(parents=True, exist_ok=True)
    trained = len(drawings) - options.held_out
    for name, part, rotations in (
        ("train", drawings[:trained], _ROTATIONS),
        ("heldout", drawings[trained:], 1),
        ("heldout_rotated", drawings[trained:], _ROTATIONS),
    ):
        identities = len(part) * rotations
        noise = options.noise if name == "train" else 0.0
        samples = track(
            _samples(part, rotations, options.size, noise),
            f"{name}.rec: {identities} identities",
            total=identities * part.shape[1],
        )
        write_insightface_pack(options.folder / f"{name}.rec", samples, identities)
    images, same = _pairs(drawings[trained:], options.pairs, options.size)
    write_pairs(options.folder / "heldout_pairs.bin", images, same)
    print(f"{options.folder}: train.rec, heldout.rec, heldout_rotated.rec, heldout_pairs.bin")
    return 0


def _samples(
    characters: np.ndarray, rotations: int, size: int, noise: float
) -> Iterator[tuple[int, bytes]]:
    """(identity, JPEG) of every drawing, by identity; a part of them under another identity."""
    identities, drawings = len(characters) * rotations, characters.shape[1]
    images = np.arange(identities * drawings)
    label = images // drawings
    offset = (uniform(images, key(_SEED, "wrong label")) * (identities - 1)).astype(np.int64)
    wrong = uniform(images, key(_SEED, "noise")) < noise
    label = np.where(wrong, (label + 1 + offset) % identities, label)
    for image in np.argsort(label, kind="stable").tolist():
        identity, drawing = divmod(image, drawings)
        character, rotation = divmod(identity, rotations)
        yield int(label[image]), _jpeg(characters[character, drawing], rotation, size)


def _jpeg(drawing: np.ndarray, rotation: int, size: int) -> bytes:
    """Black ink on white as a grey RGB image, scaled down with a filter against aliasing."""
    image = Image.fromarray(np.rot90(drawing, rotation).astype(np.uint8) * 255)
    grey = np.asarray(image.resize((size, size), Image.Resampling.BOX))
    return encode(np.repeat(grey[..., None], 3, axis=2))


def _pairs(characters: np.ndarray, count: int, size: int) -> tuple[list[bytes], list[bool]]:
    """Random pairs in blocks of ``count / 20``, same and different by turns: ten balanced folds."""
    identities, drawings = len(characters) * _ROTATIONS, characters.shape[1]
    same = (np.arange(count) // (count // 20)) % 2 == 0

    def number(purpose: str, limit: int) -> np.ndarray:
        values = uniform(np.arange(count), key(_SEED, purpose)) * limit
        return values.astype(np.int64)

    first, first_drawing = number("identity", identities), number("drawing", drawings)
    # An offset that is never 0 makes two drawings, or two identities, differ.
    other = np.where(same, first, (first + 1 + number("other", identities - 1)) % identities)
    second_drawing = (first_drawing + 1 + number("second", drawings - 1)) % drawings
    other_drawing = np.where(same, second_drawing, number("free", drawings))
    images = []
    for pair in range(count):
        for identity, drawing in (
            (first[pair], first_drawing[pair]),
            (other[pair], other_drawing[pair]),
        ):
            character, rotation = divmod(int(identity), _ROTATIONS)
            images.append(_jpeg(characters[character, drawing], rotation, size))
    return images, same.tolist()


if __name__ == "__main__":
    sys.exit(main())
