"""Values and what a setting takes in words, for help and for messages."""

import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

_NOUNS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
    Path: ("path", "paths"),
}


def rule(annotation: Any) -> str:
    """Return what a setting of a type takes, e.g. ``integer >= 1, in images``."""
    unit = unit_of(annotation)
    return kind(annotation) + (f", in {unit}" if unit else "")


def unit_of(annotation: Any) -> str | None:
    """Return the unit of a number's type, if it has one."""
    metadata = getattr(annotation, "__metadata__", ())
    return next((entry.unit for entry in metadata if hasattr(entry, "unit")), None)


def kind(annotation: Any, metadata: Iterable[object] = (), *, plural: bool = False) -> str:
    """Return a type and its range in words, without its unit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0], [*metadata, *arguments[1:]], plural=plural)
    if origin is Literal:
        return either(arguments)
    if origin is dict:
        return f"table of {kind(arguments[1], plural=True)} by name"
    if origin is tuple:
        collection = "list of" if arguments[-1] is Ellipsis else "pair of"
        return f"{collection} {kind(arguments[0], plural=True)}"
    (single,) = (option for option in options_of(annotation) if option is not types.NoneType)
    if single is not annotation:
        return kind(single, metadata, plural=plural)
    if hasattr(annotation, "model_fields"):  # a section
        return "tables" if plural else "table"
    return _NOUNS[annotation][plural] + _range(metadata)


def options_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union; a type that is none by itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _range(metadata: Iterable[object]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        (sign, _number(value))
        for name, sign in signs.items()
        for entry in metadata
        if (value := getattr(entry, name, None)) is not None
    ]
    if len(bounds) < 2:
        return "".join(f" {sign} {value}" for sign, value in bounds)
    (low, low_value), (high, high_value) = bounds
    opening, closing = "[" if low == ">=" else "(", "]" if high == "<=" else ")"
    return f" in {opening}{low_value}, {high_value}{closing}"


def _number(value: float) -> str:
    named = {math.pi / 2: "pi/2", 2**32: "2^32", 2**63: "2^63"}
    return named.get(value) or f"{value:g}"


def either(words: Sequence[str]) -> str:
    """Return ``"a", "b" or "c"``."""
    quoted = [to_value(word) for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)


def with_article(words: str) -> str:
    """Return ``an integer`` for ``integer``; a choice of words needs no article."""
    if words[0] == '"' or words.startswith("true"):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def to_key(name: str) -> str:
    """Return a key as TOML writes it: one with a point in it, as modules have, in quotes."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else to_value(name)


def to_value(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{to_key(key)} = {to_value(entry)}" for key, entry in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    return str(value)  # numbers and dates
