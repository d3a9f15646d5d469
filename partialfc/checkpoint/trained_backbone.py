"""A trained backbone, wherever it lies: in a run, a checkpoint, a folder or a file of weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from partialfc.checkpoint import foreign, hub_folder, recognition
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.base import merged
from partialfc.checkpoint.folder import MANIFEST, path_of, read_manifest
from partialfc.checkpoint.pretrained import pretrained_state
from partialfc.checkpoint.recognition import Known
from partialfc.config import Config, ConfigError, load
from partialfc.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TrainedBackbone:
    """A backbone to be used, and what is known of it.

    Attributes:
        path: As it was asked for.
        known: Which backbone, for which images.
        state: Its tensors by name, in the backbone's order, on the CPU; of a run with
            ``backbone.ema`` the average, and with ``backbone.lora`` merged.
        config: Settings of the run that it comes from, or ``None``.
        step: Optimizer steps that it was trained for, or ``None``.
    """

    path: Path
    known: Known
    state: dict[str, Tensor]
    config: Config | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """A short name: of the run's folder, or of the file."""
        return self.path.resolve().stem

    def require_images(self) -> None:
        """Refuse a backbone that takes no images.

        Raises:
            ConfigError: If its run was on arrays.
        """
        if self.config is not None and self.config.data.kind == "arrays":
            raise ConfigError(
                f"{self.path}: its run was on arrays, and this is for images. partialfc embed "
                "makes embeddings of arrays, and verification.identification measures on them."
            )

    @property
    def run(self) -> Path | None:
        """The folder of its run, if it comes from one."""
        if self.config is None:
            return None
        return self.path.parents[1] if _is_checkpoint(self.path) else self.path

    @property
    def place(self) -> Path:
        """Where it lies: of a run, the checkpoint that was taken."""
        if self.run is None or self.step is None:
            return self.path.resolve()
        return path_of(self.run / "checkpoints", self.step).resolve()

    def backbone(self) -> nn.Module:
        """Return it as a module in evaluation mode that wants no gradients; fp32, on the CPU."""
        with torch.device("meta"):
            module = recognition.build(self.known)
        if {name for name, _ in module.named_buffers()} - self.state.keys():
            module = recognition.build(self.known)  # with the tables that are computed, not stored
        module.load_state_dict({k: v.clone() for k, v in self.state.items()}, assign=True)
        if any(buffer.is_meta for buffer in module.buffers()):  # its constructor's alone
            module = recognition.build(self.known)
            module.load_state_dict(self.state)
        return module.eval().requires_grad_(False)


def open_backbone(path: Path, *, image_size: int = 112) -> TrainedBackbone:
    """Return the backbone of a run (its newest valid checkpoint), a checkpoint or a file.

    Nothing is changed, and nothing in a file is run: a plug-in that the settings of a run name must
    have been loaded by its name (:mod:`partialfc.definitions.plugins`).

    Args:
        path: A run's folder, a ``step_…`` folder in its ``checkpoints``; a folder in the layout of
            the Hugging Face hub, of CVLface or of arcface_torch; or a model.pt, backbone.pth,
            checkpoint_gpu_*.pt or .safetensors.
        image_size: Of the images that the backbone of a file is for, in pixels; a run knows, and
            so does a folder that ``partialfc export --huggingface`` wrote.

    Raises:
        ConfigError: If there is nothing of the kind, or no valid checkpoint.
        ForeignError: If a file does not hold a backbone that is known.
    """
    file = path
    if path.is_dir():
        is_run = _is_checkpoint(path) or (path / "config.toml").is_file()
        found = None if is_run else foreign.backbone_in(path)
        if found is None:
            return _of_run(path)
        if (told := hub_folder.known_in(path)) is not None:
            return TrainedBackbone(path, told, hub_folder.read_weights(found, told))
        file = found
    state = foreign.read_backbone(file)
    known = recognition.recognise(state, file, image_size=image_size)
    order = recognition.shapes(known)
    return TrainedBackbone(path, known, {name: state[name] for name in order})


def state_at(path: Path, config: Config) -> dict[str, Tensor]:
    """Return the tensors of the backbone at a place that a run may begin with.

    Args:
        path: As of :func:`open_backbone`, or a folder that ``partialfc identities`` wrote; with
            ``backbone.pretrained`` what that names.
        config: Of the run that begins with it.

    Raises:
        ConfigError, ForeignError: As :func:`open_backbone`.
    """
    if config.backbone.pretrained is not None:
        return pretrained_state(path, config)
    if is_start(path):
        return load_file(path / "backbone.safetensors")
    return open_backbone(path, image_size=config.data.image_size).state


def is_start(path: Path) -> bool:
    """Whether a folder was written by :func:`partialfc.checkpoint.warm_start.write_start`."""
    return (path / MANIFEST).is_file() and read_manifest(path)["step"] == 0


def _of_run(path: Path) -> TrainedBackbone:
    folder = path.parents[1] if _is_checkpoint(path) else path
    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{path}: no config.toml in {folder}. Give the folder of a run, a step_... folder in "
            "its checkpoints, a folder with a model.safetensors, or a file of weights."
        )
    whole = load(folder / "config.toml", own=False)
    found = [path] if _is_checkpoint(path) else _newest_first(folder / "checkpoints")
    problems = []
    for candidate in found:
        problem = checkpoint.verify(candidate)
        if problem is None:
            config = whole.at(read_manifest(candidate)["facts"])
            known = Known(
                config.backbone.name,
                config.backbone.embedding_dim,
                config.data.image_size,
                config.backbone.options.model_dump(),
            )
            order = recognition.shapes(known)
            own = load_file(candidate / "backbone.safetensors")
            if "average.safetensors" in read_manifest(candidate)["files"]:
                own |= load_file(candidate / "average.safetensors")
            state = merged(candidate, own, config, state_at)
            if missing := sorted(order.keys() - state.keys()):
                raise CheckpointError(f"{candidate}: it lacks the tensor {', '.join(missing)}")
            step = int(candidate.name.removeprefix("step_"))
            return TrainedBackbone(path, known, {name: state[name] for name in order}, config, step)
        problems.append(f"{candidate}: {problem}")
    raise ConfigError("\n".join(problems) or f"{folder}: it has no checkpoint.")


def _is_checkpoint(path: Path) -> bool:
    return path.name.removeprefix("step_").isdecimal() and path.parent.name == "checkpoints"


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if _is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)
