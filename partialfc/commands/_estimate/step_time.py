"""What a training step takes: rates of networks, and every assumption with its number."""

from collections.abc import Sequence

from partialfc.commands._estimate.backbone import (
    GIB,
    MIB,
    NetworkCost,
    exchanged_bytes,
    is_divided,
)
from partialfc.commands._estimate.cluster import LATENCY, LINKS, NETWORK_LATENCY, Cluster
from partialfc.commands._estimate.gpus import BACKBONE, HEAD_SHARE, MEMORY, PRODUCTS
from partialfc.commands._estimate.head import OfHead, head_parts
from partialfc.commands._estimate.losses import LossCost
from partialfc.commands._estimate.nearest import search_seconds, searches
from partialfc.commands._estimate.teacher import TeacherCost
from partialfc.config import Config
from partialfc.config.conflicts import head_compute
from partialfc.cores import usable_cores
from partialfc.head.rows.formats import DTYPES

TERA, GIGA = 1e12, 1e9

CPU_CORE = {"fp32": 113e9, "bf16": 232e9}
CPU_BANDWIDTH, CPU_LINK = 17e9, 2e9
CUDA_CONTEXT, CUDNN_WORKSPACE, NCCL_BUFFERS, DALI_ON_GPU = (
    700 * MIB,
    512 * MIB,
    512 * MIB,
    512 * MIB,
)
ALLOCATOR_SLACK, HEAP_SLACK = 0.05, 0.25
CPU_BACKBONE, HIDDEN = 0.30, 0.67
DECODED_PER_CORE = 8000.0
_PASSES = {"sgd": 6, "adamw": 8, "lion": 24, "lamb": 40, "muon": 32, "schedule_free": 40}
"""How often an update of the backbone reads or writes as many bytes as there are weights: fused, or
with copies of weights and states."""


def seconds_of(
    config: Config,
    counted: NetworkCost,
    losses: Sequence[LossCost],
    heads: Sequence[OfHead],
    cluster: Cluster,
    teacher: TeacherCost | None = None,
) -> list[tuple[str, float, str]]:
    """Return (name, seconds, arithmetic) of the parts of a step, which add up to it."""
    gpu, ranks = cluster.gpu, cluster.ranks
    parts = config.optimizer.accumulation
    backbone: str = config.precision.compute
    if backbone == "fp32" and config.precision.tf32 and cluster.device == "cuda":
        backbone = "tf32"
    share = BACKBONE if cluster.device == "cuda" else CPU_BACKBONE
    flops = counted.flops * parts
    backbone_seconds = flops / (getattr(gpu, backbone) * share)
    trained = counted.trained // (ranks if is_divided(config, ranks) else 1)
    weight_bytes = trained * _PASSES[config.optimizer.name]
    # The average: its distance to the weights, the distance times a factor, their sum.
    weight_bytes += (trained + counted.buffers) * (3 + 2 + 3) * (config.backbone.ema > 0)
    found = [
        (
            "backbone",
            backbone_seconds,
            f"{flops / TERA:.2f} TFLOP counted / ({getattr(gpu, backbone) / TERA:.4g} TFLOP/s "
            f"{backbone} x {share})",
        ),
        *(one for head in heads for one in products_and_rows(head, cluster)),
        (
            "backbone's update",
            weight_bytes / (gpu.bandwidth * MEMORY),
            f"{weight_bytes / GIGA:.2f} GB of weights, gradients and states",
        ),
    ]
    if teacher is not None and teacher.flops:
        rate = getattr(gpu, teacher.compute)
        seconds = teacher.flops * parts / (rate * share)
        why = f"{teacher.flops * parts / TERA:.2f} TFLOP forward, at the backbone's rate"
        found.append(("teacher", seconds, why))
    for loss in losses:
        rate = getattr(gpu, loss.compute) * PRODUCTS
        seconds = parts * (loss.flops / rate + 3 * loss.made / (gpu.bandwidth * MEMORY))
        found.append(
            (
                f"losses: {loss.name}",
                seconds,
                f"{parts * loss.flops / GIGA:.2f} GFLOP; {parts * loss.made / GIGA:.3f} GB made, "
                "read twice and written once",
            )
        )
    if ranks > 1:
        found += [one for head in heads for one in moved_by(head, cluster)]
        ring, hop = cluster.ring(ranks)
        turns = (ranks - 1) / ranks
        if losses:
            size = parts * sum(loss.moved for loss in losses)
            seconds = size * turns / ring + parts * (ranks - 1) * hop
            found.append(("head: losses' collectives", seconds, f"{size / MIB:.2f} MiB in a ring"))
        exchanged = exchanged_bytes(config, counted, ranks)
        whole = exchanged * turns / ring + 2 * (ranks - 1) * hop
        exposed = max(0.0, whole - HIDDEN * backbone_seconds / parts)
        found.append(
            ("gradients' all-reduce", exposed, f"{whole * 1e3:.2f} ms, beside backward if it can")
        )
    if cluster.device == "cpu":
        images, own_cores = config.data.global_batch / ranks, usable_cores() / cluster.gpus_per_node
        found.append(
            (
                "decoding",
                images / (DECODED_PER_CORE * own_cores),
                f"{images:.0f} images on the same {own_cores:g} cores",
            )
        )
    return found


def products_and_rows(head: OfHead, cluster: Cluster) -> list[tuple[str, float, str]]:
    """Return (name, seconds, arithmetic) of what a rank computes of a head in a step."""
    config, shard, gpu = head.config, head.shard, cluster.gpu
    batch, dim = config.data.global_batch, config.backbone.embedding_dim
    compute = head_compute(config, cluster.device)
    products = 4 - shard.kept / max(1, shard.exponentials)
    head_flops = products * 2 * batch * shard.sampled * dim
    head_rate = getattr(gpu, compute) * PRODUCTS * HEAD_SHARE
    ranks, card = cluster.ranks, cluster.gpu.card
    (_, states, *_) = head_parts(config, shard, ranks, cluster.device, card)
    center_bytes = DTYPES[config.head.center_format].itemsize * dim
    state_bytes = states.bytes[0] / max(1, shard.rows)
    moves = getattr(config.head.optimizer, "unsampled", "stay") == "move"
    caught_up = 2 * (moves and config.head.sample_rate < 1)  # read and written before pass 1
    times = 4 + caught_up, 2 + caught_up
    row_bytes = shard.sampled * (times[0] * center_bytes + times[1] * state_bytes)
    found = [
        (
            f"{head.group}: products",
            head_flops / head_rate,
            f"{products:.2f} x 2 x {batch:,} x {shard.sampled:,} x {dim} FLOP / "
            f"({getattr(gpu, compute) / TERA:.4g} TFLOP/s {compute} x {PRODUCTS} x {HEAD_SHARE})",
        ),
        (
            f"{head.group}: rows",
            row_bytes / (gpu.bandwidth * MEMORY),
            f"{row_bytes / GIGA:.2f} GB: centers {times[0]} times, states {times[1]} / "
            f"({gpu.bandwidth / TERA:.4g} TB/s x {MEMORY})",
        ),
    ]
    if searches(config):
        seconds, why = search_seconds(
            config,
            shard.rows,
            head.identities * shard.per_identity,
            dim,
            products=(gpu.bf16 if cluster.device == "cuda" else gpu.fp32) * PRODUCTS,
            bandwidth=gpu.bandwidth * MEMORY,
        )
        every = config.head.nearest.every_steps
        found.append((f"{head.group}: search of neighbours", seconds / every, why))
    return found


def moved_by(head: OfHead, cluster: Cluster) -> list[tuple[str, float, str]]:
    """Return (name, seconds, arithmetic) of the collectives of a head in a step."""
    parts, ranks = head.config.optimizer.accumulation, cluster.ranks // head.copies
    ring, hop = cluster.ring(ranks)
    found = []
    for name, size in _moved(head, cluster).items():
        seconds = size * (ranks - 1) / ranks / ring + parts * (ranks - 1) * hop
        found.append((f"{head.group}: {name}", seconds, f"{size / MIB:.2f} MiB in a ring"))
    return found if head.copies == 1 else [*found, _across_copies(head, cluster)]


def _across_copies(head: OfHead, cluster: Cluster) -> tuple[str, float, str]:
    """The sums of rows' gradients over copies of the centers, a tile at a time: a ring's all-reduce
    moves twice what is summed. Beside them identities, products with own centers and the loss."""
    copies, shard, parts = head.copies, head.shard, head.config.optimizer.accumulation
    rate, hop = cluster.ring_across(cluster.ranks // copies)
    size, tiles = _summed(head), 1
    if shard.sampled:
        tiles = -(-shard.sampled // max(1, shard.tile))
    hops = (2 * tiles + 4 * parts + 2) * (copies - 1)
    return (
        f"{head.group}: rows' gradients over {copies} copies",
        2 * size * (copies - 1) / copies / rate + hops * hop,
        f"2 x {size / MIB:,.1f} MiB of {shard.sampled:,} rows at {rate / GIGA:.3g} GB/s, "
        f"{hops:,} hops",
    )


def sent_by(head: OfHead, cluster: Cluster) -> int:
    """Return the bytes that a rank sends in a step for the collectives of a head, all in rings."""
    copies, ranks = head.copies, cluster.ranks // head.copies
    sent = sum(_moved(head, cluster).values()) * (ranks - 1) // ranks
    return sent + 2 * _summed(head) * (copies - 1) // copies


def _summed(head: OfHead) -> int:
    """Bytes of the gradients of a rank's rows, which copies of the centers sum."""
    return head.shard.sampled * head.config.backbone.embedding_dim * 4


def _moved(head: OfHead, cluster: Cluster) -> dict[str, int]:
    """Bytes that the collectives of a head give to every rank."""
    config = head.config
    batch, dim = config.data.global_batch, config.backbone.embedding_dim
    most = head.shard.positives
    operand = 2 if head_compute(config, cluster.device) == "bf16" else 4
    return {
        "all-gather": batch * (dim * operand + 8 * most),
        "all-reduce of sums": 2 * (1 + most) * batch * 4 // config.optimizer.accumulation,
        "reduce-scatter": batch * dim * DTYPES[config.head.reduce_format].itemsize,
    }


def assumptions(cluster: Cluster) -> list[str]:
    """Return every number that is assumed, and its source."""
    gpu = cluster.gpu
    lines = [
        f"{gpu.name}: {gpu.bf16 / TERA:.4g} bf16, {gpu.fp16 / TERA:.4g} fp16, "
        f"{gpu.tf32 / TERA:.4g} TF32, {gpu.fp32 / TERA:.4g} fp32 TFLOP/s dense; memory "
        f"{gpu.memory / GIB:.1f} GiB at {gpu.bandwidth / GIGA:,.0f} GB/s; {gpu.link / GIGA:.0f} "
        "GB/s to its neighbours"
        + ("" if cluster.device == "cpu" else " (data sheets of the SXM modules)"),
        f"matrix products reach {PRODUCTS:.0%} of the peak, memory {MEMORY:.0%}: 770 TFLOP/s and "
        "4.3 TB/s on an H200",
        f"the head reaches {HEAD_SHARE:.0%} of that product rate: its target, not a measurement",
        f"links reach {LINKS:.0%}; {LATENCY * 1e6:.0f} µs a hop in a node, "
        f"{NETWORK_LATENCY * 1e6:.0f} µs between nodes; overlap of the head is not counted",
    ]
    if cluster.device == "cuda":
        lines.append(
            f"the backbone reaches {BACKBONE:.0%} of the peak: 5-7k images/s of r50 and 3-4k of "
            "r100 on an H200, as is reported; torch.compile is counted as eager"
        )
    else:
        lines.append(
            f"the backbone reaches {CPU_BACKBONE:.0%} of the cores' {CPU_CORE['fp32'] / GIGA:.0f} "
            f"fp32, {CPU_CORE['bf16'] / GIGA:.0f} bf16 GFLOP/s, as of a Zen 4"
        )
    if cluster.ranks > 1:
        lines.append(
            f"gradients travel beside the last {HIDDEN:.0%} of the backbone's time"
            + (
                f"; the network carries {cluster.network * 8 / GIGA:.0f} Gbit/s out of a node "
                "(--network-gbps)"
                if cluster.nodes > 1
                else ""
            )
        )
    return lines
