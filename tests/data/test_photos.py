"""Photos as cameras, phones and scanners write them: one rule for folder, list, tar and pack."""

import contextlib
import io
import itertools
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.images.exif import ORIENTATION, orientation_of
from partialfc.data.images.formats import check_image, decode_image
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order
from tests.support.images import LOADERS, lopsided
from tests.support.processes import partialfc

STORED_AS = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: np.rot90(up),
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}
"""What a camera stores of an upright image for each orientation, by the table of the standard."""


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **(quality | options))
    return file.getvalue()


def turned(up: np.ndarray, orientation: int, kind: str = "JPEG") -> bytes:
    return encoded(STORED_AS[orientation](up), kind, exif=exif(orientation))


def view(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def far(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance in levels of 255; two unlike images have more than 20."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_of_every_format_is_turned(kind, orientation):
    up = lopsided(48, 80, 1)
    data = view(turned(up, orientation, kind))
    pixels = decode_image(data)
    assert pixels.shape == up.shape
    assert far(pixels, up) < (3 if kind == "JPEG" else 1e-9)
    assert check_image(data).plain == (orientation == 1 and kind in ("JPEG", "PNG"))


def test_a_block_of_exif_is_never_trusted():
    """Cut anywhere, with other offsets and types: a number from 1 to 8, and no error."""
    good = exif(6).tobytes().removeprefix(b"Exif\0\0")
    assert orientation_of(good) == 6
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(good[: rng.integers(0, len(good) + 1)])
        for at in rng.integers(0, max(1, len(bad)), 3):
            bad[at : at + 1] = rng.integers(0, 256, 1, np.uint8).tobytes()
        assert 1 <= orientation_of(bytes(bad)) <= 8


# A folder, and all that is made of it


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Of two people: every orientation, other formats, a grey and a large one, in a folder."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    for name in ("ann", "bob"):
        (root / name).mkdir(parents=True)
    for orientation in STORED_AS:
        data = turned(lopsided(64, 64, orientation), orientation)
        (root / "ann" / f"{orientation}.jpg").write_bytes(data)
    up = lopsided(64, 64, 20)
    (root / "bob" / "a.png").write_bytes(turned(up, 8, "PNG"))
    (root / "bob" / "b.webp").write_bytes(encoded(up[::-1], "WEBP"))
    (root / "bob" / "c.bmp").write_bytes(encoded(up[:, ::-1], "BMP"))
    (root / "bob" / "d.tif").write_bytes(turned(up, 6, "TIFF"))
    (root / "bob" / "e.pgm").write_bytes(encoded(up[:, :, 0], "PPM"))
    (root / "bob" / "f.jpg").write_bytes(encoded(up, "WEBP"))  # whatever it is called
    large = Image.fromarray(up).resize((2560, 1920), Image.Resampling.BICUBIC)
    (root / "bob" / "g.jpg").write_bytes(turned(np.asarray(large), 6))
    (root / "bob" / "h.jpg").write_bytes(encoded(up, progressive=True))
    return root


def images_of(path, loader):
    """All images of a source in their order, as uint8 [N, 64, 64, 3], and their identities."""
    dataset = open_dataset([path])
    order = Order(len(dataset), len(dataset), seed=1, last_batch="pad")
    stream = Stream(
        dataset=dataset, order=order, augmentation=Augmentation(flip=0.0), image_size=64
    )
    batches = open_batches(stream, 0, device=torch.device("cpu"), loader=loader, threads=1)
    with contextlib.closing(batches):
        [(images, identities, replaced)] = itertools.islice(batches, 1)
    assert not replaced
    place = np.argsort(stream.batch(0).sample_id_B)
    pixels = np.rint(images.numpy() * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels[place], identities.numpy()[place]


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """A list of the photos, the pack of their folder, and that of a tar of it."""
    out = tmp_path_factory.mktemp("made")
    files = sorted(photos.glob("*/*"))
    lines = [f"photos/{file.parent.name}/{file.name}\t{file.parent.name}\n" for file in files]
    (photos.parent / "list.txt").write_text("".join(lines))
    with tarfile.open(out / "shard.tar", "w") as tar:
        tar.add(photos, ".")
    for name, source in (("pack", photos), ("tar", out / "shard.tar")):
        words = ["pack", source, out / f"{name}.rec", "--size", 64, "--workers", 1]
        done = partialfc(*words)
        assert done.returncode == 0, done.stderr
    return {"list": photos.parent / "list.txt", "pack": out / "pack.rec", "tar": out / "tar.rec"}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_and_the_pack_of_it_are_the_same_samples(photos, made, loader):
    """Turned by one rule and read by one reader; so are a list and a tar of the same files."""
    files = sorted(photos.glob("*/*"))
    images, identities = images_of(photos, loader)
    for orientation in STORED_AS:
        assert far(images[orientation - 1], lopsided(64, 64, orientation)) < 3
    for name, source in made.items():
        theirs, their_identities = images_of(source, loader)
        assert their_identities.tolist() == identities.tolist() == [0] * 8 + [1] * 8
        for number, file in enumerate(files):
            # A pack stores what it turns as JPEG, and makes it smaller by another filter.
            allowed = 0 if name == "list" else 12 if file.name == "g.jpg" else 4
            assert far(theirs[number], images[number]) <= allowed, (name, file.name)
