"""Memory and work of the losses beside the softmax: each is run once on fake tensors and counted.

Shape suffixes: b = images of a rank's micro-batch, B = of all ranks, D = embedding, L = a teacher's
embedding, T = rows of a tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from partialfc.commands._estimate.backbone import Device, MemoryItem, TensorMeter
from partialfc.commands._estimate.head import OfHead, dim_of
from partialfc.config import Config
from partialfc.config.conflicts import head_compute
from partialfc.distributed.ranks import Ranks
from partialfc.head.center_losses import CenterTerm, center_loss, inter_class_loss
from partialfc.head.row_set import RowSet
from partialfc.head.tiles.parts import Logits
from partialfc.head.tiles.workspace import Workspace
from partialfc.losses.over_ranks import sums_of
from partialfc.model.build import embedding_losses, margin_of
from partialfc.numerics import operand_dtype, unit


@dataclass(frozen=True, slots=True)
class LossCost:
    """One loss, or several that share their pairs, of one micro-batch.

    Attributes:
        peak: Most bytes while it is computed.
        kept: Bytes from then to the update of the rows, or to the backbone's backward.
        update: Bytes of a copy during that update.
        flops: Of its matrix products, forward and backward.
        made: Bytes of all results on the way.
        moved: Bytes that its collectives give to every rank.
        compute: Precision of its matrix products.
    """

    name: str
    peak: int
    kept: int
    update: int
    flops: int
    made: int
    moved: int
    compute: str = "fp32"


def count_losses(
    config: Config,
    heads: Sequence[OfHead],
    world_size: int,
    device: Device,
    teacher_dim: int | None = None,
) -> list[LossCost]:
    """Return what the losses that have a weight take on a rank; a teacher's embeddings have a
    length."""
    batch = config.data.global_batch // config.optimizer.accumulation
    dim = config.backbone.embedding_dim
    whole = 4 * batch * dim
    found = []
    losses = embedding_losses(config).losses
    if losses:

        def pairs(own_bD: Tensor) -> Tensor:
            unit_bD, _ = unit(own_bD)
            unit_BD = torch.empty(batch, dim, requires_grad=True)
            identities_B = torch.empty(batch, dtype=torch.int64)
            teacher_BL = torch.empty(batch, teacher_dim) if teacher_dim else None
            anchors = slice(0, len(own_bD))
            sum_T, _ = sums_of(losses, unit_BD, identities_B, anchors, teacher_BL)
            (pull_BD,) = torch.autograd.grad(sum_T, unit_BD, torch.ones_like(sum_T))
            return pull_BD[: len(own_bD)] - unit_bD

        own = (batch // world_size, dim)
        peak, flops, made = _count(pairs, [(own, torch.float32)])
        taught = 4 * batch * (teacher_dim or 0)
        gathered = (whole + taught + 8 * batch) * (world_size > 1)
        kept, moved = whole // world_size, 2 * whole + taught
        names = ", ".join(losses)
        found.append(LossCost(names, peak + gathered, kept, 0, flops, made, moved))
    for head in heads:
        found += _of_centers(head, device)
    return found


def _of_centers(head: OfHead, device: Device) -> list[LossCost]:
    """Of the losses on a head's centers."""
    config, shard, name = head.config, head.shard, head.name and f"{head.name} "
    batch = config.data.global_batch // config.optimizer.accumulation
    dim, compute = config.backbone.embedding_dim, head_compute(config, device)
    whole, row = 4 * batch * dim, dim_of(config, margin_of(config))
    found = []
    vectors = [((batch, row), operand_dtype(compute)), ((batch, row), torch.float32)]
    if config.losses.center.weight:

        def center(query_BD: Tensor, own_BD: Tensor) -> CenterTerm:
            return center_loss(query_BD, own_BD, _targets(batch), dim, Ranks())

        found.append(LossCost(f"{name}center", *_with_pulls(_count(center, vectors), 1, whole), 4))
    if config.losses.inter_class.weight:
        logits = Logits(
            scale=1.0, unit=True, largest=1.0, compute=compute, per_identity=shard.per_identity
        )

        def inter_class(_: Tensor, own_BD: Tensor, centers_TD: Tensor) -> CenterTerm:
            targets = _targets(batch)
            everything = RowSet.of(None), targets, logits, Workspace(), Ranks()
            return inter_class_loss(own_BD, targets, centers_TD, *everything)

        tile = (max(1, shard.tile), row), operand_dtype(compute)
        peak, flops, made = _count(inter_class, [*vectors, tile])
        tiles = max(1, shard.sampled // max(1, shard.tile))
        of_tiles = peak, flops * tiles, made * tiles
        costs = _with_pulls(of_tiles, 2, whole)
        found.append(LossCost(f"{name}inter_class", *costs, 2 * whole, compute))
    return found


def loss_parts(config: Config, losses: Sequence[LossCost]) -> list[MemoryItem]:
    """Return their memory, on top of what a pass of the head has at its peak."""
    parts = config.optimizer.accumulation
    found = []
    for one in losses:
        kept = parts * one.kept
        peak = kept - one.kept + max(one.peak, one.kept)
        sizes = peak, kept, (kept + parts * one.update) * bool(one.update), 0
        found.append(MemoryItem(one.name, sizes, "run on fake tensors; then its gradients"))
    return found


def _with_pulls(
    counted: tuple[int, int, int], pulls: int, whole: int
) -> tuple[int, int, int, int, int]:
    """Peak, kept, update, flops and made of a loss that pulls [B, D] keys so many times."""
    peak, flops, made = counted
    return peak, pulls * whole, pulls * whole, flops, made


def _count(
    run: Callable[..., object], inputs: Sequence[tuple[tuple[int, int], torch.dtype]]
) -> tuple[int, int, int]:
    """Return the most bytes alive, the FLOP and the bytes made of a call on empty tensors."""
    with FakeTensorMode():
        tensors = [torch.empty(size, dtype=dtype) for size, dtype in inputs]
        meter = TensorMeter(tensors)
        with meter:
            result = run(*tensors)
        del result
    return sum(meter.peak), meter.flops, meter.made


def _targets(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64)
