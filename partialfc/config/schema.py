"""Settings as typed, frozen sections: what a schema is made of, its help, and TOML out.

This is the machinery; the settings themselves are in :mod:`partialfc.config`, and
:mod:`partialfc.config.file` reads them. A schema is a tree of :class:`Section` classes. A field
that is a union of sections, told apart by a tag such as ``name``, is a choice of variants; the
first is the default, and a setting of another variant is refused.
"""

import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer
from pydantic.fields import FieldInfo

from partialfc.definitions.phrases import options_of, rule, to_key, to_value, unit_of
from partialfc.definitions.urls import shown, url_of


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


def absolute(value: object) -> Path:
    """Return a path as a user writes it, absolute; ValueError for what is none."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("not a path")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise ValueError(str(error)) from error


UserPath = Annotated[Path, BeforeValidator(absolute)]
"""A path as a user writes it, made absolute: relative to the current directory, ``~`` expanded."""


def _source(value: object) -> Path:
    is_url = isinstance(value, str | Path) and url_of(Path(value)) is not None
    return Path(str(value)) if is_url else absolute(value)


SourcePath = Annotated[
    Path, BeforeValidator(_source), PlainSerializer(shown, return_type=str, when_used="json")
]
"""A path as ``UserPath``, or a URL, which stays as it is."""

OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)
"""A list that may be written as its only entry: ``Annotated[tuple[UserPath, ...], OneOrMore]``."""


def nearest_multiples(number: int, of: int) -> str:
    """Return the multiples below and above a number in words, for a remedy."""
    below = number // of * of
    return " or ".join(str(multiple) for multiple in (below, below + of) if multiple)


# The schema


def variants(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that a field can be, by tag; one without a tag has "". Empty for a setting."""
    sections = [
        kind
        for kind in options_of(field.annotation)
        if isinstance(kind, type) and issubclass(kind, Section)
    ]
    tag = tag_name(field)
    return {section.model_fields[tag].default if tag else "": section for section in sections}


def table_of(field: FieldInfo) -> type[Section] | None:
    """The section of each table of a field that is a list of them; ``None`` for any other."""
    one, *_ = typing.get_args(field.annotation) or (None,)
    is_table = isinstance(one, type) and issubclass(one, Section)
    return one if is_table and typing.get_origin(field.annotation) is tuple else None


def tag_name(field: FieldInfo) -> str:
    """The setting that tells the variants of a field apart, or "" if it has one form only."""
    assert field.discriminator is None or isinstance(field.discriminator, str)
    return field.discriminator or ""


def settings_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted keys and fields of all settings below a section, of every variant."""
    for name, field in section.model_fields.items():
        table = table_of(field)
        if not variants(field) and table is None:
            yield prefix + name, field
        for variant in (*variants(field).values(), *([table] if table else [])):
            yield from settings_of(variant, f"{prefix}{name}.")


# The schema in words


def takes(field: FieldInfo) -> str:
    """What a setting takes, e.g. ``integer >= 1, in images``."""
    if OneOrMore in field.metadata:
        one, *_ = typing.get_args(field.annotation)
        return f"{rule(one)} or {rule(_type(field))}"
    return rule(_type(field))


def unit(field: FieldInfo) -> str | None:
    """The name of a number's unit, if it has one."""
    return unit_of(_type(field))


def _type(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a setting can be; empty if it is no choice of words."""
    is_literal = typing.get_origin(field.annotation) is Literal
    return typing.get_args(field.annotation) if is_literal else ()


def first_sentence(field: FieldInfo) -> str:
    """The beginning of a setting's help."""
    return _flat(field.description).partition(". ")[0].rstrip(".") + "."


# Help


_INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": " " * 6}


def help_text(schema: type[Section], width: int) -> str:
    """Return every setting with its default, type, range, unit and meaning, ``width`` wide."""
    return "\n\n".join(_help(schema, "", width))


def _help(section: type[Section], prefix: str, width: int) -> Iterator[str]:
    """Paragraphs on the sections inside a section."""
    for name, field in section.model_fields.items():
        if table := table_of(field):
            of_one = [
                _entry(f"{name}.{key}", one, width) for key, one in table.model_fields.items()
            ]
            yield "\n".join([f"[[{name}]]", textwrap.fill(_flat(table.__doc__), width), *of_one])
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
            above = textwrap.fill(f"and, as above: {', '.join(repeated)}", width, **_INDENTED)
            also = [above] if repeated else []
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
    head = textwrap.fill(
        f"{setting:<44}  {takes(field)}",
        width,
        initial_indent="  ",
        subsequent_indent=" " * 48,
        break_long_words=False,
        drop_whitespace=True,
    )
    return f"{head}\n{meaning}"


def _flat(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())


# TOML


def to_toml(section: Section, *, without: str = "") -> str:
    """Return TOML that loads back equal; settings that are None are left out, and one section that
    has no effect."""
    values = section.model_dump(mode="json", exclude_none=True, exclude={without})
    return "\n".join(_tables(values, ()))


def _tables(
    values: Mapping[str, Any], keys: tuple[str, ...], header: str = "[{}]"
) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not _has_header(value)}
    if plain or header == _ONE_OF_SEVERAL:
        lines = [f"{to_key(key)} = {to_value(value)}" for key, value in plain.items()]
        yield "\n".join([header.format(".".join(keys)), *lines, ""] if keys else [*lines, ""])
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _tables(value, (*keys, key))
        elif _has_header(value):
            for one in value:
                yield from _tables(one, (*keys, key), _ONE_OF_SEVERAL)


_ONE_OF_SEVERAL = "[[{}]]"


def _has_header(value: Any) -> bool:
    """Whether it is a table, or a list of them."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    )
