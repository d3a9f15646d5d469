"""What a user chooses, each said once: name, type, range, unit, default and meaning.

A definition is a frozen dataclass that needs neither torch nor pydantic. The mathematics inherits
from it, the settings file has a section of it, and ``--help`` shows the docstrings of its fields.
A number's range and unit stand in its type: ``Annotated[float, Range(ge=0), Unit("radians")]``.
"""

import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, dataclass_transform

from partialfc.definitions.phrases import rule, to_value, unit_of, with_article


@dataclass(frozen=True, slots=True)
class Unit:
    """Unit of a number, for help and messages: ``Annotated[int, Unit("images")]``."""

    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bounds of a number, each ``None`` for no bound: ``Annotated[float, Range(ge=0, lt=1)]``."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    # How a type tells pydantic its bounds: the protocol of the package annotated_types.
    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    def __iter__(self) -> Iterator[object]:
        import annotated_types

        for name in ("gt", "ge", "lt", "le"):
            if getattr(self, name) is not None:
                yield getattr(annotated_types, name.title())(getattr(self, name))


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Definition:
    """A named set of choices; a subclass is a frozen dataclass of its own.

    Raises:
        ValueError: If a value is outside its range, or does not go with another.
    """

    takes: ClassVar[Mapping[str, Any]] = {}
    """The type of every field, with range and unit, by name in order."""

    def __init_subclass__(cls) -> None:
        if "__dataclass_fields__" not in cls.__dict__:  # a dataclass with slots is made twice
            dataclass(frozen=True, kw_only=True)(cls)
            for name in ("__setattr__", "__delattr__"):
                delattr(cls, name)  # Definition's do the same, and leave room for a decorator's
        hints = typing.get_type_hints(cls, include_extras=True)
        cls.takes = {field.name: hints[field.name] for field in fields(cls)}

    def __post_init__(self) -> None:
        for name, annotation in self.takes.items():
            value = getattr(self, name)
            if not fits(value, annotation):
                raise ValueError(
                    f"{name} = {to_value(value)}: must be {with_article(rule(annotation))}. "
                    f"{_remedy(name, value, annotation, getattr(type(self), name, MISSING))}"
                )
        if problem := self.conflict():
            raise ValueError(problem)

    def conflict(self) -> str | None:
        """Return what does not go together, key first, and a remedy; ``None`` if all does.

        A subclass asks the class above it too.
        """
        return None


def _refuse(self: Definition, name: str, *value: object) -> None:
    raise FrozenInstanceError(f"{name} of {type(self).__name__} cannot be changed")


Definition.__setattr__ = Definition.__delattr__ = _refuse  # type: ignore[method-assign,assignment]


def fits(value: Any, annotation: Any, metadata: Iterable[object] = ()) -> bool:
    """Return whether a value is of a type and in its range."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0], arguments[1:])
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        every = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(every) and all(map(fits, value, every))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option, metadata) for option in arguments)
    if annotation not in (int, float):
        return not isinstance(annotation, type) or isinstance(value, annotation)
    if isinstance(value, bool):  # Python counts it among the integers
        return False
    number = numbers.Integral if annotation is int else numbers.Real
    ranges = [entry for entry in metadata if isinstance(entry, Range)] or [Range()]
    return isinstance(value, number) and all(value in one for one in ranges)


def _remedy(name: str, value: Any, annotation: Any, default: object) -> str:
    if unit_of(annotation) == "radians" and fits(value, float):
        radians = round(math.radians(value), 4)
        if fits(radians, annotation):
            return f"If that is degrees, write {name} = {radians}."
    return "" if default is MISSING else f"Leave it out for the default, {to_value(default)}."
