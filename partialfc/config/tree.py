"""Every setting of a run: its type, range, unit, default and meaning.

A settings file is TOML; ``load`` puts command-line overrides on top. The defaults are those of an
iresnet50 with ArcFace on GPUs; only ``data.train`` has none. Paths are relative to the current
directory, and ``~`` is expanded.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from partialfc.config import schema as settings
from partialfc.config.augment import Augment
from partialfc.config.file import load_settings
from partialfc.config.losses import Losses
from partialfc.config.margins import AnyMargin, ArcFace
from partialfc.config.monitor import Monitor
from partialfc.config.optimizers import (
    AdagradOfCenters,
    AdamWOfBackbone,
    AdamWOfCenters,
    Cosine,
    Linear,
    Polynomial,
    SgdOfBackbone,
    SgdOfCenters,
)
from partialfc.config.run import Checkpoint, EverySteps, Log, Run
from partialfc.config.schema import OneOrMore, Section, Unit, UserPath
from partialfc.errors import ConfigError

__all__ = ["Config", "ConfigError", "config_hash", "help_text", "load", "to_toml"]


class Data(Section):
    """The training images and how they reach the backbone."""

    train: Annotated[tuple[UserPath, ...], OneOrMore, Field(strict=False, min_length=1)]
    """The pack to train on, a .rec file with its .idx beside it; or a folder with a folder of
    images for each identity, or a list of lines path<TAB>identity. Of several, one after the other,
    the identities of each follow those of the ones before it."""

    skip: Annotated[tuple[UserPath, ...], OneOrMore] = Field(default=(), strict=False)
    """Lists of images to leave out, as ``partialfc validate --bad`` and training write them."""

    loader: Literal["auto", "dali", "torch"] = "auto"
    """What decodes and augments. ``auto`` is DALI where it is installed, otherwise torch; both
    make the same batches."""

    global_batch: Annotated[int, Field(ge=1), Unit("images")] = 1024
    """Images per optimizer step over all ranks. Must divide by ranks x ``optimizer.accumulation``,
    and decides the result, so keep it when the number of ranks changes."""

    image_size: Annotated[int, Field(ge=32, le=1024), Unit("pixels")] = 112
    """Side of the square images that the backbone receives."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that an image is mirrored. 0 never, 1 always."""

    shift: Annotated[int, Field(ge=0, le=16), Unit("pixels")] = 0
    """Largest random shift of an image along each axis; its outermost pixels fill the border. 0
    turns it off."""

    augment: Augment = Field(default_factory=Augment)

    last_batch: Literal["drop", "pad"] = "drop"
    """What happens to the images left over after an epoch's last full global batch: ``drop``
    leaves them out of this epoch, ``pad`` fills the batch with the epoch's first images."""

    images_per_identity: Annotated[int | None, Field(ge=1), Unit("images")] = None
    """Make every batch of identities drawn alike, with this many images of each (P x K), for losses
    that compare images. Must divide ``data.global_batch``. An epoch is then every identity once.
    Left out, all images are shuffled."""

    block: Annotated[int | None, Field(ge=1), Unit("images")] = None
    """For slow storage: shuffle blocks of this many neighbouring images, and within a window of
    blocks the images. Left out, every image is read from anywhere."""

    block_window: Annotated[int, Field(ge=1), Unit("blocks")] = 16
    """Blocks whose images are shuffled together."""

    bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Largest share of the images that may be replaced because they cannot be decoded. Each is
    reported, and the next image of the epoch stands for it. Above 0, one always may be."""

    threads: Annotated[int, Field(ge=1), Unit("threads")] = 4
    """Decoding threads per rank."""

    prefetch: Annotated[int, Field(ge=1), Unit("batches")] = 2
    """Batches prepared ahead on each rank. More of them ride out a slow disk and cost memory."""

    @model_validator(mode="after")
    def _one_arrangement(self) -> "Data":
        if self.block is not None and self.images_per_identity is not None:
            raise ValueError(
                f"block = {self.block} with data.images_per_identity = "
                f"{self.images_per_identity}: an epoch has one arrangement. Remove one of the two."
            )
        default = type(self).model_fields["block_window"].default
        if self.block is None and self.block_window != default:
            raise ValueError(
                f"block_window = {self.block_window}: there are no blocks. Set data.block, or "
                "remove block_window."
            )
        return self


class Backbone(Section):
    """The network from image to embedding."""

    name: str = "iresnet50"
    """Which backbone."""

    embedding_dim: Annotated[int, Field(ge=1, le=4096)] = 512
    """Length of an embedding and of a class center."""

    channels_last: bool = True
    """Keep images in NHWC memory, which tensor cores prefer. Changes rounding only."""

    compile: bool = False
    """Compile the backbone with torch.compile: a slow first step, faster ones after it."""

    checkpoint_activations: bool = False
    """Recompute activations in backward: less memory, about a third more computation."""

    sync_batch_norm: bool = False
    """Take BatchNorm statistics over the images of all ranks. Without it they depend on the batch
    per rank, and so on the number of ranks."""


class Precision(Section):
    """Number formats of the backbone; ``head.compute`` has those of the head. Sums, the softmax and
    the backbone's weights are fp32 in every case."""

    compute: str
    """Autocast format of the backbone: bf16, fp32 or fp16."""

    tf32: bool = False
    """Let the remaining fp32 matrix products on a GPU run in TF32: faster, 10-bit mantissa."""


class Bf16(Precision):
    """bf16 needs no loss scale. Needs Ampere or newer to be fast."""

    compute: Literal["bf16"] = "bf16"
    """Autocast format of the backbone."""


class Fp32(Precision):
    """fp32 throughout, without autocast."""

    compute: Literal["fp32"] = "fp32"
    """Autocast format of the backbone."""


class Fp16(Precision):
    """fp16 with a dynamic loss scale, as arcface_torch trains."""

    compute: Literal["fp16"] = "fp16"
    """Autocast format of the backbone."""

    initial_loss_scale: Annotated[float, Field(gt=0, le=2.0**32)] = 65536.0
    """Loss scale of the first step. It halves after an overflow, whose step is skipped, and
    doubles after a long run without one."""


AnyPrecision = Annotated[Bf16 | Fp32 | Fp16, Field(discriminator="compute")]


class Head(Section):
    """The class centers, one per identity, and the softmax over them."""

    sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the class centers used per step, the batch's own included. 1 uses all."""

    canonical_shards: Annotated[int | None, Field(ge=1)] = None
    """Units that negatives are sampled from and centers are moved in; at least the largest number
    of ranks that the run will ever have. Left out, it follows from the number of identities."""

    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Format of the head's matrix products. ``auto`` is bf16 where ``precision.compute`` is,
    otherwise fp32, or tf32 on a GPU with ``precision.tf32``."""

    center_format: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How class centers are stored. ``fp16`` has a scale per center and is the better one of 16
    bits; both are rounded stochastically."""

    keep_mib: Annotated[int | None, Field(ge=0), Unit("MiB")] = None
    """Most memory per rank that spares the second pass of the head a matrix product. The result is
    the same, for logits above 64 or with fused to rounding. Left out: 256 on a CPU, 2048 on a
    GPU."""

    centers_in: Literal["device", "host"] = "device"
    """Where class centers lie between steps. ``host`` is the machine's memory, from which a step's
    rows travel to the device and back: for more identities than the device has room for. Changes no
    result."""

    states_in: Literal["device", "host"] = "device"
    """Where the optimizer's states of the centers lie, as ``centers_in``. Changes no result."""

    host_folder: UserPath | None = None
    """Where what is in ``host`` is mapped from files, which vanish with the process, for more than
    the memory holds: a folder on a fast local disk. Left out, it is in memory."""

    fused: bool = False
    """Do each pass of the head in one kernel: on Hopper, in bf16, with SGD and a softmax over unit
    centers, one an identity. Changes the result by rounding alone."""

    overlap: bool = False
    """On a GPU, update the centers while the backbone's backward runs. Then a gradient of the
    backbone that is not finite stops the run after the centers have moved in memory; nothing of
    that step is saved."""

    margin: AnyMargin = Field(default_factory=ArcFace)
    optimizer: Annotated[
        SgdOfCenters | AdamWOfCenters | AdagradOfCenters, Field(discriminator="name")
    ] = Field(default_factory=SgdOfCenters)

    @model_validator(mode="after")
    def _host_is_used(self) -> "Head":
        if self.host_folder is not None and "host" not in (self.centers_in, self.states_in):
            raise ValueError(
                f'host_folder = "{self.host_folder}": nothing lies in host memory. Set centers_in '
                'or states_in to "host", or remove host_folder.'
            )
        return self


class Verification(Section):
    """Accuracy on held-out sets, measured during the run and at its end."""

    pairs: tuple[UserPath, ...] = Field(default=(), strict=False)
    """Verification sets: .bin files of image pairs, as LFW, CFP-FP and AgeDB are shipped."""

    identification: tuple[UserPath, ...] = Field(default=(), strict=False)
    """Identification sets: .rec packs whose first image per identity is the gallery and whose
    other images are probes."""

    every_steps: EverySteps = 0
    """Steps between measurements. 0 measures at the end only."""

    flip: bool = True
    """Add to every embedding that of the mirrored image, as the field does for faces."""

    batch: Annotated[int, Field(ge=1), Unit("images")] = 256
    """Images that each rank decodes ahead. Does not change the result."""

    @model_validator(mode="after")
    def _has_sets(self) -> "Verification":
        if self.every_steps and not self.pairs and not self.identification:
            raise ValueError(
                f"every_steps = {self.every_steps}: there is no set to measure. List files in "
                "verification.pairs or verification.identification, or remove every_steps."
            )
        return self


class Config(Section):
    """All settings of a run."""

    run: Run = Field(default_factory=Run)
    data: Data
    backbone: Backbone = Field(default_factory=Backbone)
    precision: AnyPrecision = Field(default_factory=Bf16)
    head: Head = Field(default_factory=Head)
    losses: Losses = Field(default_factory=Losses)
    optimizer: Annotated[SgdOfBackbone | AdamWOfBackbone, Field(discriminator="name")] = Field(
        default_factory=SgdOfBackbone
    )
    schedule: Annotated[Linear | Polynomial | Cosine, Field(discriminator="name")] = Field(
        default_factory=Linear
    )
    verification: Verification = Field(default_factory=Verification)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    log: Log = Field(default_factory=Log)
    monitor: Monitor = Field(default_factory=Monitor)

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Config":
        if self.run.steps is not None and self.schedule.warmup_steps >= self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps}: must be fewer than "
                f"run.steps = {self.run.steps}, or the warm-up never ends."
            )
        return self

    @model_validator(mode="after")
    def _overlap_has_no_loss_scale(self) -> "Config":
        if self.head.overlap and self.precision.compute == "fp16":
            raise ValueError(
                'head.overlap = true with precision.compute = "fp16": whether a step with a loss '
                "scale counts is known after the backbone's backward only. Use bf16, or remove "
                "head.overlap."
            )
        return self

    def check(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: If the global batch or the class centers cannot be divided among them.
        """
        problems = []
        batch, accumulation = self.data.global_batch, self.optimizer.accumulation
        parts = world_size * accumulation
        if batch % parts:
            below = batch // parts * parts
            nearest = " or ".join(str(n) for n in (below, below + parts) if n)
            problems.append(
                f"data.global_batch = {batch}: must divide by ranks x optimizer.accumulation = "
                f"{world_size} x {accumulation} = {parts}. Nearest: {nearest}."
            )
        repeated = self.data.images_per_identity or 1
        pairs = self.losses.triplet.weight or self.losses.contrastive.weight
        if pairs and not batch % parts and batch // parts % repeated:
            problems.append(
                f"data.images_per_identity = {repeated}: must divide the {batch // parts} images "
                f"of a rank's micro-batch ({batch} / {world_size} ranks / optimizer.accumulation "
                f"{accumulation}), or losses.triplet and losses.contrastive lose pairs."
            )
        shards = self.head.canonical_shards
        if shards is not None and shards < world_size:
            problems.append(
                f"head.canonical_shards = {shards}: must be at least the number of ranks, "
                f"{world_size}. Leave it out, or set the largest number the run will ever have."
            )
        if problems:
            raise ConfigError("\n".join(problems))


_CHANGES_NO_RESULT: dict[str, Any] = {
    "run": {
        "folder",
        "threads",
        "resume",
        "resume_from",
        "fruitless_starts",
        "hang_seconds",
        "preflight",
    },
    # The data's fingerprint stands for its paths.
    "data": {"train", "skip", "bad_share", "threads", "prefetch"},
    "verification": True,
    "checkpoint": True,
    "log": True,
    "monitor": True,
    "head": {"keep_mib", "fused", "overlap", "centers_in", "states_in", "host_folder"},
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of a run from a TOML file and ``key.sub=value`` overrides.

    Raises:
        ConfigError: With every problem found; see :func:`partialfc.config.file.load_settings`.
    """
    return load_settings(Config, path, overrides)


def to_toml(config: Config) -> str:
    """Return the resolved settings as TOML that loads back equal."""
    return settings.to_toml(config)


def help_text(width: int = 100) -> str:
    """Return every setting with its default, type, range, unit and meaning, ``width`` wide."""
    return settings.help_text(Config, width)


def config_hash(config: Config) -> str:
    """Return 16 hex digits that are the same for the same training, wherever and when it runs.

    Settings that change no result are left out: paths, CPU threads, verification, checkpoints, log.
    """
    values = config.model_dump(mode="json", exclude=_CHANGES_NO_RESULT)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
