"""Checkpoints: safetensors files and a JSON manifest, valid as a whole or not at all.

    checkpoints/step_00002000/
        backbone.safetensors          parameters and buffers, named as in the backbone
        optimizer.safetensors         its optimizer's states, "<parameter number>.<state>"
        centers_0000000000.safetensors  "centers" and row states of one rank, named by first row
        head.safetensors              state of the head that all ranks share, if any
        manifest.json                 step, sizes and SHA-256 of the files, all that is not a tensor

Centers are stored by global row, so any number of ranks reads them. Everything is written to a
temporary folder, synced, and renamed when all ranks agree that their part is complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from partialfc.build import Model
from partialfc.head import PartialFC
from partialfc.metrics import write_json
from partialfc.runtime import Runtime, all_agree, from_leader

FORMAT = 1
_MANIFEST = "manifest.json"
_NONE, _ALL_INVALID = -1, -2

CONFIG_HASH = "config_hash"
"""The one fact that may differ when a run goes on; rank 0 then says so."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what this run can go on from."""

    exit_code = 4


def save(
    folder: Path,
    step: int,
    model: Model,
    facts: Mapping[str, Any],
    runtime: Runtime,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step``, then delete all but the newest ``keep``. Collective.

    Args:
        folder: The run's ``checkpoints`` folder, on a file system that all ranks share.
        step: Optimizer steps taken.
        model: What to save.
        facts: JSON values that :func:`load` compares: seed, data, settings.
        runtime: This rank.
        keep: Checkpoints to keep, >= 1.

    Raises:
        CheckpointError: On every rank, if any rank's part failed; no earlier checkpoint is touched.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.partial"

    def begin() -> None:
        if final.exists():
            raise FileExistsError("it exists already, and no checkpoint is ever overwritten")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": runtime.ranks.size,
        "num_identities": model.head.sharding.num_identities,
        "canonical_shards": model.head.sharding.canonical_shards,
        "facts": dict(facts),
        "scaler": model.scaler.state_dict(),  # host sync
        "torch": torch.__version__,
    }
    try:
        _together(begin if runtime.leads else _nothing, runtime, final)
        _together(lambda: _write_tensors(temporary, model, runtime), runtime, final)
        _together(
            (lambda: _commit(temporary, final, manifest)) if runtime.leads else _nothing,
            runtime,
            final,
        )
    except CheckpointError:
        if runtime.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if runtime.leads:
        for path in _steps(folder)[:-keep]:
            doomed = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)  # so that a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)
    return final


def newest(folder: Path, runtime: Runtime, *, tidy: bool = True) -> Path | None:
    """Return the newest checkpoint whose files are as its manifest says. Collective.

    Newer ones that are not are set aside as ``.step_….invalid``, with a message on rank 0. What a
    kill left half-written or half-deleted is removed. Without ``tidy`` nothing is touched: another
    process may be writing.

    Raises:
        CheckpointError: If there are checkpoints and none is valid; nothing is touched then.
    """
    found = _NONE
    if runtime.leads:
        leftovers = (*folder.glob(".step_*.partial"), *folder.glob(".step_*.deleted"))
        for leftover in leftovers if tidy else ():
            shutil.rmtree(leftover, ignore_errors=True)
        problems: dict[Path, str] = {}
        for path in reversed(_steps(folder)):
            problem = verify(path)
            if problem is None:
                found = _step_of(path)
                break
            problems[path] = problem
            print(f"{path}: not a valid checkpoint: {problem}", flush=True)
        if problems and found == _NONE:
            found = _ALL_INVALID
        for path in problems if found >= 0 and tidy else ():
            path.rename(path.with_name(f".{path.name}.invalid"))
    found = from_leader(found, runtime.ranks)
    if found == _ALL_INVALID:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is valid, see the messages of rank 0. Copy a good one "
            "back, or start again in another run.folder."
        )
    return None if found == _NONE else folder / f"step_{found:08d}"


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or ``None`` if every file is as it was written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digest = manifest.pop("sha256")
        if digest != _digest_of(manifest):
            return f"{_MANIFEST} is corrupt: its checksum is not that of its content"
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != _step_of(path):
            return f"{_MANIFEST} is of step {manifest['step']}"
        for name, (size, digest) in manifest["files"].items():
            file = path / Path(name).name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {size}"
            if _digest(file) != digest:
                return f"{name} is corrupt: its checksum is not that of the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path, model: Model, facts: Mapping[str, Any], runtime: Runtime) -> int:
    """Read a verified checkpoint into the live objects; return its step.

    The number of ranks may differ from the one that wrote it. Settings of the optimizers (rate,
    momentum, weight decay) stay those of the run.

    Raises:
        CheckpointError: If the checkpoint is of another run: the message names what differs.
    """
    manifest = json.loads((path / _MANIFEST).read_text())
    head = model.head
    expected = {
        "num_identities": head.sharding.num_identities,
        "canonical_shards": head.sharding.canonical_shards,
        **facts,
    }
    saved = {**manifest, **manifest["facts"]}
    if runtime.leads and saved.get(CONFIG_HASH) != expected.get(CONFIG_HASH):
        print(f"{path}: going on with settings that are not those it was written with.", flush=True)
    differ = [
        f"{name} = {json.dumps(saved.get(name))}, this run has {json.dumps(value)}"
        for name, value in expected.items()
        if saved.get(name) != value and name != CONFIG_HASH
    ]
    if differ:
        raise CheckpointError(
            f"{path}: it was written with {'; with '.join(differ)}. Go on with the same settings, "
            "or start a new run in another run.folder."
        )
    device = str(runtime.device)
    with _open(path / "backbone.safetensors", device) as file:
        model.backbone.load_state_dict(
            {name: file.get_tensor(name) for name in sorted(file.keys())}
        )
    states: dict[int, dict[str, Tensor]] = {}
    with _open(path / "optimizer.safetensors", device) as file:
        for name in sorted(file.keys()):
            number, _, state = name.partition(".")
            states.setdefault(int(number), {})[state] = file.get_tensor(name)
    _restore(model.optimizer, states)
    center_states = _read_centers(path, manifest, head)
    _restore(head.optimizer, {0: center_states} if center_states else {})
    head.optimizer.param_groups[0]["steps"] = manifest["step"]
    if shared := head.shared_state():
        with _open(path / "head.safetensors", device) as file:
            head.load_shared_state({name: file.get_tensor(name) for name in shared})
    if manifest["scaler"]:
        model.scaler.load_state_dict(manifest["scaler"])
    return int(manifest["step"])


def exist(folder: Path) -> bool:
    """Whether a folder holds any checkpoint, valid or not."""
    return bool(_steps(folder))


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a copy under another name is not one."""
    named = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _nothing() -> None:
    """The part of a rank that has none."""


def _together(action: Callable[[], None], runtime: Runtime, path: Path) -> None:
    """Do this rank's part; raise on all ranks if any rank's part failed."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks wait for the verdict
        problem = error
    if not all_agree(problem is None, runtime.ranks):
        reason = problem or "another rank failed, see its message"
        raise CheckpointError(f"{path} was not written: {reason}") from problem


def _write_tensors(folder: Path, model: Model, runtime: Runtime) -> None:
    head = model.head
    if runtime.leads:
        _write(folder / "backbone.safetensors", model.backbone.state_dict())
        states = model.optimizer.state_dict()["state"]
        _write(
            folder / "optimizer.safetensors",
            {
                f"{number}.{name}": value
                for number, state in states.items()
                for name, value in state.items()
            },
        )
        if shared := head.shared_state():
            _write(folder / "head.safetensors", shared)
    if len(head.owned):
        _write(
            folder / f"centers_{head.owned_rows.start:010d}.safetensors",
            {"centers": head.centers.detach(), **head.optimizer.state[head.centers]},
        )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync one file, and its size and checksum beside it for the manifest."""
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    write_json(path.with_suffix(".json"), [path.stat().st_size, _digest(path)])


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for path in sorted(temporary.glob("*.safetensors")):
        note = path.with_suffix(".json")
        files[path.name] = json.loads(note.read_text())
        note.unlink()
    manifest = {**manifest, "files": files}
    write_json(temporary / _MANIFEST, {**manifest, "sha256": _digest_of(manifest)})
    with (temporary / _MANIFEST).open("rb") as file:
        os.fsync(file.fileno())
    _sync_folder(temporary)
    temporary.rename(final)
    _sync_folder(final.parent)


def _read_centers(path: Path, manifest: dict[str, Any], head: PartialFC) -> dict[str, Tensor]:
    """Fill this rank's centers from the files that hold its rows; return its row states."""
    states: dict[str, Tensor] = {}
    read, owned = 0, head.owned_rows
    for name in manifest["files"]:
        if not name.startswith("centers_"):
            continue
        first = int(name.removeprefix("centers_").removesuffix(".safetensors"))
        with _open(path / name, "cpu") as file:
            rows = file.get_slice("centers").get_shape()[0]
            low, high = max(first, owned.start), min(first + rows, owned.stop)
            if low >= high:
                continue
            read += high - low
            into = slice(low - owned.start, high - owned.start)
            for tensor in sorted(file.keys()):
                part = file.get_slice(tensor)[low - first : high - first]
                if tensor == "centers":
                    head.centers.data[into] = part.to(head.centers.device)
                    continue
                if tensor not in states:
                    shape = (len(owned), *part.shape[1:])
                    states[tensor] = torch.zeros(
                        shape, dtype=part.dtype, device=head.centers.device
                    )
                states[tensor][into] = part.to(head.centers.device)
    if read != len(owned):
        raise CheckpointError(f"{path}: it has {read} of the {len(owned)} rows of this rank.")
    return states


def _restore(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, Tensor]]) -> None:
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    # torch's fused kernels go through memory in order: a state must lie as its parameter does, and
    # a file keeps no strides (channels_last).
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _open(path: Path, device: str) -> Any:
    return safe_open(path, framework="pt", device=device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
