"""Checkpoints: safetensors files and a JSON manifest, valid as a whole or not at all.

    checkpoints/step_00002000/
        backbone.safetensors          parameters and buffers, named as in the backbone
        optimizer.safetensors         its optimizer's states, "<parameter number>.<state>"
        centers_0000000000.safetensors  "centers" and row states of one rank, named by first row
        manifest.json                 step, sizes and SHA-256 of the files, all that is not a tensor

Centers are stored by global row, so any number of ranks reads them. Everything is written to a
temporary folder, synced, and renamed when all ranks agree that their part is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from partialfc.build import Model
from partialfc.head import PartialFC
from partialfc.metrics import write_json
from partialfc.runtime import Runtime, all_agree, from_leader

FORMAT = 1
_MANIFEST = "manifest.json"


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
    """Write the checkpoint of ``step`` and delete all but the newest ``keep``. Collective.

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
    if from_leader(int(final.exists()), runtime.ranks):
        return final
    temporary = folder / f".{final.name}.partial"
    if runtime.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        _attempt(lambda: temporary.mkdir(parents=True), "checkpoint", runtime, final)
    else:
        _attempt(lambda: None, "checkpoint", runtime, final)
    _attempt(lambda: _write_tensors(temporary, model, runtime), "checkpoint", runtime, final)
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": runtime.ranks.size,
        "num_identities": model.head.sharding.num_identities,
        "canonical_shards": model.head.sharding.canonical_shards,
        "facts": dict(facts),
        "optimizer": _settings(model.optimizer),
        "center_optimizer": _settings(model.head.optimizer),
        "scaler": model.scaler.state_dict(),
        "torch": torch.__version__,
    }

    def commit() -> None:
        if runtime.leads:
            _commit(temporary, final, manifest)
            _delete_old(folder, keep)

    _attempt(commit, "checkpoint", runtime, final)
    return final


def newest(folder: Path, runtime: Runtime) -> Path | None:
    """Return the newest checkpoint whose files are as its manifest says. Collective.

    Invalid ones are passed over with a message on rank 0.
    """
    step = -1
    if runtime.leads:
        for path in sorted(folder.glob("step_*"), reverse=True):
            problem = verify(path)
            if problem is None:
                step = int(path.name.removeprefix("step_"))
                break
            print(f"checkpoint {path} is passed over: {problem}", flush=True)
    step = from_leader(step, runtime.ranks)
    return None if step < 0 else folder / f"step_{step:08d}"


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or ``None`` if every file is as it was written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, (size, digest) in files.items():
            file = path / Path(name).name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, its manifest says {size}"
            if _digest(file) != digest:
                return f"{name} is corrupt: its checksum is not that of the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path, model: Model, facts: Mapping[str, Any], runtime: Runtime) -> int:
    """Read a verified checkpoint into the live objects; return its step.

    The number of ranks may differ from the one that wrote it.

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
    for name, value in expected.items():
        if name not in saved:
            raise CheckpointError(f"{path}: {name} is missing from its manifest.")
        if saved[name] != value:
            raise CheckpointError(
                f"{path}: it was written with {name} = {saved[name]}, this run has {value}. "
                "Go on with the same settings, or start a new run in another run.folder."
            )
    device = str(runtime.device)
    with _open(path / "backbone.safetensors", device) as file:
        model.backbone.load_state_dict(
            {name: file.get_tensor(name) for name in sorted(file.keys())}
        )
    with _open(path / "optimizer.safetensors", device) as file:
        states: dict[int, dict[str, Tensor]] = {}
        for name in sorted(file.keys()):
            number, _, state = name.partition(".")
            states.setdefault(int(number), {})[state] = file.get_tensor(name)
    _restore(model.optimizer, manifest["optimizer"], states)
    center_states = _read_centers(path, manifest, head)
    _restore(
        head.optimizer, manifest["center_optimizer"], {0: center_states} if center_states else {}
    )
    model.scaler.load_state_dict(manifest["scaler"])
    return int(manifest["step"])


def _attempt(action: Callable[[], None], what: str, runtime: Runtime, path: Path) -> None:
    """Do this rank's part; raise on all ranks if any rank's part failed."""
    problem: Exception | None = None
    try:
        action()
    except (OSError, SafetensorError, ValueError) as error:
        problem = error
    if not all_agree(problem is None, runtime.ranks):
        reason = problem or "another rank failed, see its message"
        raise CheckpointError(f"{what} {path} was not written: {reason}") from problem


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
    if len(head.owned):
        _write(
            folder / f"centers_{head.owned.start:010d}.safetensors",
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
    write_json(temporary / _MANIFEST, {**manifest, "files": files})
    with (temporary / _MANIFEST).open("rb") as file:
        os.fsync(file.fileno())
    _sync_folder(temporary)
    temporary.rename(final)
    _sync_folder(final.parent)


def _delete_old(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("step_*"))[:-keep]:
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)  # so that a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


def _read_centers(path: Path, manifest: dict[str, Any], head: PartialFC) -> dict[str, Tensor]:
    """Fill this rank's centers from the files that hold its rows; return its row states."""
    states: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if not name.startswith("centers_"):
            continue
        first = int(name.removeprefix("centers_").removesuffix(".safetensors"))
        with _open(path / name, "cpu") as file:
            rows = file.get_slice("centers").get_shape()[0]
            low, high = max(first, head.owned.start), min(first + rows, head.owned.stop)
            if low >= high:
                continue
            into = slice(low - head.owned.start, high - head.owned.start)
            for tensor in sorted(file.keys()):
                part = file.get_slice(tensor)[low - first : high - first]
                if tensor == "centers":
                    head.centers.data[into] = part.to(head.centers.device)
                    continue
                if tensor not in states:
                    shape = (len(head.owned), *part.shape[1:])
                    states[tensor] = torch.zeros(
                        shape, dtype=part.dtype, device=head.centers.device
                    )
                states[tensor][into] = part.to(head.centers.device)
    return states


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """``param_groups`` without what a JSON file cannot hold."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def _restore(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    states: Mapping[int, Mapping[str, Tensor]],
) -> None:
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
