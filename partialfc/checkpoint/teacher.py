"""The teacher of a run: a trained network, or embeddings made beforehand, behind one call.

Shape suffixes: b = images of a rank's micro-batch, L = the teacher's embedding.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.alignment.network import open_network
from partialfc.checkpoint.trained_backbone import TrainedBackbone, open_backbone
from partialfc.config import Config, ConfigError
from partialfc.data.dataset import DataSet
from partialfc.data.vectors import Vectors
from partialfc.distributed.agreement import from_leader, words_of_any
from partialfc.errors import in_words
from partialfc.losses import Lesson
from partialfc.model.adapted import digest_of
from partialfc.model.build import AUTOCAST
from partialfc.pinned import to_device
from partialfc.runtime.process import Runtime

SampleIds = NDArray[np.int64]

_DIGITS = 16
"""Of a digest, hexadecimal."""
_LOOKED_AT = 8
"""Nodes of an ONNX file among which insightface looks for the normalisation of pixels."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """What is known of a teacher, and its embeddings.

    Attributes:
        embed: Images [b, 3, S, S] in [-1, 1] and their samples [b] to fp32 or autocast's [b, L], on
            the images' device, without gradient. A function of its arguments alone.
        dim: L.
        digest: 16 hexadecimal digits that another teacher has not.
    """

    embed: Callable[[Tensor, SampleIds], Tensor]
    dim: int
    digest: str

    def lessons(self, sample_ids: SampleIds, factor: float) -> Callable[[Tensor, slice], Lesson]:
        """Return what it says of a batch, a micro-batch at a time; ``factor`` is of the weight."""

        def lesson_of(images: Tensor, rows: slice) -> Lesson:
            return Lesson(self.embed(images, sample_ids[rows]), factor)

        return lesson_of


def open_teacher(config: Config, dataset: DataSet, runtime: Runtime) -> Teacher | None:
    """Return the teacher of a run, the same on all ranks; ``None`` without one. Collective.

    Raises:
        ConfigError: If it cannot be opened, does not fit the run, or another rank has another.
    """
    settings = config.losses.teacher
    if not settings.weight:
        return None
    try:
        match settings.paths[0].suffix:
            case ".npy":
                teacher = _of_vectors(Vectors(settings.paths, dataset))
            case ".onnx":
                teacher = _of_onnx(settings.paths[0], config)
            case _:
                teacher = _of_backbone(trained_teacher(config), config, runtime)
    except (ValueError, OSError) as error:
        raise ConfigError(f"losses.teacher.from: {in_words(error)}") from error
    if settings.form == "cosine" and teacher.dim != config.backbone.embedding_dim:
        raise ConfigError(
            f"backbone.embedding_dim = {config.backbone.embedding_dim}: must be the {teacher.dim} "
            'of the teacher with losses.teacher.form = "cosine". Make it so, or take "relational" '
            'or "margin", which compare distances.'
        )
    _refuse_another(teacher, runtime)
    return teacher


def trained_teacher(config: Config) -> TrainedBackbone:
    """Return the backbone that teaches.

    Raises:
        ConfigError: If there is none, or it takes images of another size.
        ForeignError: If a file does not hold a backbone that is known.
    """
    (path,), size = config.losses.teacher.paths, config.data.image_size
    trained = open_backbone(path, image_size=size)
    if trained.known.image_size != size:
        raise ConfigError(
            f"{path} takes images of {trained.known.image_size} pixels, and data.image_size = "
            f"{size}: it must see the same images."
        )
    return trained


def autocast_of(config: Config) -> torch.dtype | None:
    """Return the compute dtype of a backbone that teaches; ``None`` for fp32."""
    compute = config.losses.teacher.compute
    return AUTOCAST[config.precision.compute if compute == "auto" else compute]


def _of_backbone(trained: TrainedBackbone, config: Config, runtime: Runtime) -> Teacher:
    network, autocast = trained.backbone().to(runtime.device), autocast_of(config)
    if config.backbone.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def embed(images: Tensor, _: SampleIds) -> Tensor:
        if config.backbone.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            embeddings: Tensor = network(images)
        return embeddings

    return Teacher(embed, trained.known.embedding_dim, digest_of(trained.state)[:_DIGITS])


def _of_onnx(path: Path, config: Config) -> Teacher:
    """On the CPU, from wherever the images are: on a GPU every step waits for it."""
    network = open_network(path, threads=torch.get_num_threads())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
    pixels, size = _takes_pixels(path), config.data.image_size

    def embed(images: Tensor, _: SampleIds) -> Tensor:
        values = images.cpu().float()  # host sync on a GPU
        values = values * 127.5 + 127.5 if pixels else values
        (embeddings,) = network.run(values.contiguous().numpy())
        return torch.from_numpy(embeddings).to(images.device)

    # Two images: a model of one fixed image, or of another size, is refused here.
    found = network.run(np.zeros((2, 3, size, size), np.float32))
    if len(found) != 1 or found[0].ndim != 2 or len(found[0]) != 2:
        raise ValueError(
            f"{path}: its outputs of 2 images are {[list(one.shape) for one in found]}, must be "
            "one [2, embedding]."
        )
    return Teacher(embed, found[0].shape[1], digest)


def _takes_pixels(path: Path) -> bool:
    """Whether a model normalises its images itself, by the rule of insightface's ArcFaceONNX."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    if any(one.data_location == onnx.TensorProto.EXTERNAL for one in model.graph.initializer):
        raise ValueError(f"{path}: its weights are in another file; save it as one file.")
    names = [node.name for node in model.graph.node[:_LOOKED_AT]]
    return all(
        any(name.startswith(beginnings) for name in names)
        for beginnings in (("Sub", "_minus"), ("Mul", "_mul"))
    )


def _of_vectors(vectors: Vectors) -> Teacher:
    def embed(images: Tensor, sample_ids: SampleIds) -> Tensor:
        return to_device(torch.from_numpy(vectors.of(sample_ids)), images.device)

    return Teacher(embed, vectors.dim, vectors.digest)


def _refuse_another(teacher: Teacher, runtime: Runtime) -> None:
    ranks, digest = runtime.ranks, int(teacher.digest[:15], 16)
    own = f"rank {ranks.rank} has {teacher.digest}"
    same = digest == from_leader(digest, ranks)
    if other := words_of_any("" if same else own, ranks):
        raise ConfigError(
            "losses.teacher.from: not all ranks have the same teacher: "
            f"{words_of_any(own, ranks)}; {other}. Give all hosts the same files."
        )
