"""A TOML file and command-line overrides -> settings, or one message that lists every problem.

Pydantic finds the problems; the words are ours. Each line says key, value, rule and remedy.
"""

import contextlib
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from partialfc.config.schema import (
    Section,
    choices,
    first_sentence,
    settings_of,
    table_of,
    tag_name,
    takes,
    unit,
    variants,
)
from partialfc.definitions.phrases import either, to_value, with_article
from partialfc.errors import ConfigError
from partialfc.writing import read_text

S = TypeVar("S", bound=Section)


def load_settings(
    schema: type[S],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    wider: Callable[[type[S], Mapping[str, Any]], type[S]] | None = None,
    amend: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> S:
    """Return the settings of a TOML file with command-line overrides on top.

    Args:
        schema: The section that holds all others.
        path: TOML file.
        overrides: ``key.sub=value`` each; the last one of a key counts. The value is TOML, or a
            bare word, which is a string. No value (``key=``) leaves out what the file sets, and
            ``section={...}`` replaces a whole section.
        wider: Returns the schema for what the settings name besides.
        amend: Returns what of the file is taken.

    Raises:
        ConfigError: If the file cannot be read, or with every problem in it, one a line.
    """
    settings = amend(_read(Path(path)))
    problems = []
    for override in overrides:
        try:
            settings = with_override(settings, override)
        except ValueError as error:
            problems.append(f"{override} (command line): {error}")
    try:
        schema = wider(schema, settings) if wider else schema
    except ConfigError as error:
        raise ConfigError(_message(path, [*problems, str(error)])) from error
    overridden = [override.partition("=")[0].strip() for override in overrides]
    result, wrong = checked(schema, settings, overridden)
    if result is None or problems:
        raise ConfigError(_message(path, [*problems, *wrong]))
    return result


def checked(
    schema: type[S], settings: Mapping[str, Any], overridden: Sequence[str] = ()
) -> tuple[S | None, list[str]]:
    """Return settings as a section, or ``None`` and every problem in them, a line each.

    Args:
        schema: The section that holds all others.
        settings: As a file has them.
        overridden: Keys that the command line has set.
    """
    settings = _complete(schema, settings)
    try:
        return schema.model_validate(settings), []
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            place = _locate(schema, settings, details["loc"])
            problems += _problem(schema, place, details, overridden).splitlines()
        return None, problems


def _message(path: str | Path, problems: Sequence[str]) -> str:
    problems = list(dict.fromkeys(problems))  # a list with two wrong elements is one problem
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return "\n".join([f"{path}: {len(problems)} problems", *(f"  {line}" for line in problems)])


def _read(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = read_text(path)
        return _toml(text)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
        raise ConfigError(f"{path}: no such settings file. {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8. Settings are a text file in TOML."
        ) from None
    except ValueError as error:
        place = re.search(r"line (\d+)", str(error))
        lines = text.splitlines()[int(place[1]) - 1 :] if place else []
        shown = f": {_short(lines[0].strip())}" if lines else ""
        is_repeated = str(error).startswith("Cannot ")  # overwrite, declare twice, mutate
        hint = _ONCE if is_repeated else _HOW_TO_WRITE
        raise ConfigError(f"{path}: not valid TOML: {error}{shown}\n  {hint}") from None


def _toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: If it is none, or lies deeper than any setting does.
    """
    try:
        settings = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level: list[Any] = [settings]
    for _ in range(_DEEPEST):
        inside = [
            part for one in level for part in (one.values() if isinstance(one, dict) else one)
        ]
        level = [part for part in inside if isinstance(part, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)
    return settings


_DEEPEST = 16
_TOO_DEEP = f"it has sections or lists in more than {_DEEPEST} others, and no setting has"
_ONCE = "A section, and a setting within it, may be given only once."
_HOW_TO_WRITE = (
    'A setting is written key = value: text in quotes ("iresnet50"), a number with digits on both '
    "sides of its point (0.1), true and false in lower case."
)


def with_override(settings: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return nested settings with one ``key.sub=value`` on top, as in :func:`load_settings`.

    Raises:
        ValueError: If it is not written so.
    """
    key, equals, text = override.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys) or not key.isprintable():
        raise ValueError("an override is written key=value, e.g. run.seed=1.")
    if any("\ud800" <= letter <= "\udfff" for letter in override):
        raise ValueError("an override is UTF-8 text, and a byte of this one is not.")
    return _with(settings, keys, text.strip())


def _with(settings: Mapping[str, Any], keys: Sequence[str], text: str) -> dict[str, Any]:
    """The settings with one key set to the value of a text, or left out if the text is empty."""
    first, *rest = keys
    if rest:
        inner = settings.get(first, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{first} = {_shown(inner)} is a setting, not a section.")
        return {**settings, first: _with(inner, rest, text)}
    if text:
        return {**settings, first: _value(text)}
    if first not in settings:
        raise ValueError("the file does not set this, so there is nothing to leave out.")
    return {name: value for name, value in settings.items() if name != first}


def _value(text: str) -> Any:
    try:
        parsed = _toml(f"value = {text}")
    except ValueError as error:
        if not text.startswith(("[", "{", '"', "'")):
            return text
        raise ValueError(
            f"the value is not valid TOML: {error}. Text inside a list needs quotes, and the "
            """whole needs quotes for the shell: 'key=["a", "b"]'."""
        ) from None
    return parsed["value"] if len(parsed) == 1 else text


def _complete(section: type[Section], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the sections and tags that were left out, so that errors go deep enough."""
    completed = dict(settings)
    for name, field in section.model_fields.items():
        options = variants(field)
        inner = settings.get(name, {})
        if options and isinstance(inner, dict):
            tag = tag_name(field)
            inner = {tag: next(iter(options)), **inner} if tag else inner
            variant = options.get(str(inner[tag]) if tag else "")
            completed[name] = _complete(variant, inner) if variant else inner
    return completed


@dataclass(frozen=True, slots=True)
class _Place:
    """What one of pydantic's errors is about.

    Attributes:
        keys: Where in the file.
        value: What the file has there.
        field: The field of that name, if the section has one.
        section: The section that the key is in.
        siblings: The field that ``section`` is a variant of, if it is one.
    """

    keys: tuple[str, ...]
    value: Any
    field: FieldInfo | None
    section: type[Section]
    siblings: FieldInfo | None

    @property
    def key(self) -> str:
        return ".".join(self.keys)

    @property
    def name(self) -> str:
        return self.keys[-1]

    @property
    def parent(self) -> str:
        return ".".join(self.keys[:-1])


def _locate(schema: type[Section], settings: Any, location: tuple[int | str, ...]) -> _Place:
    inner: type[Section] | None = schema
    field = siblings = None
    section, keys, value, parts = schema, [], settings, list(location)
    while parts and inner:  # what follows a setting is a place inside its value
        section, siblings = inner, field
        keys.append(str(parts.pop(0)))
        field = section.model_fields.get(keys[-1])
        value = value[keys[-1]] if isinstance(value, dict) and keys[-1] in value else None
        options = variants(field) if field else {}
        tag = str(parts.pop(0)) if field and tag_name(field) and parts else ""
        inner = options.get(tag)
    return _Place(tuple(keys), value, field, section, siblings)


def _problem(schema: type[Section], place: _Place, details: Any, overridden: Sequence[str]) -> str:
    """One line; pydantic's own texts are not used."""
    key, field, value = place.key, place.field, place.value
    options = variants(field) if field else {}
    if details["type"] == "value_error" and (options or not field):  # a check of a whole section
        return f"{key}.{details['ctx']['error']}".lstrip(".")
    if details["type"] == "value_error" and field and table_of(field):  # they name it themselves
        return str(details["ctx"]["error"])
    if not field:
        problem = _unknown(schema, place)
    elif value is None:
        return (
            f"{key}: required, and not set. It takes {with_article(takes(field))}. "
            f"{first_sentence(field)} Add {place.name} = ... below [{place.parent}], or {key}=... "
            "on the command line."
        )
    elif isinstance(value, dict) and options:
        tag, tags = tag_name(field), list(options)
        key, value = f"{key}.{tag}", value[tag]
        near = _near(str(value), tags)
        hint = f" Did you mean {to_value(near[0])}?" if near else ""
        problem = f"must be {either(tags)}.{hint}"
    elif options:
        problem = f"must be a section. Write its settings below a line [{key}]."
    else:
        problem = f"must be {with_article(takes(field))}. {_remedy(place, field)}"
    is_overridden = any(
        f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in overridden
    )
    return f"{key} = {_shown(value)}{' (command line)' if is_overridden else ''}: {problem}"


def _unknown(schema: type[Section], place: _Place) -> str:
    fields = place.section.model_fields
    options = variants(place.siblings) if place.siblings else {}
    owners = [tag for tag, variant in options.items() if place.name in variant.model_fields]
    here = f"[{place.parent}]" if place.parent else "The file"
    if owners and place.siblings:
        tag = tag_name(place.siblings)
        own = to_value(fields[tag].default)
        here = f"{here} with {tag} = {own}"
        other = f"= {either(owners)}" if len(owners) == 1 else "to one of them"
        problem = (
            f"belongs to {tag} = {either(owners)}, but {tag} is {own}. Remove it, or set "
            f"{place.parent}.{tag} {other}."
        )
    else:
        near = difflib.get_close_matches(place.name, fields, cutoff=0.7)
        meant = [key for key, _ in settings_of(schema) if key.split(".")[-1] == place.name]
        meant += [f"{place.parent}.{other}".lstrip(".") for other in near]
        hint = f" Did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else ""
        problem = f"unknown {'section' if isinstance(place.value, dict) else 'setting'}.{hint}"
    takes = [
        f"[{place.parent}.{name}]".replace("[.", "[")
        if variants(field)
        else f"[[{name}]]" * bool(table_of(field)) or name
        for name, field in fields.items()
    ]
    return f"{problem} {here} takes {', '.join(takes) or 'nothing'}."


def _remedy(place: _Place, field: FieldInfo) -> str:
    for meant in _rewritings(place.value, field):
        if _accepts(place.section, place.name, meant):
            return f"Write {place.name} = {to_value(meant)}."
    if unit(field) == "radians" and isinstance(place.value, int | float):
        radians = round(math.radians(place.value), 4)
        if _accepts(place.section, place.name, radians):
            return f"If that is degrees, write {place.name} = {radians}."
    if field.is_required():
        return first_sentence(field)
    if field.default is None:
        return "Leave it out if you do not need it."
    return f"Leave it out for the default, {to_value(field.default)}."


def _rewritings(value: Any, field: FieldInfo) -> Iterator[Any]:
    """What a value of the wrong type may have been meant to be."""
    if isinstance(value, str):
        word = value.strip().lower()
        yield {"yes": True, "on": True, "true": True, "1": True}.get(word)
        yield {"no": False, "off": False, "false": False, "0": False}.get(word)
        yield {"gpu": "cuda"}.get(word)  # as a word it is nearer to cpu
        yield from _near(word, choices(field))
        parsed = _parsed(word)
        yield parsed
        with contextlib.suppress(ValueError):
            yield float(word)  # .5 and 5. are not TOML
        if not isinstance(parsed, str):
            yield from _rewritings(parsed, field)
    elif isinstance(value, list):
        yield from value[:1] if len(value) == 1 else ()
    elif not isinstance(value, dict | bool):
        yield bool(value) if value in (0, 1) else None
        yield int(value) if isinstance(value, float) and value.is_integer() else None
        yield str(value)
    yield [value]


def _near(word: str, names: Iterable[str]) -> list[str]:
    """The name that a word was meant to be, if any: r50 is iresnet50."""
    names, word = list(names), word.strip().lower()
    held = [name for name in names if _holds(name, word)]
    return held if len(held) == 1 else difflib.get_close_matches(word, names, n=1)


def _holds(name: str, word: str) -> bool:
    """Whether all letters of the word are in the name, in their order."""
    letters = iter(name)
    return bool(word) and all(letter in letters for letter in word)


def _parsed(text: str) -> Any:
    try:
        return _value(text)
    except ValueError:
        return text


def _accepts(section: type[Section], name: str, value: Any) -> bool:
    if value is None:
        return False
    try:
        section.model_validate({name: value})
    except ValidationError as error:
        return all(details["loc"][:1] != (name,) for details in error.errors())
    return True


def _shown(value: Any) -> str:
    return _short(to_value(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
