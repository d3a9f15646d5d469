"""Feed a million mutated packs, images, .bin files and journals of align to their readers.

    python tools/bench/fuzz.py --inputs 1000000 --json OUT

Each reader may accept an input or refuse it with its own kind of error. A crash, another exception,
an input that takes longer than --seconds, or one that needs more than --memory MiB fails; the input
is told by its target, seed and number, and --target, --seed and --only run it again. An image whose
headers are accepted is decoded too; a photo may have at most 4 million pixels here, so that
--memory tells a reader that allocates what it should not.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from partialfc.commands._align.journal import FORMAT, Entry, append, begin, read_journal
from partialfc.cores import usable_cores
from partialfc.data.images import formats
from partialfc.data.images.jpeg import check_jpeg, decode, encode
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import MAGIC_BYTES, RecordError
from partialfc.data.packs.writer import PackWriter, write_insightface_pack
from partialfc.data.sets.pairs import PairsError, read_pairs, write_pairs
from tools.bench.conditions import conditions

SHARES = {"pack": 0.3, "jpeg": 0.3, "bin": 0.15, "image": 0.2, "journal": 0.05}
"""Of the inputs."""
CHUNK = 1000
MADE = {"format": FORMAT, "size": 112, "detector": "mtcnn"}
"""The first line of a journal."""
_MOST_PIXELS = 1 << 22
INTERESTING = (
    b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0",
    b"\xff\xff\xff\x1f", b"\xff\xff\xff\x3f", MAGIC_BYTES, b"\0\0\x80\x7f", b"\0\0\xc0\xff",
    b"\xff\xda", b"\xff\xc0", b"\xff\xd9", b"\xff\xff", b"cos\nsystem\n", b"\x80\x04\x95",
    b"R", b".", b"\t", b"\n", b"-1", b"9223372036854775807",
)  # fmt: skip


class Target(NamedTuple):
    """A reader: what it is fed, and the error that it may raise."""

    seeds: list[tuple[bytes, ...]]
    read: Callable[[tuple[bytes, ...], Path], None]
    refuses: type[Exception]


class Outcome(NamedTuple):
    """What became of a chunk of inputs."""

    target: str
    counts: Counter[str]
    slowest: float
    peak_bytes: int
    failures: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all (1,000,000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--target", choices=tuple(SHARES), help="only this reader")
    parser.add_argument("--only", type=int, help="only the input with this number")
    parser.add_argument("--seconds", type=float, default=5.0, help="longest for one input (5)")
    parser.add_argument("--memory", type=int, default=200, help="MiB, most for one input (200)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args(arguments)
    shares = {options.target: 1.0} if options.target else SHARES
    jobs = [
        (name, options.seed, start, min(CHUNK, count - start), options.seconds, options.memory)
        for name, count in ((name, int(options.inputs * share)) for name, share in shares.items())
        for start in range(0, count, CHUNK)
    ]
    if options.only is not None:
        target = options.target or "pack"
        jobs = [(target, options.seed, options.only, 1, options.seconds, options.memory)]
    started = time.monotonic()
    outcomes, crash = run(jobs, options.workers)
    record = summary(outcomes, time.monotonic() - started, crash)
    print(json.dumps(record["targets"], indent=2))
    for failure in record["failures"]:
        print(failure, file=sys.stderr)
    if options.json:
        options.json.write_text(
            json.dumps({**conditions(), **record}, indent=2) + "\n", encoding="utf-8"
        )
    return 1 if record["failures"] else 0


def run(jobs: list[tuple[Any, ...]], workers: int) -> tuple[list[Outcome], str]:
    """Do the jobs in processes; return what became of them, and a crash if there was one."""
    columns = (TextColumn("inputs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=_memory_disk()) as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
        context.Pool(workers, _start_worker, (folder,)) as pool,
    ):
        row = progress.add_task("", total=sum(job[3] for job in jobs))
        results = pool.imap_unordered(fuzz, jobs)
        for _ in jobs:
            try:
                outcome = results.next(timeout=600)
            except multiprocessing.TimeoutError:  # the process of a job has died, or is stuck
                notes = sorted(Path(folder).glob("*.note"))
                return outcomes, "; ".join(note.read_text(encoding="utf-8") for note in notes)
            outcomes.append(outcome)
            progress.advance(row, outcome.counts.total())
    return outcomes, ""


def summary(outcomes: list[Outcome], seconds: float, crash: str) -> dict[str, Any]:
    """Return the record of all outcomes."""
    targets: dict[str, Any] = {}
    for name in dict.fromkeys(outcome.target for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.target == name]
        counts = sum((outcome.counts for outcome in own), Counter[str]())
        targets[name] = {
            "inputs": counts.total(),
            "outcomes": dict(counts),
            "slowest_seconds": round(max(outcome.slowest for outcome in own), 4),
            "most_memory_mib": round(max(outcome.peak_bytes for outcome in own) / 2**20, 1),
        }
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    if crash:
        failures.append(f"a process died or hung; last inputs: {crash}")
    return {"seconds": round(seconds, 1), "targets": targets, "failures": failures}


def fuzz(job: tuple[str, int, int, int, float, int]) -> Outcome:
    """Feed inputs [start, start + count) of one target."""
    name, seed, start, count, seconds, memory = job
    target, folder = TARGETS[name], _FOLDER / str(os.getpid())
    folder.mkdir(exist_ok=True)
    note = _FOLDER / f"{os.getpid()}.note"
    counts, failures, slowest = Counter[str](), [], 0.0
    before = _peak()
    used = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + (memory << 20), resource.RLIM_INFINITY))
    for number in range(start, start + count):
        rng = np.random.default_rng([seed, number, list(SHARES).index(name)])
        files = list(target.seeds[rng.integers(len(target.seeds))])
        which = int(rng.integers(len(files)))
        files[which] = mutate(files[which], rng)
        note.write_text(f"--target {name} --seed {seed} --only {number}", encoding="utf-8")
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            target.read(tuple(files), folder)
            counts["accepted"] += 1
        except target.refuses:
            counts["refused"] += 1
        except BaseException as error:
            counts["failed"] += 1
            failures.append(
                f"{note.read_text(encoding='utf-8')}: {type(error).__name__}: {error}\n"
                f"{traceback.format_exc()}"
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.perf_counter() - began)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    note.unlink()
    return Outcome(name, counts, slowest, _peak() - before, failures)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Return data with one to six changes: bytes, numbers, pieces that move, repeat or go."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 7))):
        at = int(rng.integers(len(changed) + 1))
        size = int(rng.integers(1, 1 + min(64, max(1, len(changed)))))
        match int(rng.integers(8)):
            case 0:
                changed[at : at + 1] = rng.bytes(1)
            case 1:
                if at < len(changed):
                    changed[at] ^= 1 << int(rng.integers(8))
            case 2:
                value = INTERESTING[int(rng.integers(len(INTERESTING)))]
                changed[at : at + len(value)] = value
            case 3:
                value = INTERESTING[int(rng.integers(len(INTERESTING)))]
                aligned = at // 4 * 4
                changed[aligned : aligned + len(value)] = value
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = changed[at : at + size] * int(rng.integers(1, 9))
            case 6:
                other = int(rng.integers(len(changed) + 1))
                changed[at : at + size] = changed[other : other + size]
            case 7:
                if rng.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def read_pack(files: tuple[bytes, ...], folder: Path) -> None:
    """Open a pack from its .rec and .idx, and read all of it."""
    (folder / "a.rec").write_bytes(files[0])
    (folder / "a.idx").unlink(missing_ok=True)
    if len(files) > 1:
        (folder / "a.idx").write_bytes(files[1])
    pack = open_pack(folder / "a.rec")
    for image in range(len(pack)):
        pack.record(image)
        pack.key(image)
    pack.identities(np.arange(len(pack)))
    if not 0 < pack.num_identities <= 1 << 24:
        raise AssertionError(f"{pack.num_identities} identities")


def read_jpeg(files: tuple[bytes, ...], folder: Path) -> None:
    """Check the headers of a JPEG, and decode it if they are accepted."""
    view = np.frombuffer(files[0], np.uint8)
    frame = check_jpeg(view)
    pixels = decode(view)
    if pixels.shape != (frame.height, frame.width, 3):
        raise AssertionError(f"{pixels.shape} pixels of a frame {frame}")


def read_bin(files: tuple[bytes, ...], folder: Path) -> None:
    """Read a verification set."""
    (folder / "a.bin").write_bytes(files[0])
    pairs = read_pairs(folder / "a.bin")
    if len(pairs.images) != 2 * len(pairs.same):
        raise AssertionError("two images for every pair")


def read_image(files: tuple[bytes, ...], folder: Path) -> None:
    """Check the headers of an image of any format, and decode it as photos are."""
    view = np.frombuffer(files[0], np.uint8)
    frame = formats.check_image(view)
    pixels = formats.decode_image(view)
    if sorted(pixels.shape) != sorted((frame.height, frame.width, 3)):
        raise AssertionError(f"{pixels.shape} pixels of a frame {frame}")


def read_align_journal(files: tuple[bytes, ...], folder: Path) -> None:
    """Read what became of photos, and where the faces of each would be."""
    (folder / "a.jsonl").write_bytes(files[0])
    entries = read_journal(folder / "a.jsonl", MADE, folder / "aligned")
    for entry in entries.values():
        if len(entry.files) != len(entry.landmarks):
            raise AssertionError(f"{entry}: a file for each face")


def make_seeds(folder: Path) -> dict[str, list[tuple[bytes, ...]]]:
    """Return sound inputs to mutate; all small, so that a change hits something."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
    jpegs = [encode(image, 80) for image in pixels]
    write_insightface_pack(folder / "face.rec", [(i // 2, j) for i, j in enumerate(jpegs)], 2)
    with PackWriter(folder / "plain.rec") as writer:
        for key, jpeg in enumerate(jpegs[:2]):
            writer.write(key, [float(key), 0.5], jpeg + MAGIC_BYTES * 2)
        writer.write(7, 1.0, b"abcd" + MAGIC_BYTES + jpegs[2])
    packs = []
    for name in ("face", "plain"):
        rec = (folder / f"{name}.rec").read_bytes()
        packs += [(rec, (folder / f"{name}.idx").read_bytes()), (rec,)]
    write_pairs(folder / "a.bin", [jpeg[:200] for jpeg in jpegs], [True, False])
    golden = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "pairs"
    sets = [path.read_bytes() for path in sorted(golden.glob("python*.bin"))]
    return {
        "pack": packs,
        "jpeg": [(jpeg,) for jpeg in [*jpegs, *_other_jpegs(pixels)]],
        "bin": [((folder / "a.bin").read_bytes(),), *((data,) for data in sets)],
        "image": [(image,) for image in _images(pixels)],
        "journal": [(_journal(folder / "a.jsonl"),)],
    }


def _other_jpegs(pixels: np.ndarray) -> list[bytes]:
    from io import BytesIO

    from PIL import Image

    found = []
    for options in ({"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": 0}):
        for image in (Image.fromarray(pixels[0]), Image.fromarray(pixels[0][:, :, 0])):
            file = BytesIO()
            image.save(file, "JPEG", **options)
            found.append(file.getvalue())
    return found


def _images(pixels: np.ndarray) -> Iterator[bytes]:
    """One of each format and kind that photos come in, upright and turned."""
    from io import BytesIO

    from PIL import Image

    colour = Image.fromarray(pixels[0])
    grey = colour.convert("L")
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    floats = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif.tobytes()}
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "PPM", {}), (grey, "PPM", {}), (deep, "PPM", {}), (grey.convert("1"), "PPM", {}),
        (colour, "WEBP", {}), (colour, "WEBP", {"lossless": True}), (grey, "WEBP", turned),
        (colour.convert("RGBA"), "WEBP", {}),
        (colour, "BMP", {}), (grey, "BMP", {}), (colour.quantize(8), "BMP", {}),
        (colour, "TIFF", {}), (deep, "TIFF", {}), (floats, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}), (colour, "TIFF", {"exif": exif}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (deep, "PNG", {}), (colour, "PNG", turned), (colour.quantize(8), "PNG", {}),
        (colour.convert("RGBA"), "PNG", {}), (colour.convert("CMYK"), "JPEG", turned),
    ]  # fmt: skip
    for image, kind, options in kinds:
        file = BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()


def _journal(path: Path) -> bytes:
    """A journal of three photos, one of which has two faces and one none."""
    begin(path, MADE)
    faces = np.random.default_rng(0).uniform(0, 112, (3, 10)).tolist()
    append(
        path,
        [
            Entry("ada/1.jpg", [123, 456], faces[:1], []),
            Entry("ada/2.png", [1, 2], faces[1:], ["too small"]),
            Entry("böb/3.webp", [1, 2], [], ["none found"]),
        ],
    )
    return path.read_bytes()


def _start_worker(folder: str) -> None:
    global _FOLDER
    _FOLDER = Path(folder)
    own = _FOLDER / f"seeds{os.getpid()}"
    own.mkdir()
    readers = {
        "pack": (read_pack, RecordError),
        "jpeg": (read_jpeg, ValueError),
        "bin": (read_bin, PairsError),
        "image": (read_image, ValueError),
        "journal": (read_align_journal, ValueError),
    }
    formats.MOST_PIXELS = formats.MOST_WHOLE_PIXELS = _MOST_PIXELS
    for name, seeds in make_seeds(own).items():
        TARGETS[name] = Target(seeds, *readers[name])
    shutil.rmtree(own)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff says what it finds, a line for each
    signal.signal(signal.SIGALRM, _too_long)
    decode(np.frombuffer(TARGETS["jpeg"].seeds[0][0], np.uint8))


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("too long")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


TARGETS: dict[str, Target] = {}
_FOLDER = Path()

if __name__ == "__main__":
    sys.exit(main())
