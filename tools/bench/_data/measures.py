"""One measurement of tools/bench/data.py, in a process of its own: ``python measures.py JSON``."""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 112
PACE = 1000
"""Images per second that are taken while memory is measured: a loader waits, as in training."""


def main(arguments: list[str]) -> int:
    """Measure and print the result as JSON."""
    options = json.loads(arguments[0])
    if "cold" in options:
        (forget if options.pop("cold") else recall)(Path(options["pack"]))
    print(json.dumps(globals()[options.pop("measure")](**options)))
    return 0


def forget(path: Path) -> None:
    """Drop a file, or those of a folder, from the page cache; no process may have it mapped."""
    for name in path.rglob("*.jpg") if path.is_dir() else [path]:
        with name.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recall(path: Path) -> None:
    """Read a file, so that it is in the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def rate(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Return images per second, by the clock and by CPU time, after some batches to warm up."""
    for _ in range(8):  # more than any loader has ready
        next(batches)
    start, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() < start + seconds:
        images += next(batches)
    spent = time.perf_counter() - start
    return {
        "images_per_second": images / spent,
        "images_per_cpu_second": images / (_cpu_seconds() - cpu),
    }


def _cpu_seconds() -> float:
    """Of this process and of its workers that run."""
    ticks = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    for process in ("self", *children):
        fields = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def stream_of(pack: str, batch: int, block: int | None = None) -> Any:
    """Return the stream of batches of a pack, flipped and normalised."""
    from partialfc.data.arrangements import arrangement
    from partialfc.data.augment import Augmentation
    from partialfc.data.dataset import open_dataset
    from partialfc.data.loaders.stream import Stream
    from partialfc.data.order import Order

    dataset = open_dataset([Path(pack)])
    order = Order(len(dataset), batch, 1, arrangement=arrangement(dataset, block=block))
    return Stream(dataset=dataset, order=order, augmentation=Augmentation(), image_size=SIZE)


def reader(pack: str, batch: int, seconds: float, block: int | None = None) -> dict[str, Any]:
    """Records to checked JPEG bytes, identities and draws; nothing is decoded."""
    stream = stream_of(pack, batch, block)

    def batches() -> Iterator[int]:
        step = 0
        while True:
            encoded = stream.batch(step * batch)
            for jpeg in encoded.jpegs:
                jpeg.tobytes()  # as a decoder does: all of it is read
            yield len(encoded.jpegs)
            step += 1

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found: dict[str, Any] = rate(batches(), seconds)
    found["major_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    return found


def cold_epoch(pack: str, batch: int, images: int, block: int | None = None) -> dict[str, Any]:
    """Read some images of a pack that is not in memory; how long, and what the disk was asked."""
    stream = stream_of(pack, batch, block)
    start, read = time.perf_counter(), _read_bytes()
    for step in range(images // batch):
        for jpeg in stream.batch(step * batch).jpegs:
            jpeg.tobytes()
    wanted = sum(
        len(jpeg) for step in range(images // batch) for jpeg in stream.batch(step * batch).jpegs
    )
    return {
        "images_per_second": images / (time.perf_counter() - start),
        "disk_bytes_per_byte": (_read_bytes() - read) / wanted,
    }


def ours(
    pack: str,
    batch: int,
    seconds: float,
    loader: Any,
    threads: int,
    device: str = "cpu",
    block: int | None = None,
    store: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Our loaders; ``pillow`` is torch's without simplejpeg, ``store`` the pace of a far one."""
    import torch

    from partialfc.data.images import jpeg
    from partialfc.data.loaders.loader import open_batches

    torch.set_num_threads(1)
    if loader == "pillow":
        vars(jpeg)["decode_jpeg"], loader = None, "torch"
    if store:
        from tools.bench._data.slow import SlowFileSystem

        SlowFileSystem.reset(**store)
    stream = stream_of(pack, batch, block)
    opened = open_batches(
        stream, 0, device=torch.device(device), loader=loader, threads=threads, prefetch=2
    )
    with closing(opened):
        return rate((len(one.images) for one in opened), seconds)


def mxnet_reader(pack: str, batch: int, seconds: float, threads: int) -> dict[str, Any]:
    """DALI with its own reader of the same files."""
    from tools.bench._data.mxnet import mxnet_batches

    return rate(mxnet_batches(pack, batch, threads, SIZE), seconds)


def ordinary(pack: str, batch: int, seconds: float, threads: int) -> dict[str, Any]:
    """Torch's own DataLoader with Pillow, an image at a time in worker processes."""
    from tools.bench._data.ordinary import ordinary_batches

    return rate(ordinary_batches(pack, batch, threads), seconds)


def memory(pack: str, batch: int, seconds: float, loader: Any) -> dict[str, Any]:
    """Resident memory of a loader over time, without the pages of the mapped pack."""
    import torch

    from partialfc.data.loaders.loader import open_batches

    opened = open_batches(
        stream_of(pack, batch), 0, device=torch.device("cpu"), loader=loader, threads=2
    )
    samples: list[tuple[float, int]] = []
    images, start = 0, time.monotonic()
    with closing(opened):
        for one in opened:
            images += len(one.images)
            time.sleep(max(0.0, start + images / PACE - time.monotonic()))
            now = time.monotonic()
            if len(samples) < now - start:  # one a second
                samples.append((now, _anonymous_bytes()))
            if now > start + seconds:
                break
    times, sizes = np.array(samples).T
    half = times > times[0] + 0.2 * seconds  # buffers have their size by then
    tenth = max(1, int(half.sum()) // 10)
    first, last = sizes[half][:tenth].mean(), sizes[half][-tenth:].mean()
    return {
        "images": images,
        "seconds": seconds,
        "threads": threading.active_count(),
        "mib": last / 2**20,
        "growth": last / first - 1,
    }


def index(folder: str) -> dict[str, Any]:
    """Open the pack with millions of records from its kept index."""
    from partialfc.data.packs.pack import open_pack

    before = _anonymous_bytes()
    start = time.perf_counter()
    pack = open_pack(Path(folder) / "train.rec")
    seconds = time.perf_counter() - start
    kept = Path(folder) / "train.rec.index"
    records = len(pack.index)
    return {
        "seconds": seconds,
        "records": records,
        "shared_bytes_per_record": kept.stat().st_size / records if kept.exists() else None,
        "own_bytes_per_record": (_anonymous_bytes() - before) / records,
    }


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
