"""Looks at the machines of a run before it: the same on all hosts, quick enough, room enough.

Every check is a measurement on all ranks; rank 0 gets them together as a table. What would make the
run fail is refused, what would make it slow is a warning.
"""

import hashlib
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

import torch
from torch import nn

from partialfc.config import Config, ConfigError
from partialfc.config.heads import each_head
from partialfc.data.dataset import DataSet
from partialfc.data.loaders.stream import Batches
from partialfc.data.source import files_of
from partialfc.definitions import plugins
from partialfc.definitions.urls import shown, url_of
from partialfc.distributed.agreement import all_agree, words_of_any
from partialfc.head.rows.formats import DTYPES, SCALED
from partialfc.model.build import new_backbone, row_rule_of
from partialfc.model.frozen import freeze, frozen_words
from partialfc.model.heads import Numbering
from partialfc.model.optimizer import kept_numbers, muon_matrices
from partialfc.records.console import show_table
from partialfc.records.environment import package_version
from partialfc.runtime.place import own_place
from partialfc.runtime.process import Runtime, local_rank
from partialfc.training.findings import Finding, of_all, ranks_with
from partialfc.training.preflight_network import collectives, names, open_files
from partialfc.words import names_of

_SECONDS_OF_DECODING = 2.0
_WRITTEN_BYTES = 64 << 20
_READ_BYTES = 256 << 20
_SKEW_SECONDS = 0.5
_SLOW = 0.5
_HEAD_ROOM = 1.1


def preflight(
    config: Config,
    runtime: Runtime,
    dataset: DataSet,
    identities: Mapping[str, Numbering],
    open_batches: Callable[[], Batches],
) -> list[Finding]:
    """Check everything; return the findings on every rank. Collective.

    Args:
        config: Settings of the run.
        runtime: This rank.
        dataset: Its images.
        identities: Those of each head.
        open_batches: Opens this rank's batches from the start of the run.
    """
    checks = (
        _versions(runtime, plugins.versions(config.model_dump())),
        _frozen(config),
        _clocks(runtime),
        open_files(config, runtime),
        names(runtime),
        collectives(config, runtime),
        _decoding(runtime, open_batches),
        _pack(runtime, dataset),
        _disk(config, runtime, identities),
    )
    return [finding for check in checks for finding in check]


def report(findings: list[Finding], runtime: Runtime) -> None:
    """Show the findings on rank 0, and raise what was refused, in one message.

    Raises:
        ConfigError: If anything was.
    """
    if runtime.leads:
        rows = {
            one.name: one.value
            if one.level == "fine"
            else f"{one.level}: {one.value}. {one.remedy}"
            for one in findings
        }
        show_table("Preflight", rows)
    refused = [one for one in findings if one.level == "refused"]
    if refused:
        raise ConfigError(
            "\n".join(f"preflight, {one.name}: {one.value}. {one.remedy}" for one in refused)
        )


def _versions(runtime: Runtime, code: Mapping[str, str]) -> Iterator[Finding]:
    parts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "partialfc": package_version(),
        **code,
    }
    if runtime.device.type == "cuda":
        parts["gpu"] = torch.cuda.get_device_name(runtime.device)
    text = ", ".join(f"{name} {value}" for name, value in parts.items())
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
    digests = of_all([digest], runtime)[:, 0].tolist()
    usual = statistics.mode(digests)
    if differ := ranks_with([one != usual for one in digests]):
        most = words_of_any(text if digest == usual else "", runtime.ranks)
        other = words_of_any(text if digest != usual else "", runtime.ranks)
        yield Finding(
            "versions",
            f"others on {names_of(differ)}: rank {differ[0]} has {other}, "
            f"rank {digests.index(usual)} has {most}",
            "refused",
            "Give all hosts the same environment.",
        )
    else:
        yield Finding("versions", f"{text} on all {runtime.ranks.size} ranks")


def _frozen(config: Config) -> Iterator[Finding]:
    if config.backbone.freeze:
        backbone = _backbone(config)
        freeze(backbone, config.backbone.freeze)
        yield Finding("backbone.freeze", frozen_words(backbone, config.backbone.freeze))


def _clocks(runtime: Runtime) -> Iterator[Finding]:
    all_agree(True, runtime.ranks)  # so that all look at the same time
    now = of_all([time.time()], runtime)[:, 0]
    away = (now - now.median()).abs()
    skew = away.max().item()
    if skew > _SKEW_SECONDS:
        ranks = ranks_with((away > _SKEW_SECONDS).tolist())
        yield Finding(
            "clocks",
            f"{skew:.1f} s between {names_of(ranks)} and the others",
            "warning",
            "Run a time service: records and alerts compare times of hosts.",
        )
    else:
        yield Finding("clocks", f"within {1e3 * skew:.0f} ms")


def _decoding(runtime: Runtime, open_batches: Callable[[], Batches]) -> Iterator[Finding]:
    """From the pack to tensors on the device, on all ranks at once."""
    with closing(open_batches()) as batches:
        next(batches)
        all_agree(True, runtime.ranks)
        start, images = time.monotonic(), 0
        while time.monotonic() - start < _SECONDS_OF_DECODING:
            images += len(next(batches).images)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()  # host sync: it is measured
        own = images / (time.monotonic() - start)
    speed = of_all([own], runtime)[:, 0]
    slow = ranks_with((speed < _SLOW * speed.median()).tolist())
    value = f"{speed.sum():,.0f} images/s, {speed.min():,.0f} on the slowest rank"
    if slow:
        yield Finding(
            "images",
            f"{value}; {names_of(slow)} below half of the median",
            "warning",
            "Every step waits for the slowest: look at the disk and the cores of its host.",
        )
    else:
        yield Finding("images", value)


def _pack(runtime: Runtime, dataset: DataSet) -> Iterator[Finding]:
    """From the disk, not from memory: one rank of each host reads a stretch of the largest pack."""
    largest = max(dataset.packs, key=len)
    if url_of(largest.path):
        value = f"{shown(largest.path)}: read by requests, of which the images above are made"
        yield Finding("data.train", value)
        return
    files = files_of(largest)
    speed = of_all([_read_speed(files) if local_rank() == 0 else 0.0], runtime)[:, 0]
    hosts = speed[speed > 0]
    value = f"{hosts.min().item() / 2**20:,.0f} MiB/s read on the slowest of {len(hosts)} hosts"
    slow = ranks_with(((speed > 0) & (speed < _SLOW * hosts.median())).tolist())
    if slow:
        yield Finding(
            "data.train",
            f"{value}; {names_of(slow)} below half of the median",
            "warning",
            "Look at the disk or the mount of its host.",
        )
    else:
        yield Finding("data.train", value)


def _read_speed(files: Iterable[Path]) -> float:
    """Bytes a second of files, after asking the system to forget them."""
    count, start = 0, time.monotonic()
    for path in files:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count < _READ_BYTES and (block := file.read(1 << 20)):
                count += len(block)
        if count >= _READ_BYTES:
            break
    return max(count, 1) / (time.monotonic() - start)


def _disk(
    config: Config, runtime: Runtime, identities: Mapping[str, Numbering]
) -> Iterator[Finding]:
    folder = config.run.folder
    bytes_per_second = 0.0
    problem = ""
    path = folder / f".preflight.{runtime.ranks.rank}"
    if local_rank() == 0:
        try:
            bytes_per_second = _write_speed(path)
        except OSError as error:
            problem = str(error)
    writers = of_all([bytes_per_second, float(bool(problem))], runtime)
    failed = ranks_with((writers[:, 1] > 0).tolist())
    if failed:
        yield Finding(
            "run.folder",
            f"{names_of(failed)} cannot write in {folder}: {words_of_any(problem, runtime.ranks)}",
            "refused",
            "Every host must be able to write there.",
        )
        return
    speed = writers[:, 0][writers[:, 0] > 0].min().item()
    of_heads = {name: one.count for name, one in identities.items()}
    needed = checkpoint_bytes(config, of_heads, runtime.ranks.size)
    free = of_all([float(shutil.disk_usage(folder).free)], runtime).min().item()
    what = "a checkpoint"
    if not config.checkpoint.shared:  # a host has the rows of its own ranks
        what = "a host's part of a checkpoint"
        rows = needed - checkpoint_bytes(config, dict.fromkeys(of_heads, 0), runtime.ranks.size)
        needed -= rows - rows // own_place().hosts
    kept = config.checkpoint.keep + 1
    value = (
        f"{free / 2**30:.1f} GiB free, {speed / 2**20:,.0f} MiB/s written and synced; {what} "
        f"is {needed / 2**30:.3g} GiB, {needed / speed:.1f} s"
    )
    if free < kept * needed * _HEAD_ROOM:
        yield Finding(
            "run.folder",
            f"{value}; checkpoint.keep = {config.checkpoint.keep} needs "
            f"{kept * needed / 2**30:.3g} GiB",
            "refused",
            "Make room, lower checkpoint.keep, or set another run.folder.",
        )
    else:
        yield Finding("run.folder", value)


def _write_speed(path: Path) -> float:
    """Bytes a second of a file that is written and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(1 << 20)
    start = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(_WRITTEN_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return _WRITTEN_BYTES / (time.monotonic() - start)


def _backbone(config: Config) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        return new_backbone(config)


def checkpoint_bytes(config: Config, identities: int | Mapping[str, int], ranks: int) -> int:
    """Return the size of a checkpoint to within a few percent: weights and their momenta.

    Args:
        config: Settings of the run.
        identities: Of the head, or of each of several.
        ranks: World size.
    """
    backbone = _backbone(config)
    freeze(backbone, config.backbone.freeze)
    sizes = {name: p.numel() for name, p in backbone.named_parameters() if p.requires_grad}
    trained = sum(sizes.values())
    rotated = sum(sizes.get(name, 0) for name in muon_matrices(backbone))
    kept = kept_numbers(config, trained, rotated)
    if config.backbone.ema or config.optimizer.name == "schedule_free":
        kept += trained  # the average, in a file of its own
    lora = config.backbone.lora.rank > 0  # what is not trained is not in it
    weights = trained if lora else sum(parameter.numel() for parameter in backbone.parameters())
    buffers = sum(buffer.numel() for buffer in backbone.buffers())
    buffers *= 1 + ranks * (ranks > 1)  # their mean, and each rank's own
    of_backbone = 4 * (weights + kept + buffers)
    of_heads = identities if isinstance(identities, Mapping) else {"": identities}
    each = each_head(config)
    return of_backbone + sum(count * _row_bytes(each[name]) for name, count in of_heads.items())


def _row_bytes(config: Config) -> int:
    """A center and its states."""
    center = torch.empty(1, config.backbone.embedding_dim, device="meta")
    states = row_rule_of(config).new_states(center).values()
    stored = config.head.center_format
    size = config.backbone.embedding_dim * DTYPES[stored].itemsize + 4 * (stored in SCALED)
    return sum(state.nbytes for state in states) + size
