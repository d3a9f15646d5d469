"""Memory of a run's backbone per rank, without allocating it.

It is run forward and backward on fake tensors, and every storage is followed from its birth to its
death.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from partialfc.config import Config
from partialfc.model.build import AUTOCAST, new_backbone
from partialfc.model.frozen import freeze
from partialfc.model.fsdp import blocks_of
from partialfc.model.optimizer import kept_numbers, muon_matrices
from partialfc.model.updates import PART_ELEMENTS

MIB, GIB = 2**20, 2**30

MOMENTS = ("head", "backward", "update", "validation")
"""When memory is highest: the head's forward, the backbone's backward, the update of the rows, a
forward pass of held-out images."""

Device = Literal["cpu", "cuda"]
Bytes = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """Bytes of one thing at each of ``MOMENTS``."""

    name: str
    bytes: Bytes
    origin: str

    @classmethod
    def always(cls, name: str, size: int, origin: str) -> "MemoryItem":
        """Return a part that is there at every moment."""
        return cls(name, (size, size, size, size), origin)


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """Tensors and floating-point operations of a network for one micro-batch, by simulation.

    Attributes:
        weights: Bytes of all parameters.
        trained: Bytes of those with a gradient.
        buffers: Bytes of floating-point buffers (BatchNorm's statistics).
        saved: Bytes alive after forward beyond weights and images: what backward needs, and the
            embeddings. A storage counts once, however many views of it there are.
        backward: Most bytes alive in backward, without the gradients of weights.
        gradients: Bytes of the gradients of weights at that time; 0 if they have their own memory.
        inference: Most bytes alive in a forward pass without gradients.
        flops: Of forward and backward, recomputation included; a multiply-add is two.
        matrices: Bytes of the trained weights that Muon rotates.
        in_blocks: Bytes of the weights that FSDP2 gathers block by block.
        largest_block: Bytes of the largest such block.
    """

    weights: int
    trained: int
    buffers: int
    saved: int
    backward: int
    gradients: int
    inference: int
    flops: int
    matrices: int = 0
    in_blocks: int = 0
    largest_block: int = 0


@dataclass(slots=True)
class _Storage:
    size: int
    is_gradient: bool = False


class TensorMeter(TorchDispatchMode):
    """Adds up the storages that operators make, while they live."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: Any = weakref.WeakKeyDictionary()
        for tensor in known:
            self._storages[tensor.untyped_storage()] = _Storage(0)
        self.live = self.gradients = self.flops = self.made = 0
        self.peak: tuple[int, int] = (0, 0)
        """``live`` and ``gradients`` when their sum was largest."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._storages:
                self._begin(leaf.untyped_storage())
        return result

    def keep_apart(self, weight: Tensor) -> None:
        """Count the gradient of a weight as a gradient from now on."""
        assert weight.grad is not None
        storage = self._storages[weight.grad.untyped_storage()]
        if not storage.is_gradient:
            storage.is_gradient = True
            self.live, self.gradients = self.live - storage.size, self.gradients + storage.size

    def _begin(self, storage: Any) -> None:
        size = int(storage.nbytes())
        self._storages[storage] = known = _Storage(size)
        weakref.finalize(storage, self._end, known)
        self.live += size
        self.made += size
        if self.live + self.gradients > sum(self.peak):
            self.peak = self.live, self.gradients

    def _end(self, storage: _Storage) -> None:
        if storage.is_gradient:
            self.gradients -= storage.size
        else:
            self.live -= storage.size


def count(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    keeps_gradients: bool = False,
    inference_batch: int = 1,
) -> NetworkCost:
    """Run a network on fake tensors and count.

    They are fake tensors of the CPU: a torch without CUDA has no others. CUDA's autocast casts
    more operators, but of ours LayerNorm has fp32 inputs anyway and PReLU 16-bit ones.

    Args:
        network: On the meta device, in training mode. It is used up.
        shape: Of the images [b, 3, S, S]; they are not counted, a copy of them is.
        autocast: Its dtype; ``None`` for none.
        channels_last: Whether the network gets a copy of the images in NHWC memory.
        keeps_gradients: Gradients of weights have memory of their own at all times.
        inference_batch: Images of the pass without gradients.
    """
    blocks = [bytes_of(block.parameters()) for block in blocks_of(network)]
    with FakeTensorMode():
        _make_fake(network)
        weights, buffers = list(network.parameters()), list(network.buffers())
        trained = [weight for weight in weights if weight.requires_grad]

        def forward(batch: int) -> tuple[TensorMeter, Tensor]:
            images = torch.empty(batch, *shape[1:])
            meter = TensorMeter([*weights, *buffers, images])
            with meter:
                if channels_last and images.ndim == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", autocast) if autocast else nullcontext():
                    embeddings: Tensor = network(images)
            return meter, embeddings

        meter, embeddings = forward(shape[0])
        saved = meter.live
        for weight in trained:
            weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _drop_gradient if keeps_gradients else meter.keep_apart
            )
        meter.peak = meter.live, 0
        with meter:
            embeddings.backward(torch.empty_like(embeddings))  # type: ignore[no-untyped-call]
        network.eval()
        with torch.no_grad():
            without_gradients, _ = forward(inference_batch)
        return NetworkCost(
            weights=bytes_of(weights),
            trained=bytes_of(trained),
            buffers=bytes_of(buffer for buffer in buffers if buffer.is_floating_point()),
            saved=saved,
            backward=meter.peak[0],
            gradients=meter.peak[1],
            inference=sum(without_gradients.peak),
            flops=meter.flops,
            matrices=bytes_of(
                weight
                for name in muon_matrices(network)
                if (weight := network.get_parameter(name)).requires_grad
            ),
            in_blocks=sum(blocks),
            largest_block=max(blocks, default=0),
        )


def _make_fake(network: nn.Module) -> None:
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_backbone(config: Config, world_size: int) -> NetworkCost:
    """Count the backbone of a run for one micro-batch of a rank.

    Raises:
        ConfigError: If the backbone does not exist or does not fit the image size.
    """
    settings = config.backbone
    with torch.device("meta"):
        network = new_backbone(config)
    for module in freeze(network, settings.freeze):
        module.eval()
    if settings.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = config.shares(world_size).of_each(config.optimizer.accumulation).largest
    return count(
        network,
        (batch, *config.data.sample_shape),
        autocast=AUTOCAST[config.precision.compute],
        channels_last=settings.channels_last,
        keeps_gradients=_keeps_gradients(config, world_size),
        inference_batch=config.verification.batch,
    )


def _keeps_gradients(config: Config, world_size: int) -> bool:
    return world_size > 1 or config.optimizer.accumulation > 1


def is_divided(config: Config, world_size: int) -> bool:
    """Whether each rank holds a part of the backbone only."""
    return config.backbone.shard == "fsdp2" and world_size > 1


def held(config: Config, size: int, world_size: int, device: Device) -> int:
    """Return how many bytes of weights, or of what belongs to each, a rank's device holds."""
    if not is_divided(config, world_size):
        return size
    return 0 if config.backbone.offload and device == "cuda" else -(-size // world_size)


def backbone_parts(
    config: Config, counted: NetworkCost, world_size: int, device: Device = "cuda"
) -> list[MemoryItem]:
    """Return the memory of the backbone, its optimizer and its activations."""
    settings, saved, buffers = config.optimizer, counted.saved, counted.buffers
    divided = is_divided(config, world_size)
    weights, trained, matrices = (
        held(config, size, world_size, device)
        for size in (counted.weights, counted.trained, counted.matrices)
    )
    average = (trained + buffers) * (config.backbone.ema > 0)
    states = kept_numbers(config, trained, matrices)
    part = min(trained, 4 * PART_ELEMENTS)
    copies = 0
    if settings.name not in ("sgd", "adamw"):  # before and after, and what is computed between
        copies = 2 * (part + kept_numbers(config, part)) + 2 * part
    swapped = trained * (settings.name == "schedule_free")
    batch = config.shares(world_size).of_each(settings.accumulation).largest
    images = f"forward of {batch} images, counted; of {config.verification.batch} in validation"
    recomputed = ", blocks computed again" * config.backbone.checkpoint_activations
    if divided:
        earlier = trained * (settings.accumulation > 1)  # of the micro-batches before
        sizes = earlier, earlier, trained, 0
        gradients = MemoryItem("gradients", sizes, "fp32, of a rank's part")
    elif _keeps_gradients(config, world_size):
        where = "fp32, in DDP's buckets" if world_size > 1 else "fp32, of all micro-batches"
        gradients = MemoryItem.always("gradients", counted.trained, where)
    else:
        sizes = 0, counted.gradients, counted.trained, 0
        gradients = MemoryItem("gradients", sizes, "fp32, those there when memory is highest")
    return [
        MemoryItem.always("weights", weights, "fp32, a rank's part" if divided else "fp32"),
        MemoryItem.always("average", average, "fp32, of what is trained and the statistics"),
        MemoryItem("distance to the average", (0, 0, average, 0), "fp32, while it moves"),
        MemoryItem.always("optimizer", states, f"{settings.name}, fp32"),
        MemoryItem(
            "copies of weights",
            (0, 0, copies, swapped),
            "until it is known whether a step counts; in validation, of those that are trained",
        ),
        gradients,
        *([_gathered(config, counted, gradients)] if divided else []),
        MemoryItem.always("BatchNorm statistics", 2 * buffers, "fp32, and a copy in a step"),
        MemoryItem("activations", (saved, saved, 0, counted.inference), images),
        MemoryItem(
            "in backward",
            (0, max(0, counted.backward - saved), 0, 0),
            f"gradients of activations{recomputed}",
        ),
    ]


def _gathered(config: Config, counted: NetworkCost, gradients: MemoryItem) -> MemoryItem:
    """What FSDP2 has whole: all that is in no block during a step, and of the blocks two.

    As backward begins there are also the gradients of a block, and once more as they are sent. As
    it ends there are no activations, and those of what is in no block are there twice.
    """
    rest, block = counted.weights - counted.in_blocks, counted.largest_block
    blocks = 2 * block if config.backbone.reshard else counted.in_blocks + block
    begins = rest + blocks + 2 * block
    ends = 3 * rest + gradients.bytes[2] - gradients.bytes[1]
    sizes = rest + blocks, max(begins, ends - counted.backward), 0, rest + blocks
    return MemoryItem("gathered", sizes, "fp32, blocks under way and what is in none; gradients")


def exchanged_bytes(config: Config, counted: NetworkCost, world_size: int) -> int:
    """Return what goes around the ranks for the backbone in a step, if each had all of it once."""
    if not is_divided(config, world_size):
        return 2 * counted.trained  # the halves of an all-reduce
    again = counted.in_blocks if config.backbone.reshard else 0
    return (counted.weights + again + counted.trained) * config.optimizer.accumulation
