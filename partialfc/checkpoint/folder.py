"""Folders of checkpoints: names, manifests, what makes one valid, commit and retention.

    checkpoints/step_00002000/
        backbone.safetensors          parameters and buffers, named as in the backbone; with
                                      backbone.lora those that are trained (base.py)
        statistics_000000.safetensors BatchNorm statistics of one rank of several; the backbone's
                                      are their mean
        average.safetensors           moving average of what is trained of it, if there is one; that
                                      of a rank's statistics is in its file, as "average.<name>"
        optimizer.safetensors         its optimizer's states, "<parameter>.<state>"
        centers_0000000000.safetensors  "centers" and row states of one rank, named by first row
        head.safetensors              state of the head that all ranks share, if any
        centers_NAME_….safetensors, head_NAME.safetensors  the same of each of several heads
        manifest.json                 sizes, SHA-256 and tensors of the files, and all that is no
                                      tensor: step, world size, facts, settings, versions

A folder with this name is complete or corrupt, never half-written: everything is written to a
temporary folder, synced and renamed. What is deleted is renamed first.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from partialfc.checkpoint.disk import Disk
from partialfc.errors import CheckpointError, OtherFormatError
from partialfc.writing import opened

FORMAT = 4
"""Every format has the checksum of its manifest, so that a damaged one is not taken for another."""
BY_NUMBER = 3
"""The format before: its optimizer.safetensors has "<parameter number>.<state>"."""
MANIFEST = "manifest.json"
KEYS = {
    "format",
    "step",
    "world_size",
    "num_identities",
    "canonical_shards",
    "facts",
    "scaler",
    "settings",
    "versions",
    "files",
}
_THREADS = 4
_LONGEST_MANIFEST = 256 << 20
_PART = re.compile(
    r"(backbone|average|optimizer|head(_[A-Za-z][A-Za-z0-9_]*)?|statistics_\d{6,}"
    r"|centers_([A-Za-z][A-Za-z0-9_]*_)?\d{10,})\.safetensors"
)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def statistics_of(rank: int) -> str:
    """The name, without its ending, of the file of a rank's own BatchNorm statistics."""
    return f"statistics_{rank:06d}"


def head_of(name: str) -> str:
    """The name, without its ending, of the file of what all ranks share of a head."""
    return f"head_{name}" if name else "head"


def centers_of(name: str, first: int | None = None) -> str:
    """The name, without its ending, of the file of a head's rows from one on; or its beginning."""
    begin = f"centers_{name}_" if name else "centers_"
    return begin if first is None else f"{begin}{first:010d}"


AVERAGE = "average."
"""Before the name of a statistic's average in such a file."""


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step_"))


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a copy under another name is not one."""
    return sorted(filter(_is_named, folder.glob("step_*")), key=step_of)


def _is_named(path: Path) -> bool:
    return re.fullmatch(r"step_[0-9]{8,18}", path.name) is not None


def leftovers(folder: Path) -> list[Path]:
    """What a kill left half-written or half-deleted."""
    return [*folder.glob(".step_*.partial"), *folder.glob(".step_*.deleted")]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: If it is missing, corrupt or incomplete; the message names what.
        OtherFormatError: If it is sound, and of another format.
    """
    try:
        with os.fdopen(opened(path / MANIFEST, os.O_RDONLY), encoding="utf-8") as file:
            text = file.read(_LONGEST_MANIFEST)
        manifest = json.loads(text)
        digest = manifest.pop("sha256")
        sound = digest == _digest_of(manifest)
    except KeyError as error:
        raise CheckpointError(f"{MANIFEST} lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if not sound:
        raise CheckpointError(f"{MANIFEST} is corrupt: its checksum is not that of its content")
    if manifest.get("format", FORMAT) not in (FORMAT, BY_NUMBER):
        raise OtherFormatError(
            f"{path}: its format is {manifest['format']!r:.20}, and this version reads "
            f"{BY_NUMBER} and {FORMAT}. Go on with the version that wrote it, or start in another "
            "run.folder."
        )
    if missing := KEYS - manifest.keys():
        raise CheckpointError(f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    if problem := _misshapen(manifest):
        raise CheckpointError(f"{MANIFEST}: {problem}")
    return dict(manifest)


def _misshapen(manifest: Mapping[str, Any]) -> str | None:
    """What is not as a commit writes it: a checksum can be computed of anything."""
    for key in ("step", "world_size", "num_identities", "canonical_shards"):
        if type(manifest[key]) is not int or not 0 <= manifest[key] < 2**63:
            return f"{key} is {manifest[key]!r:.50}, must be a count"
    heads = manifest.get("heads", {})
    if not isinstance(heads, dict):
        return f"heads is {heads!r:.50}, must be an object"
    for name, about in heads.items():
        sizes = about if isinstance(about, dict) else {}
        for key in ("num_identities", "canonical_shards"):
            if type(sizes.get(key)) is not int or not 0 <= sizes[key] < 2**63:
                return f"{key} of head {name[:80]!a} must be a count"
    for key in ("facts", "scaler", "files"):
        if not isinstance(manifest[key], dict):
            return f"{key} is {manifest[key]!r:.50}, must be an object"
    for name, about in manifest["files"].items():
        if not _PART.fullmatch(name):
            return f"{name[:80]!a} is no name of a part"
        if not isinstance(about, dict):
            return f"{name} is {about!r:.50}, must be an object"
        tensors = about.get("tensors")
        if not isinstance(tensors, list) or not all(isinstance(one, str) for one in tensors):
            return f"{name}: tensors is {tensors!r:.50}, must be names"
    return None


def verify(path: Path, *, part: int = 0, of: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, or ``None`` if every file is as it was written.

    It takes no longer than reading so many bytes as the manifest says.

    Args:
        path: Of the checkpoint.
        part: Which share of the files to read, in [0, of): ranks divide them.
        of: Shares.

    Raises:
        OtherFormatError: If it is of another format; what it is like is not known then.
    """
    try:
        manifest = read_manifest(path)
        if _is_named(path) and manifest["step"] != step_of(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        files = sorted(manifest["files"].items())[part::of]
        with ThreadPoolExecutor(_THREADS) as pool:
            problems = pool.map(lambda item: _problem(path / item[0], item[1]), files)
            return next((problem for problem in problems if problem), None)
    except OtherFormatError:
        raise
    except CheckpointError as error:
        return str(error)


def _problem(file: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        with os.fdopen(opened(file, os.O_RDONLY), "rb") as part:
            size = os.fstat(part.fileno()).st_size
            if size != expected["bytes"]:
                return f"{file.name} has {size} bytes, its manifest says {expected['bytes']}"
            digest = hashlib.file_digest(part, "sha256").hexdigest()
    except (OSError, KeyError, TypeError) as error:
        return f"{file.name}: {type(error).__name__}: {error}"
    if digest != expected["sha256"]:
        return f"{file.name} is corrupt: its checksum is not that of the manifest"
    return None


def write_text(path: Path, text: str, disk: Disk) -> None:
    """Write a small file and sync it."""
    with path.open("xb") as file:
        disk.write(file, text.encode())
    disk.sync(path)


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any], disk: Disk) -> None:
    """Add the manifest to a folder whose files are all written, and give it its name.

    Each ``*.safetensors`` has a note beside it, ``*.json``, which goes into the manifest.
    """
    files = {}
    for path in sorted(temporary.glob("*.safetensors")):
        note = path.with_suffix(".json")
        files[path.name] = json.loads(note.read_text(encoding="utf-8"))
        disk.remove(note)
    whole = {**manifest, "format": FORMAT, "files": files}
    text = json.dumps({**whole, "sha256": _digest_of(whole)}, indent=1)
    write_text(temporary / MANIFEST, text, disk)
    disk.sync(temporary)
    disk.rename(temporary, final)
    disk.sync(final.parent)


def retain(folder: Path, *, keep: int, keep_every_steps: int, disk: Disk) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of every so many steps."""
    for path in steps(folder)[:-keep]:
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        doomed = path.with_name(f".{path.name}.deleted")
        if os.path.lexists(doomed):
            disk.remove(doomed)
        disk.rename(path, doomed)  # so that a half-deleted folder is never taken for a checkpoint
        disk.remove(doomed)


def free_bytes(folder: Path) -> int:
    """What a user may still write where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def set_aside(paths: Sequence[Path]) -> None:
    """Take the names of checkpoints from folders that are none, and keep what is in them."""
    for path in paths:
        number, aside = 1, path.with_name(f".{path.name}.invalid")
        while os.path.lexists(aside):
            number, aside = number + 1, path.with_name(f".{path.name}.{number}.invalid")
        path.rename(aside)


def count_invalid(folder: Path) -> int:
    """How many checkpoints of a folder were ever set aside."""
    return sum(1 for _ in folder.glob(".step_*.invalid"))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
