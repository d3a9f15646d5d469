"""What does not go together across sections, known before there is a machine.

What two settings of one section say against each other, the section itself refuses.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from partialfc.config.arrays import conflicts_of_arrays
from partialfc.config.heads import (
    conflicts_of_heads,
    copies_of,
    each_head,
    labelled_of,
    section_of_head,
)
from partialfc.config.optimizers import Schedule
from partialfc.config.schema import nearest_multiples
from partialfc.definitions.backbones import TIMM, refused_size
from partialfc.definitions.phrases import to_value
from partialfc.head.options import Compute, Kernels, Memory, Precision, check_fit, check_inter_class
from partialfc.head.plan import Machine, Plan, decide

if TYPE_CHECKING:
    from partialfc.config.head import Head
    from partialfc.config.tree import Config


def conflicts(config: "Config") -> Iterator[str]:
    """Yield a line for each conflict: key, value, rule and remedy."""
    yield from _of_the_length(config)
    yield from conflicts_of_arrays(config)
    if refused := refused_size(config.backbone.name, config.data.image_size):
        yield f"data.{refused}"
    yield from _of_pretrained(config)
    batch, accumulation = config.data.global_batch, config.optimizer.accumulation
    if batch % accumulation:
        yield (
            f"data.global_batch = {batch}: must divide by optimizer.accumulation = {accumulation}. "
            f"Nearest: {nearest_multiples(batch, accumulation)}."
        )
    if config.backbone.lora.rank:
        yield from _of_the_adapters(config)
    yield from _of_the_optimizer(config)
    if config.run.steps is not None and config.schedule.warmup_steps >= config.run.steps:
        yield (
            f"schedule.warmup_steps = {config.schedule.warmup_steps}: must be fewer than run.steps "
            f"= {config.run.steps}, or the warm-up never ends."
        )
    if config.log.upload_checkpoint and not config.checkpoint.shared:
        yield (
            "log.upload_checkpoint = true with checkpoint.shared = false: no host has the whole of "
            "a checkpoint. Remove one."
        )
    yield from _of_shards(config)
    yield from _of_the_sets(config)
    yield from conflicts_of_heads(config)
    for name, one in each_head(config).items():
        yield from _of_a_head(one, section_of_head(name))
        yield from _of_labels(one, name)


def _of_the_length(config: "Config") -> Iterator[str]:
    for key in ("epochs", "steps"):
        value = getattr(config.run, key)
        if config.stages and value is not None:
            yield (
                f"run.{key} = {value:g} with [[stages]]: each stage has a length of its own. "
                f"Remove run.{key}."
            )
    if not config.stages and config.run.epochs is None and config.run.steps is None:
        yield "run.epochs: neither it nor run.steps is set. Set one of the two."


def _of_the_adapters(config: "Config") -> Iterator[str]:
    rank = f"backbone.lora.rank = {config.backbone.lora.rank}"
    if not (config.run.start_from or config.run.resume_from or config.backbone.pretrained):
        yield (
            f"{rank} without run.start_from: adapters change a trained backbone, and there is "
            "none. Name one with run.start_from, or of timm with backbone.pretrained."
        )
    if config.backbone.freeze:
        yield (
            f"backbone.freeze = {[*config.backbone.freeze]} with {rank}: all but the adapters and "
            "backbone.lora.also_train stays as it is. Remove freeze."
        )


def _of_the_optimizer(config: "Config") -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.clip_groups and not optimizer.clip_norm:
        yield (
            "optimizer.clip_groups = true with optimizer.clip_norm = 0.0: nothing is clipped. Set "
            "clip_norm, or remove clip_groups."
        )
    if optimizer.name == "schedule_free" and schedule.final_factor != 1:
        yield (
            f"schedule.final_factor = {schedule.final_factor} with optimizer.name = "
            '"schedule_free": its rate stays as it is after the warm-up. Set final_factor = 1.'
        )
    for key, field in type(schedule).model_fields.items():
        value = getattr(schedule, key)
        of_fall = key not in Schedule.model_fields and value != field.default
        if optimizer.name == "schedule_free" and of_fall:
            yield (
                f'schedule.{key} = {to_value(value)} with optimizer.name = "schedule_free": has no '
                f"effect, as its rate does not fall. Remove {key} and schedule.name."
            )
    if optimizer.name == "schedule_free" and config.backbone.ema:
        yield (
            f'backbone.ema = {config.backbone.ema} with optimizer.name = "schedule_free": it has a '
            "mean of the weights of its own. Remove backbone.ema."
        )
    steps = config.run.steps
    decay = getattr(schedule, "decay_steps", 0)
    if steps is not None and decay > steps - schedule.warmup_steps > 0:
        yield (
            f"schedule.decay_steps = {decay}: must be at most run.steps - schedule.warmup_steps = "
            f"{steps - schedule.warmup_steps}."
        )


def _of_shards(config: "Config") -> Iterator[str]:
    """What a divided backbone cannot do, and what nothing else can."""
    backbone, shard = config.backbone, 'backbone.shard = "fsdp2"'
    if backbone.shard == "none":
        for key, value, default in (
            ("reshard", backbone.reshard, True),
            ("offload", backbone.offload, False),
        ):
            if value != default:
                yield (
                    f"backbone.{key} = {str(value).lower()}: of a backbone that is divided among "
                    f"the ranks. Set {shard}, or remove it."
                )
        return
    if config.precision.compute == "fp16":
        yield (
            f'{shard} with precision.compute = "fp16": the loss scale follows the gradients of all '
            "ranks, and each has its own. Use bf16."
        )
    if config.optimizer.name in ("lamb", "muon"):
        yield (
            f'{shard} with optimizer.name = "{config.optimizer.name}": it takes norms of whole '
            "weights, and a rank has its rows. Choose another optimizer."
        )
    if config.checkpoint.peers_every_steps:
        yield (
            f"{shard} with checkpoint.peers_every_steps = {config.checkpoint.peers_every_steps}: "
            "not supported together. A copy has the backbone once a host, and no host has all of "
            "it. Remove one."
        )
    if backbone.lora.rank:
        yield (
            f"{shard} with backbone.lora.rank = {backbone.lora.rank}: not supported together. "
            "Adapters have few gradients and states, so leave backbone.shard out."
        )
    if backbone.compile:
        yield f"{shard} with backbone.compile = true: not supported together. Remove one."
    if backbone.offload and config.run.device == "cpu":
        yield (
            'backbone.offload = true with run.device = "cpu": the weights are in host memory '
            "already. Remove it."
        )
    if backbone.offload and backbone.ema:
        yield (
            f"backbone.offload = true with backbone.ema = {backbone.ema}: not supported together. "
            "Remove one."
        )


def _of_labels(config: "Config", head: str) -> Iterator[str]:
    """What a head takes images for, and what their labels are."""
    several, key = config.head.several, f"{section_of_head(head)}.several"
    labelled = labelled_of(config, head)
    weights = [one.label_weights for one in labelled if one.label_weights is not None]
    if (several.loss == "soft") != bool(weights):
        given = f'with label_weights = "{weights[0]}"' if weights else "without data.label_weights"
        yield (
            f'{key}.loss = "{several.loss}" {given}: "soft" takes weights, and no other loss does. '
            "Set both, or neither."
        )
    for name, field in type(several).model_fields.items():
        if not labelled and (value := getattr(several, name)) != field.default:
            yield (
                f'{key}.{name} = "{value}": it is for images of several identities, or of none, '
                f"and a pack has one for each. Set data.labels, or remove {name}."
            )


def _of_pretrained(config: "Config") -> Iterator[str]:
    path, name = config.backbone.pretrained, config.backbone.name
    if path is not None and not name.startswith(TIMM):
        yield (
            f'backbone.pretrained = "{path}": is for networks of timm, and backbone.name is '
            f'"{name}". Weights of a backbone that was trained here go into run.start_from.'
        )
    if path is not None and config.run.start_from is not None:
        yield (
            f'backbone.pretrained = "{path}" with run.start_from = "{config.run.start_from}": a '
            "run begins with one of them. Remove the other."
        )


def _of_the_sets(config: "Config") -> Iterator[str]:
    """What takes images of other identities for those of other people."""
    unknown = [name for name, one in config.data.by_set.items() if one.same_people == "unknown"]
    if not unknown:
        return
    key = f'data.sets.{unknown[0]}.same_people = "unknown"'
    for loss in ("triplet", "contrastive", "uniformity"):
        if getattr(config.losses, loss).weight:
            yield (
                f"{key} with losses.{loss}: it parts all images of different identities, which may "
                f"be one person in two sets. Remove losses.{loss}, or map the sets onto each other."
            )
    for name, one in each_head(config).items():
        smoothing = getattr(one.head.margin, "label_smoothing", 0)
        if smoothing and may_share(one):
            yield (
                f"{key} with {section_of_head(name)}.margin.label_smoothing = {smoothing}: it is "
                "shared out to the centers of all sets. Set it to 0."
            )


def _of_a_head(config: "Config", key: str) -> Iterator[str]:
    """What a head says itself; ``key`` is its section."""
    settings = config.head
    for name, field in type(settings.nearest).model_fields.items():
        value = getattr(settings.nearest, name)
        if settings.negatives != "nearest" and value != field.default:
            yield (
                f"{key}.nearest.{name} = {to_value(value)}: {key}.negatives is "
                f'"{settings.negatives}". Set it to "nearest", or remove {name}.'
            )
    if settings.sample_rate == 1 and not config.stages:
        yield from idle_negatives(settings, key)
    if settings.overlap and config.precision.compute == "fp16":
        yield (
            f'{key}.overlap = true with precision.compute = "fp16": whether a step with a loss '
            f"scale counts is known after the backbone's backward only. Use bf16, or remove "
            f"{key}.overlap."
        )
    if settings.ranks_per_copy is not None and getattr(settings, "ranks", None) is not None:
        yield (
            f"{key}.ranks_per_copy = {settings.ranks_per_copy} with {key}.ranks = "
            f"{getattr(settings, 'ranks', None)}: a head on some of the ranks has one. Remove one."
        )
    unit_centers = settings.margin.definition.unit_centers
    margin = f'{key}.margin.name = "{settings.margin.name}"'
    on_cpu = config.run.device == "cpu"
    machine = Machine("cpu", has_kernels=False) if on_cpu else None
    try:
        check_fit(
            Precision(compute=head_compute(config, "cpu"), center_format=settings.center_format),
            memory_of(config),
            Kernels(fused=settings.fused, overlap=bool(settings.overlap)),
            sample_rate=settings.sample_rate,
            unit_centers=unit_centers,
            margin=margin,
            device="cpu" if on_cpu else None,
        )
        plan_of(config, machine).refuse(fused=settings.fused)
    except ValueError as error:
        yield f"{key}.{error}"
    weight = config.losses.inter_class.weight
    try:
        name = "losses.inter_class.weight"
        check_inter_class(weight, unit_centers=unit_centers, margin=margin, name=name)
    except ValueError as error:
        yield str(error)


def idle_negatives(head: "Head", key: str) -> Iterator[str]:
    """Yield what is wrong with negatives of a head, in a section, that always uses all centers."""
    if head.negatives != "uniform":
        yield (
            f'{key}.negatives = "{head.negatives}" with {key}.sample_rate = 1: every class center '
            "is in each step and stands for itself. Set a lower sample_rate, or remove negatives."
        )


def conflicts_of_copies(config: "Config", world_size: int) -> Iterator[str]:
    """Yield a line for each setting that does not go with several copies of the class centers."""
    for name, one in each_head(config).items():
        if copies_of(one, world_size) > 1:
            yield from _of_copies(one, section_of_head(name), world_size)


def _of_copies(config: "Config", key: str, world_size: int) -> Iterator[str]:
    copies = f"{key}.ranks_per_copy = {config.head.ranks_per_copy}"
    try:
        plan_of(config, None, world_size=world_size).refuse(fused=config.head.fused)
    except ValueError as error:
        yield f"{key}.{error}"
    if config.head.overlap:
        yield (
            f"{copies} with {key}.overlap = true: gradients of centers would go between copies "
            "beside those of the backbone, and ranks may not agree which is first. Remove one."
        )
    if (every := config.checkpoint.peers_every_steps) > 0:
        yield (
            f"{copies} with checkpoint.peers_every_steps = {every}: not supported together. Remove "
            "one."
        )


def memory_of(config: "Config") -> Memory:
    """Return what the head may keep, and where its rows lie."""
    return Memory(**config.head.model_dump(include={field.name for field in fields(Memory)}))


def may_share(config: "Config") -> bool:
    """Whether two sets of the head may have the same people unknown."""
    sets = config.data.by_set
    own = getattr(config.head, "sets", [*sets])
    return len(own) > 1 and any(sets[name].same_people == "unknown" for name in own if name in sets)


def plan_of(
    config: "Config", machine: Machine | None, positives: int = 1, *, world_size: int = 1
) -> Plan:
    """Return which code computes the head on so many ranks; ``machine`` is ``None`` if it is not
    known yet."""
    margin = config.head.margin.made(config.head.margin.definition)
    return decide(
        machine,
        dim=config.backbone.embedding_dim,
        unit_centers=margin.unit_centers,
        centers_per_identity=margin.centers_per_identity,
        binary=margin.binary,
        sgd=config.head.optimizer.name == "sgd",
        compute=head_compute(config, machine.device if machine else "cuda"),
        fused=config.head.fused,
        weighted=config.head.negatives != "uniform",
        sets=may_share(config),
        positives=positives,
        fp8=config.head.center_format == "fp8",
        copies=copies_of(config, world_size) > 1,
    )


def why_no_overlap(config: "Config", device: str, world_size: int) -> str | None:
    """Return why a head's centers are updated behind the backbone's backward on a type of device
    and so many ranks; ``None`` where they are updated beside it."""
    if config.head.overlap is not None:
        return None if config.head.overlap else "overlap = false"
    if device != "cuda":
        return "there is no GPU"
    if config.precision.compute == "fp16":
        return "fp16 knows after the backward only whether a step counts"
    if copies_of(config, world_size) > 1:
        return "gradients of centers go between copies"
    return None


def head_compute(config: "Config", device: str) -> Compute:
    """Return the precision of the head's matrix products on a type of device."""
    if config.head.compute != "auto":
        return config.head.compute
    if config.precision.compute == "bf16":
        return "bf16"
    return "tf32" if config.precision.tf32 and device == "cuda" else "fp32"
