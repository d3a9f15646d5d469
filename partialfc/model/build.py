"""From settings to the objects of a run: backbone, head, their optimizers, the loss scale."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc.backbones import build_backbone
from partialfc.backbones.timm_network import with_sync_batch_norm
from partialfc.config import Config, ConfigError
from partialfc.config.conflicts import head_compute, memory_of, why_no_overlap
from partialfc.config.heads import each_head, holders_of_heads, section_of_head
from partialfc.config.losses import OwnLoss
from partialfc.definitions.phrases import to_value
from partialfc.errors import in_words
from partialfc.head import Kernels, PartialFC, Precision
from partialfc.head.options import Sets
from partialfc.head.rows.rules import ROW_RULES, RowRule
from partialfc.head.sharding import GROWTH, default_canonical_shards
from partialfc.keyed import key
from partialfc.losses import LOSSES, Distillation
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from partialfc.margins import MARGINS, Margin
from partialfc.model.adapted import adapted, own_names, still_norms
from partialfc.model.average import Average
from partialfc.model.frozen import freeze
from partialfc.model.fsdp import Shards, shard
from partialfc.model.heads import Heads, Numbering
from partialfc.model.optimizer import build_optimizer
from partialfc.model.several import several_of
from partialfc.model.updates import ScheduleFree, ScheduleFreeMean
from partialfc.runtime.process import Runtime

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
"""Compute dtype of a backbone by ``precision.compute``."""

# Each rank keeps its own: model.batch_norm.mean_statistics. torch 2.13 renamed the option.
_BUFFERS_STAY_LOCAL: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


@dataclass(frozen=True, slots=True)
class Model:
    """What is trained, and what trains it.

    Attributes:
        backbone: The bare module; its parameters are the run's result.
        replica: The backbone as the ranks share it: its backward averages gradients over ranks.
        optimizer: Of the backbone.
        heads: Each with its own optimizer.
        losses: On the embeddings, beside the head's.
        own: Names of the backbone's tensors that checkpoints hold; ``None`` for all of them.
        average: Of the backbone's weights, which is what is measured; ``None`` without one.
        shards: This rank's rows of the backbone, where it is divided among the ranks.
        scaler: Loss scale of fp16; disabled otherwise.
        autocast: Compute dtype of the backbone, or ``None`` for fp32.
        channels_last: Memory format of the images.
        frozen: Modules of the backbone that stay in evaluation mode.
    """

    backbone: nn.Module
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    heads: Heads
    losses: EmbeddingLosses
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None
    channels_last: bool
    average: Average | ScheduleFreeMean | None = None
    own: frozenset[str] | None = None
    frozen: tuple[nn.Module, ...] = ()
    shards: Shards | None = None

    @property
    def head(self) -> PartialFC:
        """The head of a run that has one; ConfigError if it has several."""
        return self.heads.only

    def train(self) -> None:
        """Put the backbone into training mode, and what is frozen of it into evaluation mode."""
        self.backbone.train()
        for module in self.frozen:
            module.eval()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the backbone's by name, as the optimizer has them: plain, this rank's rows."""
        return dict(self.shards.own if self.shards else self.backbone.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Return the live parameters and buffers by name; of a divided one this rank's rows."""
        return {**self.backbone.state_dict(), **(self.shards.own if self.shards else {})}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Fill the backbone with tensors by name; of a divided one whole ones or this rank's rows.

        Raises:
            RuntimeError, ValueError: If one is missing, too many or of another shape.
        """
        if self.shards:
            self.shards.load(self.backbone, state)
        else:
            self.backbone.load_state_dict(dict(state), strict=self.own is None)

    def embed(self, images: Tensor, module: nn.Module | None = None) -> Tensor:
        """Return the embeddings [n, D] of images [n, 3, S, S], or of arrays, in the run's
        precision."""
        if self.shards and torch.is_inference_mode_enabled():
            # What is gathered into is kept, and training cannot write to tensors of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                return self.embed(images, module)
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            images.device.type,
            self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=self.shards is None,  # it would hold every weight that was gathered
        ):
            embeddings: Tensor = (module or self.replica)(images)
        return embeddings

    def measured(self) -> AbstractContextManager[None]:
        """Give the backbone the weights that are measured, and at the end its own again."""
        return self.average.in_use() if self.average else nullcontext()


def build(
    config: Config,
    runtime: Runtime,
    identities: int | Mapping[str, Numbering],
    *,
    kept_shards: Mapping[str, int] | None = None,
) -> Model:
    """Return the model of a run, on its device. Collective: DDP copies rank 0's weights to all.

    Args:
        config: Settings of the run.
        runtime: This rank.
        identities: Of the training images; of several heads how each numbers them.
        kept_shards: Canonical shards of each head in the checkpoint that it goes on from.

    Raises:
        ConfigError: If this machine cannot do what the settings ask of it.
    """
    backbone, kept = new_backbone(config), kept_shards or {}
    if isinstance(identities, int):
        identities = {"": Numbering((range(identities),))}
    holders = holders_of_heads(config, runtime.ranks.size)
    heads = {
        name: _head(
            one,
            runtime,
            identities[name].count,
            kept.get(name, 0),
            name,
            identities[name].sets,
            identities[name].most,
            holders[name],
        )
        for name, one in each_head(config).items()
    }
    model = assemble(config, runtime, backbone, Heads(heads, identities))
    if isinstance(model.replica, DistributedDataParallel):
        _arrange_buckets(model, config, runtime)
    return model


def new_backbone(config: Config) -> nn.Module:
    """Return the backbone that the settings ask for, freshly initialised.

    Raises:
        ConfigError: If it does not take what they say.
    """
    settings = config.backbone
    try:
        network = build_backbone(
            settings.name,
            embedding_dim=settings.embedding_dim,
            image_size=config.data.image_size,
            checkpoint_activations=settings.checkpoint_activations,
            **settings.options.model_dump(),
        )
    except ValueError as error:
        raise ConfigError(f"backbone.name = {to_value(settings.name)}: {error}") from error
    return adapted(network, settings.lora, config.data.image_size)


def _arrange_buckets(model: Model, config: Config, runtime: Runtime) -> None:
    """Take one backward of nothing, after which DDP arranges its buckets once and for all.

    Where a gradient lies in a bucket decides in which order more than two ranks sum it. Without
    this the first step of every start would sum in another order than all others, and a run that
    was interrupted would differ from one that was not in the last bits.
    """
    buffers = [*model.backbone.buffers()]
    before = [buffer.clone() for buffer in buffers]
    shares = config.shares(runtime.ranks.size).of_each(config.optimizer.accumulation)
    batch = shares.sizes[runtime.ranks.rank]
    images = torch.zeros(batch, *config.data.sample_shape, device=runtime.device)
    torch.autograd.backward(0.0 * model.embed(images).float().sum())
    model.optimizer.zero_grad()
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(old)


def assemble(
    config: Config, runtime: Runtime, backbone: nn.Module, head: PartialFC | Heads
) -> Model:
    """Return the model of any backbone and heads, as the settings share and optimize them."""
    if config.backbone.sync_batch_norm:
        if runtime.device.type == "cpu" and runtime.ranks.size > 1:
            raise ConfigError(
                "backbone.sync_batch_norm = true: torch synchronises BatchNorm on GPUs only. "
                "Remove it, or train on GPUs."
            )
        backbone = with_sync_batch_norm(backbone)
    divided = config.backbone.shard == "fsdp2" and runtime.ranks.size > 1
    if config.backbone.channels_last and not divided:  # FSDP2 gathers contiguous weights only
        backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone.to(runtime.device)
    frozen = freeze(backbone, config.backbone.freeze)
    frozen += still_norms(backbone, config.backbone.lora)
    if config.backbone.compile:
        # For the shape of its batches alone: what else it is given does not change its kernels.
        backbone.compile(dynamic=False)
    own = own_names(backbone, config.backbone.lora)
    replica: nn.Module = backbone
    shards = shard(config, backbone, runtime) if divided else None
    if runtime.ranks.size > 1 and not divided:
        replica = DistributedDataParallel(
            backbone,
            device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_BUFFERS_STAY_LOCAL,
        )
    optimizer = build_optimizer(config, backbone)
    if shards:
        shards.train_own(optimizer)
    parameters = shards.own if shards else dict(backbone.named_parameters())
    model = Model(
        backbone=backbone,
        replica=replica,
        optimizer=optimizer,
        heads=head if isinstance(head, Heads) else Heads({"": head}),
        losses=embedding_losses(config),
        scaler=torch.amp.GradScaler(
            runtime.device.type,
            init_scale=getattr(config.precision, "initial_loss_scale", 1.0),
            enabled=config.precision.compute == "fp16",
        ),
        autocast=AUTOCAST[config.precision.compute],
        channels_last=config.backbone.channels_last,
        average=_average(config, backbone, parameters, optimizer, own),
        own=own,
        frozen=frozen,
        shards=shards,
    )
    model.train()
    return model


def _average(
    config: Config,
    backbone: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    own: frozenset[str] | None,
) -> Average | ScheduleFreeMean | None:
    if isinstance(optimizer, ScheduleFree):
        return ScheduleFreeMean(optimizer, parameters)
    ema = config.backbone.ema
    return Average(backbone, parameters, ema, own) if ema else None


def margin_of(config: Config) -> Margin:
    """Return the margin that the settings ask for; a plug-in's is its own definition."""
    settings = config.head.margin
    kind: Any = MARGINS.get(settings.name, settings.definition)
    margin: Margin = settings.made(kind)
    return margin


def row_rule_of(config: Config) -> RowRule:
    """Return what the settings ask to be done to a row of the class centers."""
    settings = config.head.optimizer
    kind: Any = ROW_RULES.get(settings.name, settings.definition)
    rule: RowRule = settings.made(kind)
    return rule


def embedding_losses(config: Config) -> EmbeddingLosses:
    """Return those with a weight."""
    losses = {}
    own = {label: one.definition for label, one in config.losses if isinstance(one, OwnLoss)}
    kinds: dict[str, Any] = {**LOSSES, **own}
    for name, kind in kinds.items():
        settings = getattr(config.losses, name)
        if settings.weight:
            losses[name] = Weighted(settings.made(kind), settings.weight)
    teacher = config.losses.teacher
    if teacher.weight:
        losses["teacher"] = Weighted(teacher.made(Distillation), teacher.weight)
    return EmbeddingLosses(losses)


def seed_of(config: Config, head: str) -> int:
    """Return the seed of a head: that of the run, or one of its own for each of several."""
    return key(config.run.seed, f"head {head}") if head else config.run.seed


def _head(
    config: Config,
    runtime: Runtime,
    num_identities: int,
    kept_shards: int,
    name: str = "",
    sets: Sets | None = None,
    most: int | None = None,
    holders: range | None = None,
) -> PartialFC:
    """The head of a name, whose settings are ``config.head``."""
    settings = config.head
    room_to_grow = default_canonical_shards(
        num_identities, GROWTH * runtime.ranks.size, weighted_rate=settings.weighted_rate
    )
    margin = margin_of(config)
    positives = several_of(config, most, margin, embedding_losses(config))
    try:
        return PartialFC(
            num_identities,
            config.backbone.embedding_dim,
            margin,
            sample_rate=settings.sample_rate,
            negatives=settings.negatives_of,
            optimizer=row_rule_of(config),
            precision=Precision(
                compute=head_compute(config, runtime.device.type),
                center_format=settings.center_format,
                reduce_format=settings.reduce_format,
            ),
            memory=memory_of(config),
            kernels=Kernels(
                fused=settings.fused,
                overlap=why_no_overlap(config, runtime.device.type, runtime.ranks.size) is None,
            ),
            positives=positives,
            center_weight=config.losses.center.weight,
            inter_class_weight=config.losses.inter_class.weight,
            sets=sets,
            seed=seed_of(config, name),
            canonical_shards=settings.canonical_shards or kept_shards or room_to_grow,
            holders=holders,
            ranks_per_copy=settings.ranks_per_copy,
            device=runtime.device,
        )
    except ValueError as error:
        raise ConfigError(f"[{section_of_head(name)}] {error}") from error
    except (OSError, MemoryError) as error:
        raise ConfigError(
            f"[{section_of_head(name)}] {num_identities:,} identities: their class centers find no "
            f"memory here ({in_words(error)}). partialfc estimate says what they take."
        ) from error
