"""Synthetic identities for the demo, the tests and the benchmarks: procedural faces.

An image is a pure function of (seed, identity, image), whatever else is rendered with it.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from partialfc.data.images.jpeg import encode
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.sets.pairs import write_pairs
from partialfc.keyed import key, uniform
from tools._faces.face_code import FACE, SHOT, draw_codes
from tools._faces.painter import paint

_IMAGES_PER_TASK = 64
_FOLDS = 10


def render(
    identities: NDArray[np.int64], images: NDArray[np.int64], *, seed: int, size: int = 112
) -> NDArray[np.uint8]:
    """Return RGB images [n, size, size, 3].

    Args:
        identities: int64 [n], each in [0, 2^31).
        images: int64 [n], which image of the identity; each in [0, 2^32).
        seed: Other faces for another seed.
        size: Side in pixels.
    """
    faces = draw_codes(FACE, identities, seed, "face")
    shots = draw_codes(SHOT, (identities << 32) + images, seed, "shot")
    rendered = [paint(f, s, size=size, seed=seed) for f, s in zip(faces, shots, strict=True)]
    return np.stack(rendered)


def write_demo_packs(
    folder: Path,
    *,
    identities: int,
    images_per_identity: int,
    verification_identities: int,
    pairs: int,
    seed: int,
    workers: int,
    probes: int = 0,
) -> None:
    """Write ``train.rec`` and, of other identities, ``verification.bin`` and ``heldout.rec``.

    Nothing is done where the folder holds the same already. The bytes do not depend on
    ``workers``.

    Args:
        folder: Made if it does not exist.
        identities: Of the training pack.
        images_per_identity: Of the training pack.
        verification_identities: Of the pairs; none of them is in the training pack. At least 2.
        pairs: Half of one identity, half of two; a multiple of 20.
        seed: Of everything.
        workers: Processes that render.
        probes: Images of every verification identity in ``heldout.rec``; 0 for no such file.

    Raises:
        ValueError: If ``pairs`` or ``verification_identities`` is out of range.
    """
    if pairs < 2 * _FOLDS or pairs % (2 * _FOLDS) or verification_identities < 2:
        raise ValueError(
            f"pairs must be a multiple of {2 * _FOLDS} and verification_identities at least 2, "
            f"got {pairs} and {verification_identities}."
        )
    settings = {
        "identities": identities,
        "images_per_identity": images_per_identity,
        "verification_identities": verification_identities,
        "pairs": pairs,
        "probes": probes,
        "seed": seed,
        "faces": key(0, repr((FACE, SHOT))),  # other ranges are other faces
    }
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) == settings:
        return
    folder.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    held_out, shots, same = draw_pairs(identities, verification_identities, pairs, seed=seed)
    packs = {"train.rec": (0, identities, images_per_identity)}
    if probes:
        packs["heldout.rec"] = (identities, verification_identities, probes)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, (first, count, images) in packs.items():
            shown = np.repeat(np.arange(count), images)
            each = np.tile(np.arange(images), count)
            jpegs = _jpegs(pool, first + shown, each, seed, f"{count} identities for {name}")
            write_insightface_pack(folder / name, zip(shown.tolist(), jpegs, strict=True), count)
        jpegs = _jpegs(pool, held_out, shots, seed, f"{pairs} pairs of other identities")
        write_pairs(folder / "verification.bin", list(jpegs), same)
    note.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def draw_pairs(
    first: int, identities: int, pairs: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[bool]]:
    """Choose verification pairs: in every tenth, first those of one identity, then those of two.

    Args:
        first: The smallest identity.
        identities: How many there are, >= 2.
        pairs: A multiple of 20.
        seed: Of the choice.

    Returns:
        identities [2 * pairs] and images [2 * pairs], all images distinct, and same [pairs].
    """
    same = np.arange(pairs) // (pairs // (2 * _FOLDS)) % 2 == 0

    def number(purpose: str, limit: int) -> NDArray[np.int64]:
        values = uniform(np.arange(pairs), key(seed, f"pairs.{purpose}"))
        return (values * limit).astype(np.int64)

    one = number("one", identities)
    another = (one + 1 + number("another", identities - 1)) % identities
    chosen = np.stack([one, np.where(same, one, another)], axis=1)
    return first + chosen.ravel(), np.arange(2 * pairs), same.tolist()


def _jpegs(
    pool: ProcessPoolExecutor,
    identities: NDArray[np.int64],
    images: NDArray[np.int64],
    seed: int,
    title: str,
) -> Iterator[bytes]:
    """The images as JPEG, rendered in parallel, in order."""
    cuts = range(_IMAGES_PER_TASK, len(identities), _IMAGES_PER_TASK)
    tasks = pool.map(
        partial(_render_jpegs, seed=seed), np.split(identities, cuts), np.split(images, cuts)
    )
    for task in track(tasks, f"Rendering {title}", total=len(cuts) + 1):
        yield from task


def _render_jpegs(
    identities: NDArray[np.int64], images: NDArray[np.int64], *, seed: int
) -> list[bytes]:
    return [encode(image) for image in render(identities, images, seed=seed)]
