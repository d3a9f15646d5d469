"""What may be decoded is decided from the headers, before a decoder allocates anything."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from partialfc.data.images import jpeg
from partialfc.data.images.jpeg import Frame, check_jpeg, decode, encode

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def encoded(mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def changed(data: bytes, marker: int, offset: int, new: bytes) -> bytes:
    """``data`` with ``new`` at ``offset`` behind the first marker of this kind."""
    at = data.index(bytes([0xFF, marker])) + offset
    return data[:at] + new + data[at + len(new) :]


BASELINE = encoded()


@pytest.mark.parametrize(
    ("data", "components"),
    [
        (BASELINE, 3),
        (encoded("L"), 1),
        (encoded(progressive=True), 3),
        (encoded(optimize=True, restart_marker_blocks=1), 3),
        (encoded(exif=b"Exif\0\0" + BASELINE[:2000]), 3),  # its thumbnail has markers too
        (BASELINE + b"\0" * 3, 3),
        (BASELINE + b"trailing \xff\xd9 data", 3),
        (BASELINE[:2] + b"\xff\xff\xff" + BASELINE[2:], 3),  # fill bytes before a marker
    ],
    ids=["baseline", "grey", "progressive", "restarts", "exif", "padded", "trailing", "fill"],
)
def test_images_that_are_decoded(data, components):
    assert check_jpeg(array(data)) == Frame(24, 40, components)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(array(data)), np.asarray(image.convert("RGB")))


def test_pillow_decodes_where_simplejpeg_is_missing(monkeypatch):
    expected = decode(array(BASELINE))
    monkeypatch.setattr(jpeg, "decode_jpeg", None)
    np.testing.assert_array_equal(decode(array(BASELINE)), expected)
    with pytest.raises(ValueError, match="cannot identify"):
        decode(array(b"no image"))


@pytest.mark.parametrize("encoder", ["simplejpeg", "pillow"])
def test_an_encoded_image_is_baseline_and_close(monkeypatch, encoder):
    if encoder == "pillow":
        monkeypatch.setattr(jpeg, "encode_jpeg", None)
    rows, columns = np.mgrid[:24, :40]
    pixels = np.stack([rows * 8, columns * 6, 200 - rows * 3], -1).astype(np.uint8)
    data = array(encode(pixels[:, ::-1]))  # a view that is not contiguous
    assert check_jpeg(data) == Frame(24, 40, 3)
    assert b"\xff\xc0" in data.tobytes()
    assert np.abs(decode(data).astype(int) - pixels[:, ::-1]).mean() < 1.5


def bomb() -> bytes:
    """700 bytes that claim 65,500 x 65,500 pixels, 12.9 GB."""
    return changed(BASELINE, 0xC0, 5, struct.pack(">HH", 65500, 65500))[:698] + b"\xff\xd9"


def many_scans(data: bytes, number: int) -> bytes:
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * number + b"\xff\xd9"


def first_scan_of_one_component() -> bytes:
    at = BASELINE.index(b"\xff\xda")
    return BASELINE[:at] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 100 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with the bytes ff d8, these with ''"),
        (b"\x89PNG\r\n", "begins with the bytes ff d8, these with '89 50'"),
        (BASELINE[:100], "ends inside its headers"),
        (BASELINE[:2], "ends inside its headers"),
        (BASELINE[: BASELINE.index(b"\xff\xc0") + 6], "ends inside its frame header"),
        (BASELINE[: len(BASELINE) // 2], "truncated: it has no end marker"),
        (BASELINE[:-2], "truncated: it has no end marker"),
        (BASELINE[:2] + b"\0" + BASELINE[2:], "byte 2 of the JPEG is 00, must be a marker's ff"),
        (BASELINE[:2] + BASELINE[BASELINE.index(b"\xff\xda") :], "no frame header before"),
        (BASELINE[:2] + b"\xff\xc0\0\x11\x08\0\x10\0\x10\x03" + b"\0" * 9 + BASELINE[2:], "second"),
        (BASELINE[:2] + b"\xff\xfe\0\x02" * 5000 + BASELINE[2:], "more than 1024 header segments"),
        (BASELINE[:2] + b"\xff" * 10**6, "more than 1024 header segments"),
        (bomb(), "claims 65500 x 65500 pixels, must be between 1 and 4194304"),
        (changed(BASELINE, 0xC0, 5, b"\0\0"), "claims 40 x 0 pixels"),
        (changed(BASELINE, 0xC0, 4, b"\x0c"), "12 bits per sample, must be 8"),
        (changed(BASELINE, 0xC0, 1, b"\xc9"), "frame marker is ff c9 .*arithmetic"),
        (changed(BASELINE, 0xC0, 1, b"\xc3"), "frame marker is ff c3 .*lossless"),
        (encoded("CMYK"), r"4 components \(CMYK\), must be 1 or 3"),
        (changed(BASELINE, 0xC0, 9, b"\x02"), "2 components, must be 1 or 3"),
        (many_scans(encoded(progressive=True), 1000), "10.. scans, at most 64"),
        (first_scan_of_one_component(), "100 scans, at most 64"),
    ],
)
def test_images_that_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        check_jpeg(array(data))


def test_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(jpeg, "MAX_BYTES", len(BASELINE) - 1)
    with pytest.raises(ValueError, match=f"{len(BASELINE)} bytes, at most {len(BASELINE) - 1}"):
        check_jpeg(array(BASELINE))


def test_a_bomb_is_refused_without_memory():
    data = array(bomb())
    assert len(data) == 700
    tracemalloc.start()
    with pytest.raises(ValueError, match="65500 x 65500"):
        check_jpeg(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_damage_never_ends_in_anything_but_an_image_or_a_value_error():
    """Also through the decoder: of 2,000 damaged images, none raises another error or crashes."""
    rng = np.random.default_rng(0)
    for data in (BASELINE, encoded(progressive=True)):
        for _ in range(1000):
            damaged = array(data).copy()
            where = rng.integers(0, len(damaged) if rng.random() < 0.3 else 700, rng.integers(1, 6))
            damaged[where] = rng.integers(0, 256, len(where))
            try:
                frame = check_jpeg(damaged)
                assert decode(damaged).shape == (frame.height, frame.width, 3)
            except ValueError:
                pass


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([BASELINE, encoded("L"), encoded(progressive=True)]),
    st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=4)), max_size=6),
    st.integers(0, 2000),
)
def test_mutated_images_are_decoded_at_their_size_or_refused(data, changes, cut):
    """No other error, and never other pixels than the headers said."""
    mutated = bytearray(data)
    for at, value in changes:
        mutated[at : at + len(value)] = value
    if cut < 400:
        del mutated[-cut:]
    view = array(bytes(mutated))
    try:
        frame = check_jpeg(view)
        pixels = decode(view)
    except ValueError:
        return
    assert pixels.shape == (frame.height, frame.width, 3)
