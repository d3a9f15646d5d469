"""Reading pickled verification sets without an unpickler: what must be read, what must not run."""

import copyreg
import hashlib
import json
import os
import pickle
import random
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.data.sets.pairs import PairsError, read_pairs, write_pairs
from tests.support.places import FIXTURES

DATA = FIXTURES / "pairs"
GOLDEN = sorted(DATA.glob("pairs_proto*.bin"))
WRITTEN = sorted(DATA.glob("python*.bin"))
"""Three pairs by Python 2 and 3 with numpy 1 and 2 at all protocols; issame is, by protocol modulo
3, a list of bool, a bool array or a list of numpy bools."""

JPEG = b"\xff\xd8" + bytes(range(256)) + b"\xff\xd9"


def read_bytes(folder: Path, data: bytes):
    path = folder / "set.bin"
    path.write_bytes(data)
    return read_pairs(path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_sets_are_read_exactly(path):
    answers = json.loads((DATA / "pairs.json").read_text())
    pairs = read_pairs(path)
    assert [sha256(image) for image in pairs.images] == answers["sha256"]
    assert pairs.same.dtype == np.bool_
    assert pairs.same.tolist() == answers["issame"]


def test_golden_sets_are_all_there():
    assert len(GOLDEN) == 3
    assert len(WRITTEN) == 15


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_every_writer_and_protocol_gives_the_same_set(path):
    """Bytes, an array in C order, one in Fortran order, and a JPEG kept as an array [n]."""
    pixels = (np.arange(4 * 5 * 3) * 37 % 256).astype(np.uint8).reshape(4, 5, 3)
    first, second, upright, upside_down, flat, again = read_pairs(path).images
    assert sha256(first)[:6] == "efb8b2"
    assert sha256(second)[:6] == "a17f14"
    np.testing.assert_array_equal(upright, pixels)
    np.testing.assert_array_equal(upside_down, pixels[::-1])
    assert first == flat == again
    assert read_pairs(path).same.tolist() == [True, False, True]


@pytest.mark.parametrize("protocol", range(6))
def test_sets_of_this_python_are_read(tmp_path, protocol):
    rng = np.random.default_rng(protocol)
    images = [JPEG[:2] + rng.bytes(300) for _ in range(2200)]  # more than one batch of APPENDS
    images[7] = rng.integers(0, 256, (112, 112, 3), np.uint8)
    same = rng.random(1100) < 0.5
    for issame in (same, same.tolist(), list(same), tuple(same.tolist())):
        pairs = read_bytes(tmp_path, pickle.dumps((images, issame), protocol))
        np.testing.assert_array_equal(pairs.same, same)
        np.testing.assert_array_equal(pairs.images[7], images[7])
        assert pairs.images[8:] == images[8:]


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "kind", [int, np.bool_, np.uint8, np.int32, np.int64, "an array of int32", "an array of int64"]
)
def test_ones_and_zeros_are_yes_and_no(tmp_path, protocol, kind):
    """Scripts write issame as int(...), or by np.array; images are cv2's columns, or PNG."""
    same = [True, False, True, True]
    column = np.frombuffer(JPEG, np.uint8)
    images = [column[:, None], column[None], JPEG, PNG, column, JPEG, PNG, column[:, None]]
    array = isinstance(kind, str)
    issame = np.array(same, kind.split()[-1]) if array else [kind(truth) for truth in same]
    pairs = read_bytes(tmp_path, pickle.dumps((images, issame), protocol))
    assert pairs.same.dtype == np.bool_
    assert pairs.same.tolist() == same
    assert [*pairs.images] == [JPEG, JPEG, JPEG, PNG, JPEG, JPEG, PNG, JPEG]


@pytest.mark.parametrize(
    ("images", "issame", "message"),
    [
        ([JPEG] * 2, [2], r"issame\[0\] is 2, must be a bool, or 0 or 1"),
        ([JPEG] * 2, [-1], r"issame\[0\] is -1"),
        ([JPEG] * 2, ["1"], r"issame\[0\] is str"),
        ([JPEG] * 2, np.array([256]), r"or of integers 0 and 1"),
        ([JPEG] * 2, np.array([1], ">i8"), r"must be little-endian"),
        ([JPEG] * 4, np.array([[1, 0], [0, 1]], np.uint8), r"uint8 \[n\] or \[n, 1\]"),
        ([np.zeros((2, 2), np.uint8), JPEG], [1], r"uint8 \[n\] or \[n, 1\]"),
        ([np.zeros((2, 2, 3), np.int32), JPEG], [1], r"must be uint8 \[H, W, 3\]"),
        ([np.zeros(40, np.int32), JPEG], [1], r"image 0 is Array"),
    ],
)
def test_other_truths_and_arrays_are_refused(tmp_path, images, issame, message):
    with pytest.raises(PairsError, match=message):
        read_bytes(tmp_path, pickle.dumps((images, issame), 4))


def test_written_set_is_read_by_us_and_by_the_standard_library(tmp_path):
    path, images, same = tmp_path / "new.bin", [JPEG, JPEG + b"1", JPEG + b"2", JPEG], [True, False]
    write_pairs(path, images, same)
    assert pickle.loads(path.read_bytes()) == (images, same)
    assert read_pairs(path).images == images
    assert read_pairs(path).same.tolist() == same


def test_failed_write_leaves_the_old_set_alone(tmp_path):
    path = tmp_path / "set.bin"
    write_pairs(path, [JPEG, JPEG], [True])
    before = path.read_bytes()
    with pytest.raises(PairsError, match=r"image 1 is 3 bytes beginning with 504e47"):
        write_pairs(path, [JPEG, b"PNG"], np.array([False]))
    with pytest.raises(PairsError, match=r"3 images for 1 pairs"):
        write_pairs(path, [JPEG] * 3, [True])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def payloads(command: str) -> dict[str, bytes]:
    """Programs that run a shell command, or try to, by opcode."""
    text = command.encode()
    argument = b"X" + struct.pack("<I", len(text)) + text
    system = b"cos\nsystem\n"
    for code in (0x21, 0x2121, 0x212121):
        if ("os", "system") not in copyreg._extension_registry:
            copyreg.add_extension("os", "system", code)
    code = copyreg._extension_registry["os", "system"]
    return {
        "GLOBAL": system + argument + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + argument + b"\x85R.",
        "INST": b"(" + argument + b"ios\nsystem\n.",
        "OBJ": b"(" + system + argument + b"o.",
        "NEWOBJ": b"\x80\x02" + system + argument + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + argument + b"\x85}\x92.",
        "EXT1": b"\x80\x02\x82" + struct.pack("<B", code) + argument + b"\x85R.",
        "EXT2": b"\x80\x02\x83" + struct.pack("<H", code) + argument + b"\x85R.",
        "EXT4": b"\x80\x02\x84" + struct.pack("<I", code) + argument + b"\x85R.",
        "PERSID": b"P" + text + b"\n.",
        "BINPERSID": argument + b"Q.",
        "BUILD": b"(ccollections\nCounter\no}X\x0c\0\0\0__setstate__" + system + b"sb" + argument
        + b"b.",
        "REDUCE of text": b"X\x06\0\0\0system" + argument + b"\x85R.",
        "codecs": b"c_codecs\nlookup\n" + argument + b"\x85R.",
        "codecs name": b"c_codecs\nencode\n" + argument + b"X\x04\0\0\0zlib\x86R.",
        "builtins": b"cbuiltins\nexec\n" + argument + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        "stub as argument": b"cnumpy\ndtype\ncnumpy\nndarray\n\x85R.",
        "ndarray called": b"cnumpy\nndarray\n" + argument + b"\x85R.",
        "object dtype": b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R.",
    }  # fmt: skip


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "marker"
    for (module, name), code in list(copyreg._extension_registry.items()):
        if (module, name) == ("os", "system"):
            copyreg.remove_extension(module, name, code)


@pytest.mark.parametrize("opcode", payloads("").keys())
def test_payloads_are_refused_and_never_run(tmp_path, marker, opcode):
    payload = payloads(f"touch {marker}")[opcode]
    tail = payload[:-1] if payload.endswith(b".") else payload
    wrapped = b"(](B" + struct.pack("<I", len(JPEG)) + JPEG + tail + b"e](\x88et."
    for data in (payload, wrapped):
        with pytest.raises(PairsError, match=r"set.bin: .*write_pairs"):
            read_bytes(tmp_path, data)
        assert not marker.exists()


@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1"])
def test_payloads_are_live(marker, opcode):
    """An unpickler would run them: otherwise the test before this one shows nothing."""
    pickle.loads(payloads(f"touch {marker}")[opcode])
    assert marker.exists()


def test_named_modules_are_not_imported(tmp_path):
    assert "wave" not in sys.modules
    with pytest.raises(PairsError, match=r"offset 0, opcode GLOBAL: the global 'wave' 'open'"):
        read_bytes(tmp_path, b"cwave\nopen\nX\x01\0\0\0x\x85R.")
    assert "wave" not in sys.modules


TEXT = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x01"
ENCODE = b"c_codecs\nencode\nq\x02X\x06\0\0\0latin1q\x03"
SHAPE = b"cnumpy.core.numeric\n_frombuffer\nq\x04cnumpy\ndtype\nX\x02\0\0\0u1\x89\x88\x87Rq\x05"
BOMBS = {
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60),
    "BINBYTES8 of all": b"\x80\x04\x8e" + b"\xff" * 8,
    "BINBYTES": b"B\xff\xff\xff\xff",
    "BINSTRING below zero": b"T\xff\xff\xff\xff",
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 60),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 60),
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60),
    "LONG1": b"\x8a\xff",
    "INT": b"I" + b"9" * 100_000 + b"\n",
    "memo index": b"Nr\xff\xff\xff\xff" * 1000,
    "memo": b"]\x94" * 100_000,
    "MARK and TUPLE": b"(" * 200_000 + b"t" * 200_000,
    "TUPLE1": b")" + b"\x85" * 200_000,
    "lists": b"](" + b"]" * 200_000 + b"e",
    "tuples that double": b"N\x85q\x01" + b"h\x01h\x01\x86q\x01" * 100_000,
    "lists that grow": b"]q\x00" + b"(" + b"h\x00" * 100_000 + b"e",
    "list of itself": b"]q\x00" + b"(h\x00h\x00h\x00e" * 20_000 + b"]\x86.",
    "DUP": b"]" + b"2" * 1000,
    "text encoded again and again": TEXT + ENCODE + b"0" + b"]" + b"h\x02h\x01h\x03\x86Ra" * 50_000,
    "text encoded": ENCODE + TEXT + b"\x86R]" + b"h\x02h\x01h\x03\x86Ra" * 50_000,
    "array that is larger": SHAPE
    + b"(C\x03abch\x05J\xff\xff\xff\x7fJ\xff\xff\xff\x7fK\x03\x87X\1\0\0\0CtR",
    "array below zero": SHAPE
    + b"(C\x03abch\x05J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x03\x87X\1\0\0\0CtR",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_memory_proportional_to_the_file(tmp_path, name):
    bomb = BOMBS[name]
    path = tmp_path / "bomb.bin"
    path.write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(PairsError, match=r"bomb\.bin"):
            read_pairs(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * len(bomb) + (3 << 20)


def set_of(bins: object, issame: object) -> bytes:
    return pickle.dumps((bins, issame), 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"offset 0, opcode none: needs 1 bytes where 0 are left"),
        (set_of([JPEG] * 2, [True])[:-1], r"opcode FRAME: a frame of 279 bytes where 278 are left"),
        (set_of([JPEG] * 2, [True]) + b"x", r"opcode STOP: 1 bytes follow the end"),
        (b"NN.", r"opcode STOP: 1 values and 0 marks are left over"),
        (b"(N.", r"opcode STOP: 0 values and 1 marks are left over"),
        (b"\x80\x06N.", r"offset 0, opcode PROTO: protocol 6 is above 5"),
        (b"N\x00.", r"offset 1, opcode 0x00: this opcode is not on the list"),
        (b"h\x05.", r"memo index 5 was never put"),
        (b"(N\x85", r"opcode none"),
        (b"N(\x85.", r"opcode TUPLE1: needs 1 values on the stack"),
        (b"t.", r"opcode TUPLE: no MARK"),
        (b"NNa.", r"opcode APPEND: appends to a NoneType"),
        (b"S'a\\q'\n.", r"opcode STRING: .* is no escape"),
        (b"X\x02\0\0\0\xff\xff.", r"opcode BINUNICODE: the text is not utf-8"),
        (b"V\\u12\n.", r"opcode UNICODE: the text is not raw-unicode-escape"),
        (b"Ix\n.", r"b'x' is not a 64-bit integer"),
        (b"N.", r"must be \(bins, issame\)"),
        (set_of([], []), r"0 images for 0 pairs"),
        (set_of([JPEG] * 3, [True]), r"3 images for 1 pairs"),
        (set_of([JPEG] * 2, [True, False]), r"2 images for 2 pairs"),
        (set_of([JPEG] * 2, [3]), r"issame\[0\] is 3"),
        (set_of([JPEG] * 2, np.array([2], np.uint8)), r"issame must be \[n\] of bools"),
        (set_of([JPEG] * 2, np.array([2], np.uint8).view(np.bool_)), r"or of integers 0 and 1"),
        (set_of([JPEG, "text"], [True]), r"image 1 is str"),
        (set_of([JPEG, b"\x89PNG"], [True]), r"image 1 is 4 bytes beginning with 89504e47"),
        (set_of([JPEG, np.zeros((2, 2), np.uint8)], [True]), r"must be uint8 \[H, W, 3\]"),
        (set_of([JPEG, np.zeros((2, 2, 4), np.uint8)], [True]), r"must be uint8 \[H, W, 3\]"),
        (set_of([JPEG, np.zeros((0, 2, 3), np.uint8)], [True]), r"image 1 is 0 bytes"),
        (set_of([JPEG, np.zeros((2, 2, 3))], [True]), r"opcode REDUCE: this call"),
        (set_of([JPEG, np.array([None])], [True]), r"opcode REDUCE: this call"),
    ],
)
def test_damaged_sets_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(PairsError, match=message):
        read_bytes(tmp_path, data)


def test_a_device_is_refused_and_a_missing_file_is_named(tmp_path):
    with pytest.raises(PairsError, match="not a regular file"):
        read_pairs("/dev/zero")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_pairs(tmp_path / "absent.bin")


@pytest.mark.slow
def test_fuzzed_sets_are_read_or_refused(tmp_path):
    """Damage of every kind ends in a set or in PairsError, never in another exception."""
    rng = random.Random(20)
    seeds = [path.read_bytes() for path in WRITTEN]
    opcodes = b"(.NIJKMLSTUBCVX]la)tpqrghjcRbeQPio0123sud}\x80\x81\x82\x85\x86\x87\x88\x89\x8a"
    opcodes += b"\x8c\x8d\x8e\x93\x94\x95\x96\x97\x98"
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "fuzzed.bin"
    for _ in range(20_000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            start = rng.randrange(len(data))
            match rng.randrange(6):
                case 0:
                    data[start] = rng.randrange(256)
                case 1:
                    data[start] = rng.choice(opcodes)
                case 2:
                    del data[start : start + rng.randrange(1, 9)]
                case 3:
                    data[start:start] = bytes(rng.choices(opcodes, k=rng.randrange(1, 9)))
                case 4:
                    data[start:start] = rng.choice(seeds)[: rng.randrange(100)]
                case 5:
                    data[start : start + 4] = rng.choice(
                        (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f")
                    )
            data = data or bytearray(b".")
        path.write_bytes(data)
        try:
            pairs = read_pairs(path)
        except PairsError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 1000 + len(os.fspath(path))  # noqa: PT017
        else:
            outcomes["read"] += 1
            assert len(pairs.images) == 2 * len(pairs.same)
    assert outcomes["read"] > 1000
    assert outcomes["refused"] > 1000


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from(sorted(WRITTEN)),
    st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=6)), max_size=5),
)
def test_changed_sets_have_two_images_a_pair_or_are_refused(tmp_path, path, changes):
    """Changes that hypothesis makes small: the first that gives another error is shown."""
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at : at + len(value)] = value
    try:
        pairs = read_bytes(tmp_path, bytes(data))
    except PairsError:
        return
    assert len(pairs.images) == 2 * len(pairs.same) > 0
