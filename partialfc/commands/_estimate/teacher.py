"""Memory and work of a teacher: a network that is run forward, or embeddings that are mapped."""

from dataclasses import dataclass

import torch

from partialfc.checkpoint import recognition
from partialfc.checkpoint.teacher import autocast_of, trained_teacher
from partialfc.commands._estimate.backbone import Device, MemoryItem, NetworkCost, count
from partialfc.config import Config, ConfigError
from partialfc.data.vectors import mapped
from partialfc.errors import in_words

_BACKWARD = 2
"""Of a network's products, for one of its forward."""


@dataclass(frozen=True, slots=True)
class TeacherCost:
    """A teacher on one rank.

    Attributes:
        dim: Length of its embeddings.
        items: Its memory.
        flops: Of its forward of one micro-batch; 0 where nothing is computed or it is not known.
        compute: Precision of that.
    """

    dim: int
    items: list[MemoryItem]
    flops: int = 0
    compute: str = "fp32"


def count_teacher(
    config: Config, counted: NetworkCost, world_size: int, device: Device
) -> TeacherCost | None:
    """Return what the teacher of a run takes; ``None`` without one.

    Raises:
        ConfigError: If it is not there, or none.
    """
    settings = config.losses.teacher
    if not settings.weight:
        return None
    first = settings.paths[0]
    try:
        if first.suffix == ".npy":
            rows = [mapped(path) for path in settings.paths]
            size = sum(one.nbytes for one in rows) * (device == "cpu")
            what = "mapped, when all of it was looked at; a page cache on a machine with GPUs"
            return TeacherCost(rows[0].shape[1], [MemoryItem.always("embeddings", size, what)])
        if first.suffix == ".onnx":
            size = first.stat().st_size * (device == "cpu")
            what = "its file; on the CPU. Its activations and time are not known"
            dim = config.backbone.embedding_dim
            return TeacherCost(dim, [MemoryItem.always("weights", size, what)])
        return _network(config, counted, world_size)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"losses.teacher.from: {in_words(error).rstrip('.')}. The estimate needs the teacher "
            "on this machine."
        ) from error


def _network(config: Config, counted: NetworkCost, world_size: int) -> TeacherCost:
    known = trained_teacher(config).known
    with torch.device("meta"):
        network = recognition.build(known)
    if config.backbone.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = config.shares(world_size).of_each(config.optimizer.accumulation).largest
    autocast = autocast_of(config)
    found = count(
        network,
        (2, 3, known.image_size, known.image_size),
        autocast=autocast,
        channels_last=config.backbone.channels_last,
        inference_batch=batch,
    )
    # Before the backbone's forward: it matters where it is more than a validation's.
    more = max(0, found.inference - counted.inference)
    items = [
        MemoryItem.always("weights", found.weights + found.buffers, f"{known.name}, fp32"),
        MemoryItem("activations", (0, 0, 0, more), f"forward of {batch} images, if the highest"),
    ]
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}
    flops = found.flops // (1 + _BACKWARD) // 2 * batch
    return TeacherCost(known.embedding_dim, items, flops, names[autocast])
