"""Photos as cameras, phones and scanners write them: one rule for folder, list, tar and pack."""

import contextlib
import io
import itertools
import struct
import tarfile
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
        [batch] = itertools.islice(batches, 1)
    assert not batch.replaced
    place = np.argsort(stream.batch(0).sample_id_B)
    pixels = np.rint(batch.images.numpy() * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels[place], batch.identities.numpy()[place]


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


# Depth


def deep(values: np.ndarray, kind: str) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return view(file.getvalue())


def test_grey_of_more_than_8_bits_is_scaled_by_the_depth_that_it_uses():
    """An infrared camera's 12 bits in a file of 16 are neither black nor white."""
    grey = np.tile(np.arange(256), (8, 1))
    for bits in (8, 10, 12, 14, 16):
        values = np.rint(grey * ((1 << bits) - 1) / 255).astype(np.uint16)
        for kind in ("PNG", "TIFF"):
            pixels = decode_image(deep(values, kind))
            assert pixels.shape == (8, 256, 3)
            assert (pixels == grey[:, :, None]).all(), (bits, kind)
    dark = deep((grey * 16).astype(np.int32), "PPM")  # a PGM says itself what white is: 65535
    assert decode_image(dark).max() == round(255 * 16 / 257)
    assert (decode_image(deep(grey.astype(np.float32) / 255, "TIFF"))[:, :, 1] == grey).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70_000, np.int32), r"grey values are 70000 to 70000, must be in \[0, 655"),
        (np.full((4, 4), 255, np.float32), r"floats from 255 to 255, must be in \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
    ],
)
def test_values_of_no_known_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        decode_image(deep(values, "TIFF"))


# Size


def test_a_photo_of_a_hundred_megapixels_is_read_at_a_smaller_scale():
    """As phones make them. With twice the pixels that are needed, and no smaller image changes."""
    up = Image.fromarray(lopsided(72, 96, 3)[:, :, 0])
    file = io.BytesIO()
    up.resize((12000, 9000), Image.Resampling.BILINEAR).save(file, "JPEG", exif=exif(6))
    data = view(file.getvalue())
    frame = check_image(data)
    assert (frame.height, frame.width, frame.plain) == (9000, 12000, False)
    pixels = decode_image(data, 112)
    assert pixels.shape == (1500, 1125, 3)
    seen = np.asarray(Image.fromarray(pixels[:, :, 0]).resize((72, 96), Image.Resampling.BOX))
    assert far(seen, np.rot90(np.asarray(up), -1)) < 6
    small = view(encoded(lopsided(1024, 1024, 3)))
    assert decode_image(small, 112).shape == (1024, 1024, 3)


def claims(data: bytes, at: int, form: str, *size: int) -> bytes:
    """An image that says that it is of another size."""
    return data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form) :]


def bombs() -> dict[str, bytes]:
    pixels = np.zeros((16, 16, 3), np.uint8)
    jpeg, scans = encoded(pixels), encoded(pixels, progressive=True)
    scan = scans[scans.rindex(b"\xff\xda") : -2]
    at = scans.index(b"\xff\xc2") + 5
    wide = claims(scans[:-2] + scan * 40 + b"\xff\xd9", at, ">HH", 11_000, 11_000)
    webp, exact = encoded(pixels, "WEBP", lossless=False), encoded(pixels, "WEBP", exif=exif(6))
    tiff = encoded(pixels, "TIFF")
    width = tiff.index(struct.pack("<HHII", 256, 4, 1, 16))
    tall = claims(tiff, width, "<HHII", 256, 4, 1, 12_000)
    height = tall.index(struct.pack("<HHII", 257, 4, 1, 16))
    return {
        "JPEG": claims(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65_500, 65_500),
        "progressive JPEG": claims(scans, at, ">HH", 12_000, 12_000),
        "passes": wide,
        "WEBP": claims(webp, 26, "<HH", 16_000, 16_000),
        "WEBP with EXIF": claims(exact, 24, "<IH", 0xFF003FFF, 0x3F),
        "BMP": claims(encoded(pixels, "BMP"), 18, "<ii", 12_000, 12_000),
        "TIFF": claims(tall, height, "<HHII", 257, 4, 1, 12_000),
        "PPM": b"P6 12000 12000 255\n" + bytes(99),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", bombs())
def test_a_small_file_that_claims_many_pixels_is_refused_before_memory(kind):
    """In words that are true of it: a baseline JPEG is not told to become one."""
    data = view(bombs()[kind])
    assert len(data) < 30_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"(claims \d+ x \d+ pixels|passes over)") as caught:
        decode_image(data, 112)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert ("Make it smaller" in str(caught.value)) == (kind != "passes")


# Hostile


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_image_of_any_format_is_an_image_or_a_value_error(data):
    """Nothing else comes out of the reader, whatever the bytes."""
    kind = data.draw(st.sampled_from(["WEBP", "BMP", "TIFF", "PPM", "JPEG"]))
    good = bytearray(turned(lopsided(16, 24, 1), 6, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of odd tags
        with contextlib.suppress(ValueError):
            assert decode_image(view(bytes(good)), 16).shape[2] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC images are not read. Convert it to JPEG"),
        (b"GIF89a\x01\0\x01\0", "GIF images are not read"),
        (b"\0\5\x16\7", "it is no image: .* these with '00 05'"),
    ],
)
def test_what_is_no_image_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        check_image(view(data))


def test_ink_is_read_as_colour():
    """A JPEG of CMYK, as printers want it."""
    up = lopsided(32, 48, 2)
    file = io.BytesIO()
    Image.fromarray(up).convert("CMYK").save(file, "JPEG", quality=95)
    data = view(file.getvalue())
    assert check_image(data).components == 4
    assert far(decode_image(data), up) < 4
