"""Settings as typed, frozen sections: what a schema is made of, its help, and TOML out.

This is the machinery; the settings themselves are in :mod:`partialfc.config`, and
:mod:`partialfc.config.file` reads them. A schema is a tree of :class:`Section` classes. A field
that is a union of sections, told apart by a tag such as ``name``, is a choice of variants; the
first is the default, and a setting of another variant is refused.
"""

import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Unit:
    """Unit of a number, for help and messages: ``Annotated[int, Unit("images")]``."""

    name: str


class Section(BaseModel):
    """A section of settings. The docstring under a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def _absolute(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("not a path")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise ValueError(str(error)) from error


UserPath = Annotated[Path, BeforeValidator(_absolute)]
"""A path as a user writes it, made absolute: relative to the current directory, ``~`` expanded."""

OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)
"""A list that may be written as its only entry: ``Annotated[tuple[UserPath, ...], OneOrMore]``."""


# The schema


def variants(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that a field can be, by tag; one without a tag has "". Empty for a setting."""
    sections = [
        kind
        for kind in _options(field.annotation)
        if isinstance(kind, type) and issubclass(kind, Section)
    ]
    tag = tag_name(field)
    return {section.model_fields[tag].default if tag else "": section for section in sections}


def tag_name(field: FieldInfo) -> str:
    """The setting that tells the variants of a field apart, or "" if it has one form only."""
    assert field.discriminator is None or isinstance(field.discriminator, str)
    return field.discriminator or ""


def settings_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys and fields of all settings below a section, of every variant."""
    for name, field in section.model_fields.items():
        if not variants(field):
            yield prefix + name, field
        for variant in variants(field).values():
            yield from settings_of(variant, f"{prefix}{name}.")


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


# The schema in words


def rule(field: FieldInfo) -> str:
    """What a setting takes, e.g. ``integer >= 1, in images``."""
    in_unit = f", in {unit(field)}" if unit(field) else ""
    kind = _kind(field.annotation, field.metadata, plural=False)
    if OneOrMore in field.metadata:
        kind = f"{_kind(typing.get_args(field.annotation)[0], (), plural=False)} or {kind}"
    return kind + in_unit


def unit(field: FieldInfo) -> str | None:
    """The name of a number's unit, if it has one."""
    return next((entry.name for entry in field.metadata if isinstance(entry, Unit)), None)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a setting can be; empty if it is no choice of words."""
    is_literal = typing.get_origin(field.annotation) is Literal
    return typing.get_args(field.annotation) if is_literal else ()


def first_sentence(field: FieldInfo) -> str:
    """The beginning of a setting's help."""
    return _flat(field.description).partition(". ")[0].rstrip(".") + "."


def either(words: Sequence[str]) -> str:
    """Return ``"a", "b" or "c"``."""
    quoted = [to_value(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)


_NOUNS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
    Path: ("path", "paths"),
}


def _kind(annotation: Any, metadata: Iterable[Any], plural: bool) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [m.metadata if isinstance(m, FieldInfo) else [m] for m in arguments[1:]]
        return _kind(arguments[0], [*metadata, *(entry for m in inner for entry in m)], plural)
    if origin is Literal:
        return either(arguments)
    if origin is tuple:
        collection = "list of" if arguments[-1] is Ellipsis else "pair of"
        return f"{collection} {_kind(arguments[0], (), plural=True)}"
    (single,) = (option for option in _options(annotation) if option is not types.NoneType)
    if single is not annotation:
        return _kind(single, metadata, plural)
    return _NOUNS[annotation][plural] + _range(metadata)


def _range(metadata: Iterable[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        (sign, _number(getattr(entry, name)))
        for name, sign in signs.items()
        for entry in metadata
        if hasattr(entry, name)
    ]
    if len(bounds) < 2:
        return "".join(f" {sign} {value}" for sign, value in bounds)
    (low, low_value), (high, high_value) = bounds
    opening, closing = "[" if low == ">=" else "(", "]" if high == "<=" else ")"
    return f" in {opening}{low_value}, {high_value}{closing}"


def _number(value: float) -> str:
    named = {math.pi / 2: "pi/2", 2**32: "2^32", 2**63: "2^63"}
    return named.get(value) or f"{value:g}"


# Help


def help_text(schema: type[Section], width: int) -> str:
    """Return every setting with its default, type, range, unit and meaning, ``width`` wide."""
    return "\n\n".join(_help(schema, "", width))


def _help(section: type[Section], prefix: str, width: int) -> Iterator[str]:
    """Paragraphs on the sections inside a section."""
    for name, field in section.model_fields.items():
        shown: set[str] = set()
        for tag, variant in variants(field).items():
            key = prefix + name
            default = " (default)" if not shown else ""
            chosen = f" with {tag_name(field)} = {to_value(tag)}{default}" if tag else ""
            entries = {
                setting: _entry(f"{key}.{setting}", inner, width)
                for setting, inner in variant.model_fields.items()
                if not variants(inner) and setting != tag_name(field)
            }
            repeated = [setting for setting, entry in entries.items() if entry in shown]
            new = [entry for entry in entries.values() if entry not in shown]
            also = [f"  and, as above: {', '.join(repeated)}"] if repeated else []
            meaning = textwrap.fill(_flat(variant.__doc__), width)
            yield "\n".join([f"[{key}]{chosen}", meaning, *new, *also])
            yield from _help(variant, f"{key}.", width)
            shown |= {"", *new}


def _entry(key: str, field: FieldInfo, width: int) -> str:
    if field.is_required():
        setting = f"{key} (required)"
    else:
        setting = f"{key} = {to_value(field.default)}" if field.default is not None else key
    meaning = textwrap.fill(
        _flat(field.description), width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return f"  {setting:<44}  {rule(field)}\n{meaning}"


def _flat(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())


# TOML


def to_toml(section: Section) -> str:
    """Return TOML that loads back equal; settings that are None are left out."""
    return "\n".join(_tables(section.model_dump(mode="json", exclude_none=True), ()))


def _tables(values: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if plain:
        lines = [f"{key} = {to_value(value)}" for key, value in plain.items()]
        yield "\n".join([f"[{'.'.join(keys)}]", *lines, ""] if keys else [*lines, ""])
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _tables(value, (*keys, key))


def to_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {to_value(entry)}" for key, entry in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    return str(value)  # numbers and dates
