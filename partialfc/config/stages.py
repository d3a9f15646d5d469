"""Stages of a run: its settings with some of them changed, one stage after the other.

A stage holds what it changes, as the file has it. :func:`with_stage` puts that on top of the other
settings, and the whole is checked as the settings of a run are.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

from partialfc.config.conflicts import idle_negatives
from partialfc.config.file import checked
from partialfc.config.heads import each_head, section_of_head
from partialfc.config.schema import Section, tag_name
from partialfc.config.wider import wider
from partialfc.definitions import Range, Unit
from partialfc.definitions.phrases import to_value
from partialfc.errors import ConfigError

if TYPE_CHECKING:
    from partialfc.config.tree import Config

S = TypeVar("S", bound=Section)

_MAY_CHANGE = (
    "data",
    "head.sample_rate",
    "head.margin",
    "head.optimizer",
    "heads.NAME.weight",
    "losses",
    "optimizer",
    "schedule",
)
_MUST_STAY = (
    "data.bad_share",
    "head.optimizer.name",
    "head.optimizer.momentum_format",
    "optimizer.name",
)
"""Of what may change, what belongs to the whole run: its states go on."""
_MARGIN_STAYS = ("centers_per_identity", "bias")
"""What gives the matrix of the centers its size."""


class Stage(Section):
    """A part of the run with settings of its own, any number of them one after the other. Besides
    its name and its length a stage says what it changes: anything of data, head.sample_rate,
    head.margin, head.optimizer, losses, optimizer and schedule, as in head.sample_rate = 0.1 below
    [[stages]]. All else is what stands above the stages, not what the stage before has. A margin, a
    loss or a schedule of another name is stated whole. The learning rate warms up and falls within
    each stage; weights, momenta and averages go on; images begin a new epoch."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=40)]
    """What the stage is called in messages, records and the report."""

    epochs: Annotated[float | None, Range(gt=0), Unit("epochs")] = None
    """Length of the stage in passes over its data. run.epochs and run.steps are left out."""

    steps: Annotated[int | None, Range(ge=1), Unit("steps")] = None
    """Length of the stage in optimizer steps, instead of epochs."""

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes, by section."""
        return dict(self.model_extra or {})


def _read(entries: object) -> object:
    """Make the stages of a file's tables, so that a mistake in one is told with its name.

    Raises:
        ValueError: With a line for each.
    """
    if not isinstance(entries, list | tuple) or not all(
        isinstance(entry, Mapping | Stage) for entry in entries
    ):
        raise ValueError('stages: write each below a line [[stages]], as in name = "full".')
    stages: list[Stage] = []
    problems = []
    for number, entry in enumerate(entries, 1):
        values = entry.model_dump(exclude_none=True) if isinstance(entry, Stage) else entry
        name = values.get("name", number)
        stage, wrong = checked(Stage, values)
        if stage is not None and (stage.steps is None) == (stage.epochs is None):
            wrong.append(
                f"steps = {stage.steps} with epochs = {stage.epochs}: one of the two sets the "
                "length of a stage."
            )
        problems += [f"stages.{name}.{line}" for line in wrong]
        if stage is not None:
            if stage.name in [one.name for one in stages]:
                problems.append(f"stages.{name}: two stages have this name. Rename one.")
            stages.append(stage)
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(stages)


Stages = Annotated[tuple[Stage, ...], BeforeValidator(_read)]


def resolved(config: "Config", schema: type["Config"]) -> tuple[list["Config"], list[str]]:
    """Return the settings of each stage, as those of a run of its own, and what is wrong with them.

    Args:
        config: Settings of a run with stages.
        schema: Of a run, without what any settings name besides.
    """
    found, problems = [], []
    for stage in config.stages:
        wrong = [*_refused(stage.changes)]
        one = None
        if not wrong:
            one, wrong = _checked(schema, with_stage(config, stage))
        if one is not None:
            wrong += _differing(config, one)
            found.append(one)
        problems += [f"stages.{stage.name}: {line}" for line in wrong]
    if not problems:
        for name, whole in each_head(config).items():
            if all(each_head(one)[name].head.sample_rate == 1 for one in found):
                problems += idle_negatives(whole.head, section_of_head(name))
    return found, problems


def with_stage(config: "Config", stage: Stage) -> dict[str, Any]:
    """Return the settings of a run with those of a stage on top, as a file has them.

    A stage that uses all centers has no negatives that stand for others, which another may have.
    """
    values = _on_top(config, stage.changes)
    del values["stages"]
    for head in (values["head"], *values["heads"].values()):
        if isinstance(head, dict) and head.get("sample_rate") == 1:
            head.pop("negatives", None)
            head.pop("nearest", None)
    length = stage.model_dump(include={"steps", "epochs"}, exclude_none=True)
    return {**values, "run": {**values["run"], **length}}


def as_checked(stage: Stage, config: "Config") -> Stage:
    """Return a stage with its values as the settings took them: paths absolute."""
    values = config.model_dump(mode="json")
    own = stage.model_dump(exclude=set(stage.changes), exclude_none=True)
    return Stage(**own, **_picked(stage.changes, values))


def keys_of(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested settings."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _on_top(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    values = section.model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        inner = getattr(section, key, None)
        if not (isinstance(inner, Section) and isinstance(value, Mapping)):
            values[key] = value
            continue
        tag = tag_name(type(section).model_fields[key])
        other = bool(tag) and value.get(tag, getattr(inner, tag)) != getattr(inner, tag)
        left_out = value.get("weight") == 0  # of a loss: what else is said of it has no effect
        values[key] = dict(value) if other or left_out else _on_top(inner, value)
    return values


def _picked(changes: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, change in changes.items():
        value = values[key]
        inside = isinstance(change, Mapping) and change.keys() <= value.keys()
        found[key] = _picked(change, value) if inside else value
    return found


def _refused(changes: Mapping[str, Any]) -> Iterator[str]:
    """What no stage may change, by name."""
    for key in keys_of(changes):
        kind, _, rest = key.partition(".")
        of_one = f"head.{rest.partition('.')[2]}" if kind == "heads" else key
        of_all = f"heads.NAME.{rest.partition('.')[2]}" if kind == "heads" else key
        if not any(
            f"{one}.".startswith(f"{may}.") for one in (of_one, of_all) for may in _MAY_CHANGE
        ):
            yield (
                f"{key} belongs to the whole run. A stage may change {', '.join(_MAY_CHANGE)}. Set "
                "it above the stages."
            )


def _checked(schema: type[S], values: Mapping[str, Any]) -> tuple[S | None, list[str]]:
    try:
        return checked(wider(schema, values), values)
    except ConfigError as error:
        return None, str(error).splitlines()


def _differing(whole: "Config", stage: "Config") -> Iterator[str]:
    """What a stage may not have otherwise than the run, though it may change what is beside it."""
    for name, one in each_head(stage).items():
        before = each_head(whole)[name]
        for key in _MUST_STAY:
            ours, theirs = _at(before, key), _at(one, key)
            if theirs not in (None, ours):
                yield (
                    f"{_key_in(name, key)} = {to_value(theirs)}: it belongs to the whole run, "
                    f"where it is {to_value(ours)}. Set it above the stages."
                )
        if any(_margin(before, size) != _margin(one, size) for size in _MARGIN_STAYS):
            yield (
                f"{_key_in(name, 'head.margin.name')} = {to_value(one.head.margin.name)}: its "
                "class centers have another size than those of "
                f"{to_value(before.head.margin.name)}."
            )


def _key_in(head: str, key: str) -> str:
    """The key as the file has it, where there are several heads."""
    return key.replace("head.", f"heads.{head}.", 1) if head and key.startswith("head.") else key


def _margin(config: "Config", name: str) -> Any:
    margin = config.head.margin
    return getattr(margin.made(margin.definition), name)


def _at(config: Section, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value
