"""Memory of a run's head per rank: added up from its shapes.

Rows, states, tiles and budgets are asked from partialfc itself.

Shape suffixes: B = images of the global micro-batch, D = embedding, n = sampled rows of a rank,
T = rows of a tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from partialfc.commands._estimate.backbone import Device, MemoryItem, TensorMeter, bytes_of
from partialfc.commands._estimate.nearest import nearest_parts
from partialfc.commands._estimate.start import start_parts
from partialfc.config import Config, ConfigError, conflicts
from partialfc.config.conflicts import head_compute, memory_of
from partialfc.config.heads import (
    copies_of,
    each_head,
    holders_of_heads,
    labelled_of,
    rows_of_heads,
    section_of_head,
)
from partialfc.data.label_file import shape_of
from partialfc.errors import in_words
from partialfc.head.plan import Machine, Plan
from partialfc.head.rows.formats import DTYPES
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.sampling import KeyedSampler
from partialfc.head.sharding import GROWTH, Sharding, default_canonical_shards
from partialfc.head.tiles import fused, passes
from partialfc.head.tiles.cards import Card
from partialfc.head.tiles.parts import Logits
from partialfc.margins import Margin
from partialfc.model.build import embedding_losses, margin_of, row_rule_of
from partialfc.model.several import several_of
from partialfc.numerics import operand_dtype


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """What the largest rank has of the head: rows and bytes."""

    rows: int
    sampled: int
    tile: int
    """Rows of a tile of what goes through the classes tile by tile."""
    fused: int
    """Rows of a tile of the fused kernels; 0: they are not used."""
    per_identity: int
    kept: int
    """Bytes of exponentials kept between the passes."""
    exponentials: int
    """Bytes of all of them."""
    positives: int = 1
    """Most identities of an image."""


@dataclass(frozen=True, slots=True)
class OfHead:
    """One head of a run.

    Attributes:
        name: "" for the head of a run without ``[heads]``.
        config: The settings as if it were the only head, and its images the whole batch; with
            several copies of the class centers those of a copy.
        identities: C.
        shard: What the largest rank has of it.
        copies: Of the class centers.
    """

    name: str
    config: Config
    identities: int
    shard: ShardSizes
    copies: int = 1

    @property
    def group(self) -> str:
        """What its parts are listed under."""
        return section_of_head(self.name)


def heads_of(
    config: Config, identities: Mapping[str, int], world_size: int, device: Device
) -> list[OfHead]:
    """Return the heads of a run.

    Args:
        config: Settings of the run.
        identities: Of each head, by name.
        world_size: Ranks.
        device: Of them.

    Raises:
        ConfigError: As of :func:`shard_of`.
    """
    found, parts = [], config.optimizer.accumulation
    rows, holders = rows_of_heads(config), holders_of_heads(config, world_size)
    for name, one in each_head(config).items():
        own_B, copies = rows[name], copies_of(one, world_size)
        batch = one.data.global_batch if own_B is None else int(own_B.sum())
        if own_B is not None or copies > 1:
            batch = -(-batch // (copies * parts)) * parts
            data = one.data.model_copy(update={"global_batch": batch})
            one = one.model_copy(update={"data": data})
        count = identities[name]
        positives = positives_of(config, name)
        shard = shard_of(one, count, world_size, device, positives, holders[name])
        found.append(OfHead(name, one, count, shard, copies))
    return found


def positives_of(config: Config, head: str) -> int:
    """Return the most identities of an image of a head.

    Raises:
        ConfigError: If the labels are not on this machine, or something cannot take several.
    """
    most, path, one = 1, None, each_head(config)[head]
    try:
        for labelled in labelled_of(config, head):
            path = labelled.labels
            assert path is not None
            most = max(most, shape_of(path)[1])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {in_words(error).rstrip('.')}. Labels say how many identities an image has: "
            "the estimate needs them on this machine."
        ) from error
    if most > 1:
        several_of(one, most, margin_of(one), embedding_losses(one))
    return most


def shard_of(
    config: Config,
    identities: int,
    world_size: int,
    device: Device,
    positives: int = 1,
    holders: range | None = None,
) -> ShardSizes:
    """Return the sizes of the largest rank's part of the head, for images of some identities each.

    With several copies of the class centers, the global batch of the settings is that of a copy.

    Raises:
        ConfigError: If the centers cannot be cut for so many ranks, or not go by fused kernels.
    """
    settings, batch = config.head, config.data.global_batch
    copies = copies_of(config, world_size)
    world_size, most = world_size // copies, world_size
    shards = settings.canonical_shards or default_canonical_shards(
        identities, GROWTH * most, weighted_rate=settings.weighted_rate
    )
    try:
        sharding = Sharding(
            num_identities=identities,
            canonical_shards=shards,
            world_size=world_size,
            holders=holders,
        )
    except ValueError as error:
        raise ConfigError(f"head: {error}") from error
    rows = max(len(sharding.owned(rank)) for rank in range(world_size))
    sampled = rows
    if settings.sample_rate < 1:
        found = -(-batch * copies * positives // shards)  # of a canonical shard, on average
        sizes = [sharding.start(v + 1) - sharding.start(v) for v in range(shards)]
        quotas = [
            max(sharding.quota(v, settings.sample_rate), min(found, sizes[v]))
            for v in range(shards)
        ]
        owned = (sharding.shards(rank) for rank in range(world_size))
        sampled = max(sum(quotas[v] for v in of_rank) for of_rank in owned)
    margin = margin_of(config)
    per_identity = margin.centers_per_identity
    rows, sampled = rows * per_identity, sampled * per_identity
    operand = operand_dtype(head_compute(config, device)).itemsize
    micro_batch = batch // config.optimizer.accumulation
    with FakeTensorMode():
        query_BD = torch.empty(micro_batch, dim_of(config, margin), device=device)
        rows_n = torch.empty(sampled, dtype=torch.int64)
        _, tile = next(passes.tiles(query_BD, query_BD, rows_n, per_identity), (0, 0))
    fused_tile, path = 0, _plan(config, device, positives, most).path
    if path == "fused":
        _, fused_tile = next(fused.tiles(micro_batch, sampled), (0, 0))
    budget_bytes = memory_of(config).keep_bytes(device)
    exponentials = sampled * batch * operand
    kept = exponentials
    if exponentials > budget_bytes:
        one = max(1, (fused_tile or tile) * micro_batch * operand)
        kept = budget_bytes // one * one
    if path == "fused" and _needs_maximum(margin):
        kept = 0
    return ShardSizes(rows, sampled, tile, fused_tile, per_identity, kept, exponentials, positives)


def _plan(config: Config, device: Device, positives: int, world_size: int) -> Plan:
    """Return which code computes the head, on a GPU of the kind that the fused kernels need.

    Raises:
        ConfigError: If the fused kernels are asked for and cannot do it.
    """
    plan = conflicts.plan_of(config, _machine(device), positives, world_size=world_size)
    try:
        plan.refuse(fused=config.head.fused)
    except ValueError as error:
        raise ConfigError(f"head.{error}") from error
    return plan


def _machine(device: Device) -> Machine | None:
    return None if device == "cuda" else Machine(device, has_kernels=False)


def _needs_maximum(margin: Margin) -> bool:
    logits = Logits(margin.scale, margin.unit_centers, margin.largest_logit, "fp32")
    return logits.needs_maximum


def dim_of(config: Config, margin: Margin) -> int:
    """Return the length of a row of the centers."""
    return config.backbone.embedding_dim + margin.bias


def head_parts(
    config: Config,
    shard: ShardSizes,
    world_size: int,
    device: Device,
    card: Card | None = None,
) -> list[MemoryItem]:
    """Return the memory of the class centers and of the head's two passes over them.

    Raises:
        ConfigError: If the fused kernels are asked for and ``card``, whose tiles they would have,
            is ``None``.
    """
    settings, margin = config.head, margin_of(config)
    dim = dim_of(config, margin)
    centers = torch.empty(shard.rows, dim, dtype=DTYPES[settings.center_format], device="meta")
    optimizer = RowOptimizer(
        nn.Parameter(centers, requires_grad=False),
        row_rule_of(config),
        every_row=settings.sample_rate == 1,
    )
    states = {name: bytes_of([value]) for name, value in optimizer.states().items()}
    center_bytes = bytes_of([centers])
    row_bytes = (center_bytes + sum(states.values())) // max(1, shard.rows)
    listed = ", ".join(f"{name} {size // max(1, shard.rows):,} B" for name, size in states.items())

    operand = operand_dtype(head_compute(config, device)).itemsize
    parts, n, tile = config.optimizer.accumulation, shard.sampled, shard.tile
    batch = config.data.global_batch // parts
    whole, unit = batch * dim * 4, batch * dim * operand  # fp32 and operands [B, D]
    holding = world_size // copies_of(config, world_size)
    own = whole // holding

    # Between the passes: the operands of every micro-batch and the gradient of its embeddings. In
    # pass 1 also the gathered bytes, the pull, the positives' centers and two results on the way;
    # in pass 2 the operands weighted, unless fused, and once more for the positives.
    between = parts * (unit + own)
    first = between + 4 * whole + 3 * own + (unit if world_size > 1 else 0)
    first += 2 * (shard.positives - 1) * whole  # centers of all pairs, and what comes of them
    weighted = 1 if shard.fused else 2
    second = between + weighted * parts * unit + (2 * whole if operand < 4 else 0)
    # Beside the backward, what pass 2 makes is of its stream, whose memory no other stream uses.
    overlaps = device == "cuda" and conflicts.why_no_overlap(config, device, world_size) is None
    of_stream = second - between if overlaps else 0

    # Buffers that stay: unit centers, gradient, scratch, stored rows and states. Pass 2 copies the
    # rows and states that are not updated where they lie; a GPU does it with all of them.
    formats = settings.center_format, getattr(settings.optimizer, "momentum_format", "fp32")
    logits = tile * batch * (4 + 4 * (operand < 4) + operand)
    buffers = tile * (dim * (operand + 8) + row_bytes)
    copies = 4 * tile * dim * 4 if formats != ("fp32", "fp32") or device == "cuda" else 0
    again = logits if shard.kept < shard.exponentials else 0
    said = f"{tile:,} rows: logits, unit centers, gradient, states"
    if shard.fused:
        # Pass 1: unit centers, and of each split of a tile the sums, the pull and, if need be, the
        # maxima. Pass 2: the gradient, and with micro-batches that of the earlier ones.
        if card is None:
            raise ConfigError(
                "head.fused = true: the fused kernels cannot: they need tensor cores for bf16, "
                "which this GPU lacks. Remove it."
            )
        sums = 1 + dim + _needs_maximum(margin)
        buffers = shard.fused * dim * (operand + 4 * min(parts, 2))
        buffers += fused.splits_of(batch, card) * batch * sums * 4
        logits = copies = again = 0
        said = f"{shard.fused:,} rows of the fused kernels: unit centers, gradient; sums of splits"
    beside = copies + again if overlaps else 0
    limited = ", as far as head.keep_mib allows" if shard.kept < shard.exponentials else ""
    sampler, rows = (_sampler_bytes(), 8 * n) if settings.sample_rate < 1 else (0, 0)
    state_bytes, elsewhere = sum(states.values()), device == "cuda" or settings.host_folder
    in_host = {
        name: bool(elsewhere) and where == "host"
        for name, where in (("centers", settings.centers_in), ("states", settings.states_in))
    }
    pooled = device == "cpu" and operand == 4  # their buffers wait for the next step
    staged = 0
    if memory_of(config).uses_host:
        staged = 3 * n * row_bytes  # of this step, the next and the last
    return [
        MemoryItem.always(
            "class centers",
            0 if in_host["centers"] else center_bytes,
            f"{shard.rows:,} x {dim} x {settings.center_format}, the largest rank's",
        ),
        MemoryItem.always(
            "row states",
            0 if in_host["states"] else state_bytes,
            f"{listed} a row" if listed else "none",
        ),
        MemoryItem.always(
            "staged rows",
            staged,
            f"{n:,} rows of this step, the next and the last"
            + _elsewhere("centers", in_host["centers"] * center_bytes)
            + _elsewhere("states", in_host["states"] * state_bytes),
        ),
        MemoryItem(
            "kept exponentials",
            (shard.kept, shard.kept, shard.kept, shard.kept if pooled else 0),
            f"{n:,} sampled rows x {config.data.global_batch:,} x {operand} B{limited}",
        ),
        MemoryItem(
            "batch buffers",
            (first + of_stream, between + of_stream, second, of_stream),
            f"[{batch:,}, {dim}]: embeddings, gradient, positives' centers",
        ),
        MemoryItem(
            "tile",
            (
                buffers + logits + beside,
                buffers + beside,
                buffers + copies + again,
                buffers + beside,
            ),
            said + ("; pass 2 on a stream of its own" if beside else ""),
        ),
        MemoryItem(
            "sampled rows",
            (n * sampler, rows, rows, 0),
            f"{sampler} B a row in the sampler (measured), 8 afterwards" if rows else "all rows",
        ),
        *nearest_parts(config, shard.rows, dim, device, holding),
        *start_parts(config, shard.rows // shard.per_identity, device),
    ]


def _elsewhere(name: str, size: int) -> str:
    return f"; {size / 2**30:,.1f} GiB of {name} in host memory or its files" if size else ""


@cache
def _sampler_bytes() -> int:
    """Peak bytes of the sampler for a sampled row, measured on a small one."""
    sharding = Sharding(num_identities=65536, canonical_shards=64, world_size=1)
    sampler = KeyedSampler(sharding, 0, sample_rate=0.5, seed=0)
    identities_B = torch.arange(0, 65536, 1024)
    meter = TensorMeter()
    with meter:
        sampler(0, identities_B)
    return -(-sum(meter.peak) // 32768)
