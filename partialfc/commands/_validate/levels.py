"""Each level over a whole pack: in parallel, with its cost announced and its progress shown."""

# Shape suffixes: M = records of the pack, N = some of them, C = identities.

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from partialfc.commands._validate.look import Look
from partialfc.data.checks import check_headers, check_image, check_index, check_labels
from partialfc.data.packs.index_cache import cache_places
from partialfc.data.packs.pack import Pack
from partialfc.data.skip_list import BadRecord
from partialfc.data.source import Source
from partialfc.words import duration, size
from partialfc.writing import write_text

PAGE = 4096
"""Bytes that a file system reads for one header."""
_CHUNK = 1 << 14
_PROBES = 2048
_HASH_BLOCK = 1 << 24

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Report:
    """What was found.

    Attributes:
        levels: The numbers of each level that was run.
        hints: What is unusual, but not wrong.
        bad: Records that cannot be used.
    """

    levels: dict[str, dict[str, Any]] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    bad: dict[tuple[int | None, int], BadRecord] = field(default_factory=dict)

    def add(self, records: Iterable[BadRecord]) -> int:
        """Take note of bad records, of each once; return how many there were."""
        count = 0
        for record in records:
            self.bad.setdefault((record.image, record.offset), record)
            count += 1
        return count


def index(pack: Pack, report: Report) -> None:
    """Keys and offsets, and where the file ends."""
    bad = report.add(check_index(pack))
    report.levels["index"] = {"records": len(pack.index), "images": len(pack), "bad": bad}
    if pack.index.sorted_M is not None:
        report.hints.append(
            "records lie in another order than their keys, so data.block reads no neighbours; "
            "partialfc convert pack writes them in order"
        )


def headers(pack: Pack, report: Report, workers: int, console: Console) -> None:
    """Every header, and the labels together."""
    count = len(pack.index)
    _announce_headers(pack, workers, console)
    places = pack.index.by_offset()
    chunks = (places(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    bad = 0
    images_C = np.zeros(pack.declared_identities or 0, np.int64)
    with ThreadPoolExecutor(workers) as pool, _progress(console) as progress:
        task = progress.add_task("headers", total=count)
        for checked in _in_order(pool, lambda at_N: check_headers(pack, at_N), chunks):
            bad += report.add(checked.bad)
            found_C = np.bincount(checked.identity_N, minlength=len(images_C))
            found_C[: len(images_C)] += images_C
            images_C = found_C
            progress.advance(task, _CHUNK)
    report.levels["headers"] = {"records": count, "bad": bad}
    labels(images_C, report)


def labels(images_C: NDArray[np.int64], report: Report) -> None:
    """How many images the identities have."""
    report.hints += check_labels(images_C)
    report.levels["labels"] = {
        "identities": len(images_C),
        "images_per_identity": {
            "min": int(images_C.min()) if len(images_C) else 0,
            "median": float(np.median(images_C)) if len(images_C) else 0.0,
            "max": int(images_C.max()) if len(images_C) else 0,
        },
        "without_images": int((images_C == 0).sum()),
        "with_one_image": int((images_C == 1).sum()),
    }


def images(
    pack: Source, report: Report, workers: int, console: Console, wanted: int, seed: int
) -> Look:
    """Some images, drawn at random, or all of them, decoded."""
    count = min(wanted, len(pack))
    drawn: Sequence[int] = range(len(pack))
    if count < len(pack):
        chosen = np.random.default_rng(seed).choice(len(pack), count, replace=False)
        drawn = np.sort(chosen).tolist()
    if isinstance(pack, Pack):
        mean = pack.file.size / len(pack.index)
    else:
        mean = float(np.maximum(pack.index.size_N, 0).mean())
    console.print(f"images: {count:,} to decode, about {size(count * mean)} to read")
    look, bad = Look(), 0
    with ThreadPoolExecutor(workers) as pool, _progress(console) as progress:
        task = progress.add_task("images", total=count)
        checked = _in_order(pool, lambda image: check_image(pack, image), drawn)
        for image, found in zip(drawn, checked, strict=True):
            if found.pixels is None:
                bad += report.add([BadRecord.of(pack, image, found.problem)])
            else:
                look.add(found.pixels, found.size)
            progress.advance(task)
    report.levels["images"] = {
        "decoded": count,
        "bad": bad,
        "bad_share_at_most": bad / count if count == len(pack) else share_at_most(bad, count),
        **(look.numbers() if look.images else {}),
    }
    return look


def file_hash(pack: Pack, report: Report, console: Console) -> None:
    """SHA-256 of the whole file, kept beside the pack or in the cache folder."""
    status = pack.path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    places = cache_places(pack.path, "sha256")
    for place in places:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(place.read_text(encoding="utf-8"))
            if kept["stamp"] == stamp:
                report.levels["hash"] = {"sha256": str(kept["sha256"]), "cached": True}
                return
    console.print(f"hash: {size(status.st_size)} to read")
    digest = hashlib.sha256()
    with pack.path.open("rb") as file, _progress(console) as progress:
        task = progress.add_task("hash", total=status.st_size)
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            progress.advance(task, len(block))
    report.levels["hash"] = {"sha256": digest.hexdigest(), "cached": False}
    _keep(places, {"stamp": stamp, "sha256": digest.hexdigest()})


def share_at_most(bad: int, count: int, confidence: float = 0.95) -> float:
    """Return the largest share of bad images that is still likely (Clopper and Pearson, one-sided).

    With none bad among 30,000 it is 1e-4.
    """
    if bad >= count:
        return 1.0
    low, high = bad / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = (
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            + k * math.log(middle) + (count - k) * math.log1p(-middle)
            for k in range(bad + 1)
        )  # fmt: skip
        likely = sum(map(math.exp, terms)) > 1 - confidence
        low, high = (middle, high) if likely else (low, middle)
    return high


def _announce_headers(pack: Pack, workers: int, console: Console) -> None:
    """Say what reading every header costs, from a first look at some of them."""
    count = len(pack.index)
    step = max(1, count // _PROBES)
    started = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda at: check_headers(pack, np.array([at])), range(0, count, step)))
    seconds = (time.monotonic() - started) / len(range(0, count, step)) * count
    console.print(
        f"headers: {count:,} records, {size(min(count * PAGE, pack.file.size))} in reads of "
        f"{PAGE} bytes, at most {duration(seconds)} by a first look at {min(count, _PROBES):,}"
    )


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Map in threads with a bounded number of results waiting."""
    iterator = iter(items)
    waiting = [pool.submit(function, item) for item in islice(iterator, 64)]
    while waiting:
        yield waiting.pop(0).result()
        waiting.extend(pool.submit(function, item) for item in islice(iterator, 1))


def _keep(places: list[Path], value: Any) -> None:
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(value))
            return


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
