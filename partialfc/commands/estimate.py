"""Memory per GPU and time per step of a run, before a machine is booked.

    partialfc estimate CONFIG.toml [key.sub=value ...] --nodes N --gpus-per-node G --gpu h200

Memory is counted where it can be and assumed where it says so. Time is arithmetic on rates that are
all printed. With stages, the tables are those of the stage that takes the most memory. Exit code:
0 fits, 1 does not, 2 a mistake in the request.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from partialfc.commands._command import command_parser
from partialfc.commands._estimate.backbone import (
    GIB,
    MOMENTS,
    Device,
    MemoryItem,
    NetworkCost,
    backbone_parts,
    count_backbone,
)
from partialfc.commands._estimate.baseline import process_baseline
from partialfc.commands._estimate.cluster import Cluster
from partialfc.commands._estimate.copies import compared, layouts
from partialfc.commands._estimate.gpus import GPUS, Gpu
from partialfc.commands._estimate.head import OfHead, head_parts, heads_of
from partialfc.commands._estimate.losses import LossCost, count_losses, loss_parts
from partialfc.commands._estimate.numbers import counts_of_heads, positive
from partialfc.commands._estimate.peers import peers_cost
from partialfc.commands._estimate.start import refuse_other_centers
from partialfc.commands._estimate.step_time import (
    ALLOCATOR_SLACK,
    CPU_BANDWIDTH,
    CPU_CORE,
    CPU_LINK,
    CUDA_CONTEXT,
    CUDNN_WORKSPACE,
    DALI_ON_GPU,
    DECODED_PER_CORE,
    HEAP_SLACK,
    NCCL_BUFFERS,
    assumptions,
    seconds_of,
)
from partialfc.commands._estimate.teacher import TeacherCost, count_teacher
from partialfc.config import Config, ConfigError, load
from partialfc.config.heads import each_head, section_of_head
from partialfc.cores import usable_cores
from partialfc.data.tars.ahead import images_kept
from partialfc.definitions.urls import url_of
from partialfc.training.images import numberings, open_images
from partialfc.writing import write_json

# --- Memory


def memory_of(
    config: Config,
    counted: NetworkCost,
    losses: Sequence[LossCost],
    heads: Sequence[OfHead],
    cluster: Cluster,
    teacher: TeacherCost | None = None,
) -> dict[str, list[MemoryItem]]:
    """Return the parts of a rank's memory by group."""
    ranks, device, card = cluster.ranks, cluster.device, cluster.gpu.card
    parts = {
        **{one.group: head_parts(one.config, one.shard, ranks, device, card) for one in heads},
        "losses": loss_parts(config, losses),
        "backbone": backbone_parts(config, counted, ranks, device),
        "data": data_parts(config, ranks, device),
    }
    copies = peers_cost(config, {one.name: one.identities for one in heads}, cluster.nodes)
    if copies is not None and cluster.device == "cpu":  # a rank's memory is the host's
        parts["peers"] = [copies.part(cluster.gpus_per_node)]
    if teacher is not None:
        parts["teacher"] = teacher.items
    moving = max(counted.saved, counted.backward, counted.inference)
    moving += sum(head.shard.kept for head in heads)
    moving += sum(loss.peak for loss in losses)
    return {**parts, "process": process_parts(config, cluster, moving)}


def totals(parts: dict[str, list[MemoryItem]]) -> tuple[int, ...]:
    """Return the bytes at each of ``MOMENTS``."""
    every = [part for group in parts.values() for part in group]
    return tuple(sum(part.bytes[i] for part in every) for i in range(len(MOMENTS)))


def most_identities(
    config: Config,
    counted: NetworkCost,
    losses: Sequence[LossCost],
    heads: Sequence[OfHead],
    cluster: Cluster,
    teacher: TeacherCost | None = None,
) -> int:
    """Return the largest number of identities that fits, 0 if none does; of several heads all
    together, in the proportions that they have."""
    total = sum(head.identities for head in heads)

    def fits(identities: int) -> bool:
        each = {head.name: max(1, identities * head.identities // total) for head in heads}
        grown = heads_of(config, each, cluster.ranks, cluster.device)
        parts = memory_of(config, counted, losses, grown, cluster, teacher)
        return max(totals(parts)) <= cluster.gpu.memory

    low = max(1, cluster.ranks)
    if not fits(low):
        return 0
    high = low
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def data_parts(config: Config, world_size: int, device: Device) -> list[MemoryItem]:
    """Return the memory of images under way and, on a CPU, of packs."""
    data, sets = config.data, config.verification
    image, batch = math.prod(data.sample_shape), config.shares(world_size).largest
    dali = _uses_dali(config, device)
    if dali:
        ahead, per_image, who = data.prefetch + 2, 6 * image, "DALI: fp32 and decoded bytes"
    else:
        ahead, per_image, who = data.prefetch + 1 + data.threads, 4 * image, "fp32"
        if device == "cuda":
            ahead = 2
    under_way = ahead * batch * per_image
    copies = 3 if device == "cpu" else 2  # mirrored; on a CPU also before they are a batch
    measured = sets.batch * 4 * image * copies * bool(sets.pairs or sets.identification)
    parts = [
        MemoryItem(
            "images under way",
            (under_way, under_way, under_way, under_way + measured),
            f"{ahead} batches of {batch} x {' x '.join(map(str, data.sample_shape))}, {who}",
        )
    ]
    if any(url_of(path) for path in data.sources):
        parts.append(
            MemoryItem.always(
                "images asked for ahead",
                images_kept(batch, data.block, data.block_window) * data.image_size**2,
                "of images at a URL, a byte a pixel",
            )
        )
    if device == "cpu":
        files = [*data.sources, *sets.pairs, *sets.identification]
        mapped = sum(path.stat().st_size for path in files if path.exists())
        parts.append(
            MemoryItem.always("packs and sets", mapped, "those of their files that are here")
        )
    return parts


def process_parts(config: Config, cluster: Cluster, moving: int) -> list[MemoryItem]:
    """Return what a process takes besides its tensors; ``moving`` bytes of them come and go."""
    if cluster.device == "cpu":
        baseline = process_baseline(_uses_dali(config, "cpu"))
        return [
            MemoryItem.always(
                "libraries", baseline, "measured: a process that takes two tiny steps"
            ),
            MemoryItem.always(
                "heap slack",
                int(moving * HEAP_SLACK),
                f"assumed, {HEAP_SLACK:.0%} of what comes and goes: glibc and oneDNN",
            ),
        ]
    several, dali = cluster.ranks > 1, _uses_dali(config, "cuda")
    return [
        MemoryItem.always("CUDA context, cuBLAS", CUDA_CONTEXT, "assumed"),
        MemoryItem.always(
            "cuDNN workspace", CUDNN_WORKSPACE, "assumed: the algorithms that it tries"
        ),
        MemoryItem.always("NCCL", NCCL_BUFFERS * several, "assumed"),
        MemoryItem.always("DALI's decoder", DALI_ON_GPU * dali, "assumed"),
        MemoryItem.always(
            "allocator slack",
            int(moving * ALLOCATOR_SLACK),
            f"assumed, {ALLOCATOR_SLACK:.0%} of what comes and goes",
        ),
    ]


def _uses_dali(config: Config, device: Device) -> bool:
    if config.data.kind == "arrays":
        return False
    if config.data.loader != "auto":
        return config.data.loader == "dali"
    return device == "cuda" or importlib.util.find_spec("nvidia.dali") is not None


# --- The request


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Return what was asked for; a CPU is this machine's, divided among its ranks."""
    network = options.network_gbps * 1e9 / 8
    if options.gpu != "cpu":
        gpu = GPUS[options.gpu]
        return Cluster(gpu, "cuda", options.nodes, options.gpus_per_node, network)
    share = options.gpus_per_node
    fp32, bf16 = (CPU_CORE[name] * usable_cores() / share for name in ("fp32", "bf16"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // share
    gpu = Gpu("cpu", memory, bf16, fp32, fp32, fp32, CPU_BANDWIDTH / share, CPU_LINK)
    return Cluster(gpu, "cpu", options.nodes, share, network)


def identities_of(config: Config, given: Mapping[str, int] | None) -> dict[str, int]:
    """Return the number of each head that was given, or that of the packs."""
    heads = each_head(config)
    if given is not None:
        if given.keys() != heads.keys():
            named = ",".join(f"{name}=N" for name in heads if name) or "N"
            raise ConfigError(f"--identities: it must be --identities {named} for this run.")
        return dict(given)
    try:
        every = numberings(config, open_images(config))
        return {name: one.count for name, one in every.items()}
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).rstrip('.')}. The number of identities is the pack's: "
            "point data.train at a pack on this machine, or give --identities."
        ) from error


def main(arguments: list[str]) -> int:
    """Estimate, print, and return the exit code."""
    parser = command_parser("estimate", __doc__)
    parser.add_argument("config", help="settings of the run, TOML")
    parser.add_argument("override", nargs="*", help="key.sub=value, on top of them")
    parser.add_argument("--nodes", type=positive(int), default=1)
    parser.add_argument("--gpus-per-node", type=positive(int), default=1, help="ranks of a node")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu"], required=True)
    parser.add_argument(
        "--identities",
        type=counts_of_heads,
        metavar="N",
        help="instead of the pack's; of several heads NAME=N,NAME=N",
    )
    parser.add_argument(
        "--network-gbps",
        type=positive(float),
        default=400.0,
        help="Gbit/s out of a node, all its adapters (default: 400)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    options = parser.parse_intermixed_args(arguments)
    config, cluster = load(options.config, options.override), cluster_of(options)
    config.check(cluster.ranks)
    of_heads = identities_of(config, options.identities)
    for name, head in each_head(config).items():
        refuse_other_centers(head, of_heads[name], section_of_head(name))
    identities = sum(of_heads.values())
    every = [_estimated(one, of_heads, cluster) for one in config.in_stages()]
    names = [one.name for one in config.stages] or [""]
    most = max(every, key=lambda one: one.bytes)
    memory = cluster.gpu.memory
    if config.stages:
        print(f"Stage {names[every.index(most)]}, which takes the most memory:")
    _show(most.parts, most.times, cluster, identities)
    per_rank = most.images / cluster.ranks
    print(
        f"{most.images:,.0f} images/s in all. Each rank decodes {per_rank:,.0f} images/s: "
        f"{per_rank / DECODED_PER_CORE:.2f} cores at {DECODED_PER_CORE:,.0f} images/s a core "
        f"(data.threads = {most.config.data.threads})."
    )
    for name, one in zip(names, every, strict=True):
        if name:
            step = 1e3 * one.config.data.global_batch / one.images
            print(f"stage {name}: {one.bytes / GIB:.2f} GiB a rank, {step:,.1f} ms a step.")
    fits = most.bytes <= memory
    print(
        f"{'fits' if fits else 'does not fit'}: {most.bytes / GIB:.2f} of {memory / GIB:.2f} GiB "
        f"a rank with {identities:,} identities; the most that fit are "
        f"{min(one.most_identities for one in every):,}."
    )
    print(compared(of_layouts := layouts(most.config, of_heads, cluster)), end="")
    if (copies := peers_cost(config, of_heads, cluster.nodes)) is not None:
        print(copies.words(config.checkpoint.peers_every_steps))
    if options.json:
        record = {
            "command": [options.config, *options.override],
            "cluster": asdict(cluster),
            "identities": identities,
            **({"heads": of_heads} if "" not in of_heads else {}),
            **most.numbers(),
            "fits": fits,
            "assumptions": assumptions(cluster),
            **({"peers": asdict(copies)} if copies else {}),
            **({"layouts": [asdict(one) for one in of_layouts]} if of_layouts else {}),
        }
        if config.stages:
            record["stages"] = {name: one.numbers() for name, one in zip(names, every, strict=True)}
        write_json(options.json, record)
    return 0 if fits else 1


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Of a run without stages or of one stage."""

    config: Config
    parts: dict[str, list[MemoryItem]]
    times: list[tuple[str, float, str]]
    most_identities: int
    positives: int

    @property
    def bytes(self) -> int:
        return max(totals(self.parts))

    @property
    def images(self) -> float:
        """Images a second over all ranks."""
        return self.config.data.global_batch / sum(seconds for _, seconds, _ in self.times)

    def numbers(self) -> dict[str, Any]:
        """For a file."""
        return {
            "positives": self.positives,
            "memory": {
                group: [asdict(part) for part in found] for group, found in self.parts.items()
            },
            "moments": dict(zip(MOMENTS, totals(self.parts), strict=True)),
            "bytes": self.bytes,
            "most_identities": self.most_identities,
            "seconds": [{"name": n, "seconds": s, "origin": why} for n, s, why in self.times],
            "images_per_second": self.images,
        }


def _estimated(config: Config, of_heads: Mapping[str, int], cluster: Cluster) -> _Estimate:
    heads = heads_of(config, of_heads, cluster.ranks, cluster.device)
    counted = count_backbone(config, cluster.ranks)
    teacher = count_teacher(config, counted, cluster.ranks, cluster.device)
    dim = teacher.dim if teacher else None
    losses = count_losses(config, heads, cluster.ranks, cluster.device, dim)
    return _Estimate(
        config,
        memory_of(config, counted, losses, heads, cluster, teacher),
        seconds_of(config, counted, losses, heads, cluster, teacher),
        most_identities(config, counted, losses, heads, cluster, teacher),
        max(head.shard.positives for head in heads),
    )


def _show(
    parts: dict[str, list[MemoryItem]],
    times: list[tuple[str, float, str]],
    cluster: Cluster,
    identities: int,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    ranks = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    memory = Table(title=f"Memory of a rank, GiB: {identities:,} identities on {ranks}")
    for column in ("", *MOMENTS):
        memory.add_column(column, justify="right" if column else "left", no_wrap=True)
    memory.add_column("bytes", justify="right", no_wrap=True)
    memory.add_column("from", overflow="fold")
    for group, found in parts.items():
        for part in found:
            if max(part.bytes):
                numbers = [f"{size / GIB:.3f}" for size in part.bytes]
                name = f"{group}: {part.name}"
                memory.add_row(name, *numbers, f"{max(part.bytes):,}", part.origin)
        memory.add_section()
    needed = totals(parts)
    peak = MOMENTS[needed.index(max(needed))]
    numbers = [f"{size / GIB:.3f}" for size in needed]
    memory.add_row("total", *numbers, f"{max(needed):,}", f"highest: {peak}", style="bold")
    step = Table(title="Time of a step, ms")
    step.add_column("")
    step.add_column("ms", justify="right")
    step.add_column("from", overflow="fold")
    for name, seconds, why in times:
        step.add_row(name, f"{seconds * 1e3:.3f}", why)
    step.add_section()
    step.add_row("total", f"{sum(s for _, s, _ in times) * 1e3:.3f}", "", style="bold")
    console.print(memory, step)
    console.print(
        "Assumed:", *[f"- {line}" for line in assumptions(cluster)], sep="\n", soft_wrap=True
    )
