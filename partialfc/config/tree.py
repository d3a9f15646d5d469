"""Every setting of a run: its type, range, unit, default and meaning.

A settings file is TOML; ``load`` puts command-line overrides on top. The defaults are those of an
iresnet50 with ArcFace on GPUs; only ``data.train`` has none. Paths are relative to the current
directory, and ``~`` is expanded.
"""

import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ModelWrapValidatorHandler, create_model, model_validator

from partialfc.config import schema as settings
from partialfc.config.backbone import Backbone
from partialfc.config.conflicts import conflicts, conflicts_of_copies
from partialfc.config.data import Data
from partialfc.config.earlier import without_idle
from partialfc.config.file import load_settings
from partialfc.config.head import STARTS, Head
from partialfc.config.heads import Heads, HeadsInHelp, bad_copies, few_images, few_shards
from partialfc.config.losses import Losses
from partialfc.config.monitor import Monitor
from partialfc.config.optimizers import (
    AnyOfBackbone,
    Cosine,
    Linear,
    Polynomial,
    SgdOfBackbone,
    Wsd,
)
from partialfc.config.precision import AnyPrecision, Bf16
from partialfc.config.run import Checkpoint, EverySteps, Log, Run
from partialfc.config.schema import Section, UserPath, nearest_multiples
from partialfc.config.stages import Stages, as_checked, resolved, with_stage
from partialfc.config.wider import wider
from partialfc.definitions import Range, Unit, plugins
from partialfc.distributed.shares import Shares
from partialfc.errors import ConfigError

__all__ = ["Config", "ConfigError", "config_hash", "help_text", "load", "to_toml"]


class Verification(Section):
    """Accuracy on held-out sets, measured during the run and at its end."""

    pairs: tuple[UserPath, ...] = Field(default=(), strict=False)
    """Verification sets: .bin files of image pairs, as LFW, CFP-FP and AgeDB are shipped."""

    identification: tuple[UserPath, ...] = Field(default=(), strict=False)
    """Identification sets: .rec packs whose first image per identity is the gallery and whose
    other images are probes. With data.kind = "arrays" .npy files, with .labels.npy beside each."""

    every_steps: EverySteps = 0
    """Steps between measurements. 0 measures at the end only."""

    flip: bool = True
    """Add to every embedding that of the mirrored image, as the field does for faces. With
    data.kind = "arrays" it is false."""

    batch: Annotated[int, Range(ge=1), Unit("images")] = 256
    """Images that each rank decodes ahead. Does not change the result."""

    @model_validator(mode="after")
    def _sets_have_names(self) -> "Verification":
        for name in ("pairs", "identification"):
            paths: tuple[Path, ...] = getattr(self, name)
            stems = [path.stem for path in paths]
            again = [path for at, path in enumerate(paths) if path.stem in stems[:at]]
            if again:
                raise ValueError(
                    f'{name} = "{again[0]}": another set is called {again[0].stem} too, and '
                    "results go by the name of the file. Rename one."
                )
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
    heads: Heads = Field(default_factory=Heads)
    losses: Losses = Field(default_factory=Losses)
    optimizer: AnyOfBackbone = Field(default_factory=SgdOfBackbone)
    schedule: Annotated[Linear | Polynomial | Cosine | Wsd, Field(discriminator="name")] = Field(
        default_factory=Linear
    )
    verification: Verification = Field(default_factory=Verification)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    log: Log = Field(default_factory=Log)
    monitor: Monitor = Field(default_factory=Monitor)

    stages: Stages = Field(default=(), exclude_if=lambda stages: not stages)
    """Parts of the run with settings of their own."""

    def __new__(cls, **values: Any) -> Self:
        """Make one of the schema for what the values name, as a file's settings are."""
        schema = wider(cls, values) if cls is Config else cls
        return super().__new__(schema)

    @model_validator(mode="wrap")
    @classmethod
    def _with_what_it_names(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        schema = wider(cls, values) if cls is Config and isinstance(values, dict) else cls
        return check(values) if schema is cls else schema.model_validate(values)

    @model_validator(mode="before")
    @classmethod
    def _stages_replace_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("stages"):
            run = values.get("run", {})
            return {**values, "run": {"epochs": None, **run} if isinstance(run, dict) else run}
        return values

    @model_validator(mode="before")
    @classmethod
    def _arrays_are_not_mirrored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        data, measured = (values.get(key, {}) for key in ("data", "verification"))
        if isinstance(data, dict) and data.get("kind") == "arrays" and isinstance(measured, dict):
            return {**values, "verification": {"flip": False, **measured}}
        return values

    @model_validator(mode="after")
    def _goes_together(self) -> "Config":
        problems = list(conflicts(self))
        if self.stages and not problems:
            found, problems = resolved(self, Config)
            if not problems:  # the values as they were taken, in place, as pydantic wants it
                pairs = zip(self.stages, found, strict=True)
                self.__dict__["stages"] = tuple(as_checked(*pair) for pair in pairs)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def in_stages(self) -> tuple["Config", ...]:
        """Return the settings of each stage as those of a run, in turn; without stages, these."""
        if not self.stages:
            return (self,)
        return tuple(Config.model_validate(with_stage(self, stage)) for stage in self.stages)

    def at(self, facts: Mapping[str, Any]) -> "Config":
        """Return the settings that a checkpoint was written with.

        Args:
            facts: Of its manifest.

        Raises:
            ConfigError: If it is of a stage that there is not.
        """
        stages, fact = self.in_stages(), facts.get(STAGE)
        number = fact.get("number") if isinstance(fact, dict) else 1
        if not isinstance(number, int) or not 1 <= number <= len(stages):
            raise ConfigError(
                f"the checkpoint is of stage {number}, and these settings have {len(self.stages)}."
            )
        return stages[number - 1]

    def shares(self, world_size: int) -> Shares:
        """Return how many images of a step each rank has."""
        return Shares.of(self.data.global_batch, world_size, self.optimizer.accumulation)

    def uneven_shares(self, world_size: int) -> Shares | None:
        """Return :meth:`shares` where they differ; ``None`` where all have as many."""
        shares = self.shares(world_size)
        return None if shares.equal else shares

    def check(self, world_size: int) -> None:
        """Check what depends on the number of ranks, in every stage.

        Raises:
            ConfigError: If the global batch or the class centers cannot be divided among them.
        """
        problems = [
            f"stages.{stage.name}: {line}"
            for stage, config in zip(self.stages, self.in_stages(), strict=False)
            for line in config._wrong_on(world_size)
        ]
        if problems := problems or ([] if self.stages else self._wrong_on(world_size)):
            raise ConfigError("\n".join(problems))

    def _wrong_on(self, world_size: int) -> list[str]:
        problems = []
        batch, accumulation = self.data.global_batch, self.optimizer.accumulation
        parts = world_size * accumulation
        fewest, uneven = divmod(batch, parts)
        if uneven and not (self.data.uneven and fewest):
            nearest = nearest_multiples(batch, parts)
            problems.append(
                f"data.global_batch = {batch}: must divide by ranks x optimizer.accumulation = "
                f"{world_size} x {accumulation} = {parts}. Nearest: {nearest}."
                + (" Or set data.uneven = true: ranks may have one image more." if fewest else "")
            )
        elif fewest == 1 and not (self.backbone.sync_batch_norm and world_size > 1):
            problems.append(
                f"data.global_batch = {batch}: one image for each rank and micro-batch, and "
                f"BatchNorm takes its statistics over at least 2. Use {2 * parts} or more."
            )
        repeated = self.data.images_per_identity or 1
        losses = self.losses
        teacher = losses.teacher.weight if losses.teacher.form == "margin" else 0
        pairs = losses.triplet.weight or losses.contrastive.weight or teacher
        own = self.shares(world_size).of_each(accumulation).sizes
        if pairs and not problems and any(size % repeated for size in own):
            problems.append(
                f"data.images_per_identity = {repeated}: must divide the {own[0]} images "
                f"of a rank's micro-batch ({batch} / {world_size} ranks / optimizer.accumulation "
                f"{accumulation}), or losses that compare pairs of one identity lose some."
            )
        problems += few_shards(self, world_size)
        problems += conflicts_of_copies(self, world_size)
        return problems or [*few_images(self, world_size), *bad_copies(self, world_size)]


STAGE = "stage"
"""The fact of a checkpoint that says of which stage it is; one of the first has none."""

_HOW_A_HEAD_COMPUTES = {
    "keep_mib",
    "fused",
    "overlap",
    "centers_in",
    "states_in",
    "host_folder",
    "ranks_per_copy",
}
_CHANGES_NO_RESULT: dict[str, Any] = {
    "run": {
        "folder",
        "threads",
        "resume",
        "resume_from",
        "fruitless_starts",
        "hang_seconds",
        "preflight",
        "plugins",
    },
    "losses": {"teacher": {"from"}},  # its digest stands for its place
    # The data's fingerprint stands for its paths, and a fact of checkpoints for the sets.
    "data": {
        "train",
        "skip",
        "labels",
        "label_weights",
        "identities",
        "bad_share",
        "threads",
        "prefetch",
        "uneven",
        "sets",
    },
    "backbone": {"shard", "reshard", "offload"},
    "verification": True,
    "checkpoint": True,
    "log": True,
    "monitor": True,
    "head": _HOW_A_HEAD_COMPUTES,
}


def _results_of(config: Config) -> dict[str, Any]:
    """The settings that may change a result; as before there were heads, if there is one."""
    heads = {name: _HOW_A_HEAD_COMPUTES for name, _ in config.heads}
    exclude = {**_CHANGES_NO_RESULT, "heads": heads or True}
    results = config.model_dump(mode="json", exclude=exclude)
    for head in (results["head"], *results.get("heads", {}).values()):
        if "start" in head and head["start"] not in STARTS:  # a file counts in a new run only
            head["start"] = STARTS[0]
    return results


def load(path: str | Path, overrides: Sequence[str] = (), *, own: bool = True) -> Config:
    """Return the settings of a run from a TOML file and ``key.sub=value`` overrides.

    The config.toml in a run's folder means that folder, wherever it was moved or copied; what it
    says of ``run.folder`` does not count, an override does.

    Args:
        path: TOML file.
        overrides: See :func:`partialfc.config.file.load_settings`.
        own: Whether they are the user's own settings: the plug-ins that they name are then
            imported. Those that a run wrote may name what is loaded already only; what did
            nothing, and is refused now, is left out.

    Raises:
        ConfigError: With every problem found; see :func:`partialfc.config.file.load_settings`.
    """

    def with_plugins(schema: type[Config], settings: Mapping[str, Any]) -> type[Config]:
        if own:
            plugins.load(plugins.named_in(settings))
        plugins.refuse_strangers(settings)
        return wider(schema, settings)

    amend = dict if own else without_idle
    config = load_settings(Config, path, overrides, wider=with_plugins, amend=amend)
    home = Path(path).absolute().parent
    chosen = any(key.split("=")[0].strip() in ("run", "run.folder") for key in overrides)
    if chosen or Path(path).name != "config.toml" or not _holds_run(home):
        return config
    if config.run.folder.resolve() != home.resolve():
        print(
            f"{path}: run.folder is the folder that it lies in, no longer {config.run.folder}.",
            file=sys.stderr,
        )
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": home})})
    return config


def _holds_run(folder: Path) -> bool:
    """Whether a run has written there: it wrote the config.toml, too."""
    return (folder / "ledger.jsonl").exists() or any(folder.glob("checkpoints/step_*"))


def written(text: str) -> Config | None:
    """Return the settings that a checkpoint keeps; ``None`` for those of another version."""
    try:
        return Config.model_validate(without_idle(tomllib.loads(text)))
    except (ValueError, RecursionError):
        return None


def changes(before: Config, after: Config) -> list[str]:
    """Return "key = value, was value" for each setting that may change a result."""
    old, new = (flat(_results_of(one)) for one in (before, after))
    return [
        f"{key} = {json.dumps(new.get(key))}, was {json.dumps(old.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def to_toml(config: Config) -> str:
    """Return the resolved settings as TOML that loads back equal."""
    return settings.to_toml(config, without="head" if dict(config.heads) else "")


_EXAMPLE = {"data": {"train": "train.rec", "sets": {"NAME": {}}}}
"""Settings that name all sections whose names are free."""


def help_text(width: int = 100) -> str:
    """Return every setting with its default, type, range, unit and meaning, ``width`` wide."""
    named: Any = {"heads": (HeadsInHelp, ...)}  # what they share with [head] is there
    schema = create_model("Config", __base__=wider(Config, _EXAMPLE), **named)
    return settings.help_text(schema, width)


def config_hash(config: Config) -> str:
    """Return 16 hex digits that are the same for the same training, wherever and when it runs.

    Settings that change no result are left out: paths, CPU threads, verification, checkpoints, log.
    """
    values = _results_of(config)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
