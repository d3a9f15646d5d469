"""Settings for what they name besides ours: a schema with sections for plug-ins and for options.

What a backbone takes besides is known when its name is: its section ``options`` is made then, and
so are those of a plug-in's margin, losses and row rule. All that reads a schema, the check of a
file, its messages and the resolved settings, knows them as it knows ours.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

from pydantic import Field, create_model

from partialfc.config import margins
from partialfc.config.defined import section_of
from partialfc.config.heads import NamedHead, name_problem
from partialfc.config.losses import OwnLoss
from partialfc.config.optimizers import OfCenters
from partialfc.config.schema import OneOrMore, Section, UserPath, choices, tag_name, variants
from partialfc.config.sets import Set
from partialfc.definitions import Definition, backbones, plugins
from partialfc.definitions.phrases import options_of, to_value
from partialfc.definitions.plugins import at
from partialfc.definitions.signatures import REQUIRED, parameters_of, taken
from partialfc.errors import ConfigError
from partialfc.records.metrics import NAMES

S = TypeVar("S", bound=Section)
Named = tuple[str, Any]
"""What settings call something, and what it is."""
OfHead = tuple[Named | None, Named | None]
"""The margin and the row rule of a head, where they are plug-ins'."""

_COMMON = ("embedding_dim", "image_size", "checkpoint_activations")
"""Keywords of every backbone; the settings have them elsewhere."""


def wider(schema: type[S], settings: Mapping[str, Any]) -> type[S]:
    """Return a schema of a run that also has what these settings name besides ours.

    Args:
        schema: Of a run.
        settings: As a file has them; what is of a wrong type is left to who checks it.

    Raises:
        ConfigError: If what a plug-in has by a name is not what it should be.
    """
    head = _section(schema, "head")
    return _wider(
        schema,
        _backbone(_section(schema, "backbone"), settings),
        _of_head(head, settings, "head"),
        tuple(_heads(head, settings)),
        tuple(_losses(_section(schema, "losses"), settings)),
        tuple(_sets(settings)),
        bool(at(settings, "data", "train")),
    )


@cache
def _wider(
    schema: type[S],
    backbone: Named | None,
    head: OfHead,
    heads: tuple[tuple[str, OfHead], ...],
    losses: tuple[tuple[str, Named], ...],
    sets: tuple[str, ...],
    trains: bool,
) -> type[S]:
    """Equal settings have one schema, and so are equal."""
    changed: dict[str, Any] = {}
    if backbone is not None:
        section = _section(schema, "backbone")
        name = section.model_fields["name"]
        options = _options(_section(section, "options"), *backbone)
        words = tuple(dict.fromkeys((*choices(name), backbone[0])))
        changed["backbone"] = _derived(
            section,
            name=(Literal[words], Field(default=name.default, description=name.description)),
            options=(options, Field(default_factory=options)),
        )
    if any(head):
        changed["head"] = _head(_section(schema, "head"), head)
    if heads:
        named = {name: _head(NamedHead, one) for name, one in heads}
        of_names: dict[str, Any] = {
            name: (one, Field(default_factory=one)) for name, one in named.items()
        }
        changed["heads"] = _derived(_section(schema, "heads"), **of_names)
    if losses:
        sections = {label: section_of(kind, OwnLoss, name=name) for label, (name, kind) in losses}
        fields = {label: (one, Field(default_factory=one)) for label, one in sections.items()}
        changed["losses"] = _derived(_section(schema, "losses"), **fields)
    if sets:
        changed["data"] = _with_sets(_section(schema, "data"), sets, required=trains)
    if not changed:
        return schema
    fields = {key: (one, Field(default_factory=one)) for key, one in changed.items()}
    return _derived(schema, **fields)


def _derived(section: type[S], **fields: Any) -> type[S]:
    """The section with other fields, or more of them."""
    return create_model(
        section.__name__,
        __base__=section,
        __doc__=section.__doc__,
        __cls_kwargs__={"use_attribute_docstrings": False},  # it has no source to look at
        **fields,
    )


def _section(schema: type[Section], key: str) -> type[Any]:
    """The section of a key that has no variants."""
    (section,) = variants(schema.model_fields[key]).values()
    return section


def _head(section: type[S], named: OfHead) -> type[S]:
    """The section of a head with the variants of plug-ins that it names."""
    bases = ("margin", margins.Margin), ("optimizer", OfCenters)
    fields = {
        key: _with(section, key, base, one)
        for (key, base), one in zip(bases, named, strict=True)
        if one is not None
    }
    return _derived(section, **fields) if fields else section


def _with(head: type[Section], key: str, base: type[Any], named: Named) -> Any:
    """The field of a key of the head with one variant more."""
    field, (name, kind) = head.model_fields[key], named
    more = section_of(kind, base, name=name, without=("lr",) if base is OfCenters else ())
    tagged: Any = reduce(or_, (*variants(field).values(), more))
    tagged = Annotated[tagged, Field(discriminator=tag_name(field))]
    return tagged, Field(default_factory=next(iter(variants(field).values())))


def _of_head(head: type[Section], settings: Mapping[str, Any], *section: str) -> OfHead:
    """The plug-ins that a section of a head names."""
    return (
        _variant(head, "margin", "margin", settings, *section),
        _variant(head, "optimizer", "row rule", settings, *section),
    )


def _heads(head: type[Section], settings: Mapping[str, Any]) -> Iterator[tuple[str, OfHead]]:
    """The names of several heads, in the order of the file, and the plug-ins that each names."""
    heads = at(settings, "heads")
    losses = at(settings, "losses")
    for name in heads if isinstance(heads, Mapping) else ():
        if problem := name_problem(name, losses if isinstance(losses, Mapping) else {}):
            raise ConfigError(problem)
        yield name, _of_head(head, settings, "heads", name)


def _variant(
    head: type[Section], key: str, kind: str, settings: Mapping[str, Any], *section: str
) -> Named | None:
    """The plug-in that a section of a head names, if it does."""
    name = at(settings, *section, key, "name")
    if not isinstance(name, str) or name in variants(head.model_fields[key]):
        return None
    found = _class(".".join((*section, key, "name")), kind, name)
    return None if found is None else (name, found)


def _class(key: str, kind: str, name: Any) -> type[Definition] | None:
    """What a plug-in has by a name, if it has anything."""
    found = plugins.find(kind, name) if isinstance(name, str) else None
    if found is None:
        return None
    base = _base(kind)
    if not isinstance(found, type) or not issubclass(found, base) or inspect.isabstract(found):
        lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(
            f"{key} = {to_value(name)}: must be a class that inherits from {base.__module__}."
            f"{base.__name__}{f' and has {lacks}' if lacks else ''}."
        )
    return found


def _losses(section: type[Section], settings: Mapping[str, Any]) -> Iterator[tuple[str, Named]]:
    """The losses of plug-ins and their labels, in one order whatever that of the file is."""
    losses = at(settings, "losses")
    for label in sorted(losses if isinstance(losses, Mapping) else ()):
        if label in section.model_fields or not isinstance(losses[label], Mapping):
            continue
        name = losses[label].get("name", label)
        found = _class(f"losses.{label}.name", "loss", name)
        if found is None:
            continue
        if f"loss_{label}" in NAMES or not label.isidentifier() or hasattr(Section, label):
            raise ConfigError(
                f"[losses.{label}]: it must be a word of letters, digits and _ that nothing else "
                "is called. Choose another."
            )
        yield label, (name, found)


def _sets(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names of the sets of images, in the order of the file, which is that of identities."""
    sets = at(settings, "data", "sets")
    for name in sets if isinstance(sets, Mapping) else ():
        if not name.isidentifier() or name.startswith("_") or hasattr(Section, name):
            raise ConfigError(
                f"[data.sets.{name}]: it must be a word of letters, digits and _. Choose another."
            )
        yield name


def _with_sets(data: type[Section], names: tuple[str, ...], *, required: bool) -> type[Section]:
    """The section of images with these sets, which stand for ``train``."""
    base = _section(data, "sets")
    fields: dict[str, Any] = {"sets": (_derived(base, **dict.fromkeys(names, (Set, ...))), ...)}
    if not required:
        train = data.model_fields["train"]
        kind: Any = Annotated[tuple[UserPath, ...], OneOrMore]
        fields["train"] = (kind, Field((), strict=False, description=train.description))
    return _derived(data, **fields)


def _base(kind: str) -> type[Definition]:
    """What a class of a kind inherits from. It needs torch, as a plug-in does."""
    if kind == "margin":
        from partialfc.margins.base import Margin

        return Margin
    if kind == "loss":
        from partialfc.losses.base import EmbeddingLoss

        return EmbeddingLoss
    from partialfc.head.rows.rules import RowRule

    return RowRule


def _backbone(section: type[Section], settings: Mapping[str, Any]) -> Named | None:
    """A backbone that is a plug-in's or that takes options."""
    name = at(settings, "backbone", "name") or section.model_fields["name"].default
    if not isinstance(name, str):
        return None
    if (ours := backbones.options_of(name)) is not None:
        return (name, ours) if ours.takes else None
    found = plugins.find("backbone", name)
    if found is None:
        return None
    if not callable(found) or "embedding_dim" not in parameters_of(found):
        raise ConfigError(
            f"backbone.name = {to_value(name)}: must be a class or a function that takes the "
            "keyword embedding_dim and returns a module."
        )
    return name, found


def _options(base: type[Any], name: str, kind: Callable[..., object]) -> type[Section]:
    """The section of what a backbone takes besides."""
    if isinstance(kind, type) and issubclass(kind, Definition):
        return section_of(kind, base)
    try:
        found = taken(kind, without=_COMMON)
    except ValueError as error:
        raise ConfigError(f"backbone.name = {to_value(name)}: {error}") from error
    fields: dict[str, Any] = {
        key: (
            _as_setting(annotation),
            Field(
                default=... if default is REQUIRED else default,
                description=f"Keyword of {name}.",
                strict=False if _has_lists(annotation) else None,
            ),
        )
        for key, (annotation, default) in found.items()
    }
    return _derived(base, **fields)


def _as_setting(annotation: Any) -> Any:
    """A type as a file has it: a path is text there."""
    kinds = [UserPath if one is Path else one for one in options_of(annotation)]
    return reduce(or_, kinds)


def _has_lists(annotation: Any) -> bool:
    return any(get_origin(one) is tuple for one in options_of(annotation))
