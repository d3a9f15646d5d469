"""What one rank reads, adds up and keeps, by files, images, identities and steps."""

import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.checkpoint.pieces import THREADS, PieceSums, compare_pieces
from partialfc.config.run import Run
from partialfc.data import found_whole
from partialfc.data.files.index import open_file_index
from partialfc.data.packs import index_cache
from partialfc.data.packs.index import RecordIndex
from partialfc.data.packs.recordio import RecordFile
from partialfc.records import ledger
from partialfc.runtime.beats import longest_patience
from tools.bench._growth.programs import ran

# By name, for mypy not to follow it into the tests, which are not typed.
month_of = importlib.import_module("tests.support.month")

Found = dict[str, Any]
_DIM = 128
_PLUGIN = "tests.support.speech"
_SETTINGS = """
run = {{folder = "{0}/run", steps = 1, plugins = "{1}", device = "cpu"}}
data = {{kind = "arrays", train = "{0}/a.npy", labels = "{0}/labels.npy", shape = [16, 24], global_batch = 256}}
backbone = {{name = "{1}:XVector", embedding_dim = {2}}}
precision = {{compute = "fp32"}}
schedule = {{warmup_steps = 0}}
verification = {{every_steps = 0}}
log = {{tensorboard = false, progress = false}}
head = {{sample_rate = 0.01}}
"""  # noqa: E501
_GROWN = """
import sys, time, torch
from partialfc.commands import identities
from tools.bench._head.memory import Memory
memory = Memory(torch.device("cpu"))
assert memory.reset()
before, began = memory.now(), time.process_time()
assert identities.main(sys.argv[1:]) == 0
print(memory.peak() - before, time.process_time() - began)
"""


def sums(mebibytes: int, folder: Path) -> Found:
    """A part of a checkpoint compared with its checksums, by one thread and by several."""
    path, data = folder / "part", os.urandom(1 << 20) * mebibytes
    path.write_bytes(data)
    with ThreadPoolExecutor(THREADS) as pool:
        whole = PieceSums(pool)
        whole.update(data)
        note = whole.note()
    hang_seconds = Run.model_fields["hang_seconds"].default
    found: Found = {"patience_seconds": longest_patience(hang_seconds)}
    for threads in (1, THREADS):
        with ThreadPoolExecutor(threads) as pool:
            cpu, wall = time.process_time(), time.monotonic()
            compare_pieces(path, note, range(len(note.sha256)), pool)
            seconds = {"": time.process_time() - cpu, "wall_": time.monotonic() - wall}
        for kind, value in seconds.items():
            found[f"{kind}seconds_of_a_gigabyte_by_{threads}"] = value / len(data) * 1e9
    return found


def goodput(starts: int, folder: Path) -> Found:
    """The ledger of so many starts, as each start and each look at the page adds it up."""
    month_of.write_starts(folder / "ledger.jsonl", starts)
    began = time.process_time()
    totals = ledger.goodput(ledger.read_ledger(folder / "ledger.jsonl"))
    return {"seconds": time.process_time() - began, "wall_of_the_run": totals["wall"]}


def month(parts: int, folder: Path) -> Found:
    """Records of a month, in parts of 8 MiB: what is read of them."""
    month_of.write_month(folder, parts)
    found: Found = {}
    for what in month_of.LOOKS:
        done = ran("-m", "tests.support.month", folder, what)
        look = json.loads(done.stdout.splitlines()[-1])
        found |= {f"{what}_{name}": look[name] for name in ("seconds", "read", "memory")}
    return found


def moves(steps: int, folder: Path) -> Found:
    """What unsampled rows have missed, of rows that none of the steps samples."""
    rule = RowSGD(lr=0.1, momentum=0.9, weight_decay=5e-4, unsampled="move")
    optimizer = PartialFC(10_000, 64, ArcFace(), sample_rate=0.1, optimizer=rule).optimizer
    held, group = optimizer._moves, optimizer.param_groups[0]
    assert held is not None
    optimizer.states()
    seconds, most = [], 0
    for _ in range(steps):
        began = time.thread_time()
        held.extend(group, None)
        if held.due:
            optimizer._drop_oldest(held)
        seconds.append(time.thread_time() - began)
        most = max(most, held.products.nbytes)
    return {
        "bytes_at_most": most,
        "median_seconds_of_a_step": statistics.median(seconds),
        "mean_seconds_of_the_last_half": statistics.fmean(seconds[steps // 2 :]),
        "longest_seconds_of_the_last_half": max(seconds[steps // 2 :]),
    }


def index(records: int, folder: Path) -> Found:
    """A kept index: the first rank of a host hashes it, the others take what it found whole."""
    path = folder / "train.rec"
    path.touch()
    os.truncate(path, 8 * records + 8)
    file = RecordFile(path)
    kept = RecordIndex(range(records), np.arange(0, 8 * records, 8), None)
    assert index_cache._keep(file, index_cache._stamp(file), kept)
    return _by_hosts(lambda: len(index_cache.open_index(file)), records)


def folders(count: int, folder: Path) -> Found:
    """A folder of identities whose index is kept: the first rank of a host looks at each."""
    for number in range(count):
        (folder / f"images/{number // 1000}_{number}").mkdir(parents=True)
    for number in range(8):
        (folder / f"images/0_0/{number}.jpg").write_bytes(b"1")
    least, index_cache.KEPT_FROM = index_cache.KEPT_FROM, 1
    open_file_index(folder / "images")
    found = _by_hosts(lambda: len(open_file_index(folder / "images")), 8)
    index_cache.KEPT_FROM = least
    return found


def _by_hosts(opened: Callable[[], int], expected: int) -> Found:
    """Seconds of the first rank of a host, and of another."""
    found = {}
    for who, marks in (("first_rank", frozenset[bytes]()), ("others", None)):
        cpu, wall = time.process_time(), time.monotonic()
        with found_whole.trusting(found_whole.own() if marks is None else marks):
            assert opened() == expected
        found[f"seconds_of_the_{who}"] = time.process_time() - cpu
        found[f"wall_seconds_of_the_{who}"] = time.monotonic() - wall
    return found


def identities(count: int, folder: Path) -> Found:
    """``partialfc identities`` of a real run, whose rows come from everywhere by a map."""
    shape = (count, 16, 24)
    np.lib.format.open_memmap(folder / "a.npy", "w+", np.uint8, shape).flush()
    np.save(folder / "labels.npy", np.arange(count))
    (folder / "settings.toml").write_text(_SETTINGS.format(folder, _PLUGIN, _DIM), encoding="utf-8")
    ran("-m", "partialfc", "train", folder / "settings.toml")
    new = np.random.default_rng(0).permutation(count)
    lines = [f"{old},{place}\n" for old, place in enumerate(new.tolist())]
    (folder / "map.csv").write_text("".join(lines), encoding="utf-8")
    words = folder / "run", folder / "start", "--map", folder / "map.csv", "--plugin", _PLUGIN
    done = ran("-c", _GROWN, *words)
    memory, seconds = done.stdout.splitlines()[-1].split()
    centers = 4 * _DIM * count
    return {
        "bytes_of_the_centers": centers,
        "memory": int(memory),
        "memory_of_the_centers": int(memory) / centers,
        "seconds": float(seconds),
    }
