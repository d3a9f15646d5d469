"""Sections made of definitions, so that a setting stands once: in :mod:`partialfc.definitions`."""

import ast
import inspect
import sys
import typing
from collections.abc import Collection
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, create_model, model_validator

from partialfc.config.schema import Section
from partialfc.definitions import Definition

D = TypeVar("D", bound=Definition)
S = TypeVar("S", bound="Defined")


class Defined(Section):
    """A section of a definition; :func:`section_of` makes it."""

    definition: ClassVar[type[Definition]]

    if TYPE_CHECKING:  # the settings of the definition

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        self.made(self.definition)
        return self

    def made(self, kind: type[D]) -> D:
        """Return the definition, or what computes it, with these values."""
        fields = type(self).model_fields
        return kind(
            **{name: getattr(self, name) for name in self.definition.takes if name in fields}
        )


def section_of(
    definition: type[Definition],
    base: type[S],
    *,
    name: str | None = None,
    about: str | None = None,
    without: Collection[str] = (),
) -> type[S]:
    """Return the section of a definition: its fields behind those of a base.

    Args:
        definition: What the section is made of.
        base: What it has besides.
        name: The word that chooses this section, where ``base`` has a ``name``.
        about: Its help; left out, that of the definition.
        without: Fields that are no settings.
    """
    meanings = _meanings(definition)
    fields: dict[str, Any] = {
        key: (
            annotation,
            Field(
                default=getattr(definition, key, ...),
                description=meanings.get(key) or f"Of {definition.__name__}.",
                strict=False if typing.get_origin(annotation) is tuple else None,  # TOML has lists
            ),
        )
        for key, annotation in definition.takes.items()
        if key not in without
    }
    if name:
        meaning = base.model_fields["name"].description
        fields["name"] = (Literal[name], Field(default=name, description=meaning))
    section = create_model(
        definition.__name__,
        __base__=base,
        __doc__=about or definition.__doc__,
        __cls_kwargs__={"use_attribute_docstrings": False},  # it has no source to look at
        **fields,
    )
    section.definition = definition
    return section


def _meanings(definition: type[Definition]) -> dict[str, str]:
    """The docstrings under the fields of a definition and of those that it inherits from."""
    found = {}
    for kind in filter(is_dataclass, reversed(definition.__mro__)):
        classes = _classes_of(kind.__module__)
        body = classes[kind.__name__].body if kind.__name__ in classes else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


@cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # a plug-in without source
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
