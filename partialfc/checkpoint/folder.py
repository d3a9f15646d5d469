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
        statistics_….json, centers_….json  notes of these parts: size, SHA-256 of pieces, mark
        manifest.json                 the notes of all other files, which parts there are
                                      (parts.py), and all that is no tensor: step, world size,
                                      facts, settings, versions, mark

A folder with this name is complete or corrupt, never half-written: everything is written to a
temporary folder, synced and renamed. What is deleted is renamed first.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.parts import ENDING, centers_of, head_of, misshapen, parts_of
from partialfc.checkpoint.pieces import Note
from partialfc.errors import CheckpointError, DamagedError, OtherFormatError
from partialfc.writing import opened, read_text

FORMAT = 5
"""Every format has the checksum of its manifest, so that a damaged one is not taken for another."""
WHOLE = 4
"""The format before: every file is in the manifest, with one checksum of the whole of it."""
BY_NUMBER = 3
"""The one before that: its optimizer.safetensors has "<parameter number>.<state>"."""
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
_LONGEST_MANIFEST = 256 << 20
"""Format 4 notes the tensors of every rank's statistics: 21 MB for 1,024 ranks."""
LONGEST_NOTE = 16 << 20
_PART = re.compile(
    r"(backbone|average|optimizer|head(_[A-Za-z][A-Za-z0-9_]*)?|statistics_\d{6,}"
    r"|centers_([A-Za-z][A-Za-z0-9_]*_)?\d{10,})\.safetensors"
)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step_"))


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a copy under another name is not one."""
    return sorted(filter(is_named, folder.glob("step_*")), key=step_of)


def is_named(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error
    return manifest_in(text, path)


def manifest_in(text: str, path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint that a text is; raises as :func:`read_manifest`."""
    try:
        manifest = json.loads(text)
        digest = manifest.pop("sha256")
        sound = digest == digest_of(manifest)
    except KeyError as error:
        raise CheckpointError(f"{MANIFEST} lacks {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if not sound:
        raise CheckpointError(f"{MANIFEST} is corrupt: its checksum is not that of its content")
    if manifest.get("format", FORMAT) not in (FORMAT, WHOLE, BY_NUMBER):
        raise OtherFormatError(
            f"{path}: its format is {manifest['format']!r:.20}, and this version reads "
            f"{BY_NUMBER} to {FORMAT}. Go on with the version that wrote it, or start in another "
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
        for file in (head_of(name), centers_of(name, 0)):
            if not _PART.fullmatch(file + ENDING):
                return f"{name[:80]!a} is no name of a head"
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
        try:
            Note.of(about)
        except ValueError as error:
            return f"{name}: {error}"
    return misshapen(manifest)


def note_of(path: Path, manifest: Mapping[str, Any], file: str) -> Note:
    """Return what a file of a checkpoint was when it was written; for a part, a small file is read.

    Raises:
        DamagedError: If the checkpoint has no such file, or its note is not there, corrupt, or of
            another checkpoint.
    """
    if file in manifest["files"]:
        return Note.of(manifest["files"][file])
    name = note_name(file)
    try:
        text = read_text(path / name, most=LONGEST_NOTE)
    except FileNotFoundError as error:
        raise DamagedError(f"it lacks {name}, the note of {file}") from error
    except (OSError, ValueError) as error:
        raise DamagedError(f"{name}: {type(error).__name__}: {error}") from error
    return note_in(text, manifest, file)


def note_name(file: str) -> str:
    """The name of the file that has the note of a part."""
    return file.removesuffix(ENDING) + ".json"


def note_in(text: str, manifest: Mapping[str, Any], file: str) -> Note:
    """Return the note of a part that a text is.

    Raises:
        DamagedError: If it is corrupt, or of another checkpoint.
    """
    name = note_name(file)
    try:
        said = json.loads(text)
        digest = said.pop("sha256")
        if digest != digest_of(said) or text != signed(said):
            raise DamagedError(f"{name} is corrupt: its checksum is not that of its content")
        if (said["file"], said["mark"]) != (file, manifest.get("mark")):
            raise DamagedError(
                f"{name} is of {said['file']!a:.80} of the checkpoint marked {said['mark']!a:.80}, "
                f"and this one is {manifest.get('mark')!a:.80}"
            )
        return Note.of(said["note"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{name}: {type(error).__name__}: {error}") from error


def write_note(path: Path, note: Note, mark: str, disk: Disk) -> None:
    """Write what a part is beside it.

    Args:
        path: Of the part.
        note: Of it.
        mark: Of the checkpoint, which no other has.
        disk: Where to write.
    """
    said = {"file": path.name, "mark": mark, "note": note.as_json()}
    write_text(path.with_suffix(".json"), signed(said), disk)


def write_text(path: Path, text: str, disk: Disk) -> None:
    """Write a small file and sync it."""
    with path.open("xb") as file:
        disk.write(file, text.encode())
    disk.sync(path)


def commit(
    temporary: Path,
    final: Path,
    manifest: Mapping[str, Any],
    notes: Mapping[str, Note],
    disk: Disk,
    *,
    shared: bool = True,
) -> None:
    """Add the manifest to a folder whose files are all written, and give it its name.

    The folder is listed once, and no file is opened, however many ranks have written.

    Args:
        temporary: The folder.
        final: Its name from now on.
        manifest: All but its files.
        notes: Of the files that are no part.
        disk: Where to write.
        shared: Whether what all ranks wrote is here.

    Raises:
        OSError: If a file is not there.
    """
    files = {name: notes[name].as_json() for name in sorted(notes)}
    whole = {**manifest, "format": FORMAT, "files": files}
    there = {entry.name for entry in os.scandir(temporary)}
    parts = [*parts_of(whole)]
    wanted = {*files, *parts, *map(note_name, parts)}
    if shared and (missing := sorted(wanted - there)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} files are not where rank 0 sees them, such as "
            f"{missing[0]}. Is {final.parent} on a file system that all hosts share? If each has a "
            "disk of its own, set checkpoint.shared = false."
        )
    write_manifest(temporary, whole, disk)
    disk.rename(temporary, final)
    disk.sync(final.parent)


def write_manifest(folder: Path, manifest: Mapping[str, Any], disk: Disk) -> None:
    """Write a manifest with its checksum, and sync it and the folder."""
    write_text(folder / MANIFEST, signed(manifest, indent=1), disk)
    disk.sync(folder)


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


def last_step(folder: Path) -> int:
    """The largest step of which a folder has a checkpoint, or one set aside; 0 for none."""
    names = (re.match(r"\.?step_([0-9]{8,18})(\.|$)", path.name) for path in folder.glob("*step_*"))
    return max((int(name[1]) for name in names if name), default=0)


def count_invalid(folder: Path) -> int:
    """How many checkpoints of a folder were ever set aside."""
    return sum(1 for _ in folder.glob(".step_*.invalid"))


def signed(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return JSON with the checksum of the content in it."""
    return json.dumps({**content, "sha256": digest_of(content)}, indent=indent)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of what a manifest or a note says, hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
