"""What a constructor takes, by its signature: settings of what has no definition.

A parameter is a setting if its type can be written in TOML: true or false, a number, text, a path,
a choice of words, a list or a pair of these, each with ``Annotated[int, Range(ge=1)]`` for its
range, or one of them or ``None``. One without a type has that of its default.
"""

import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from partialfc.definitions import fits
from partialfc.definitions.phrases import rule, to_value, with_article

REQUIRED = inspect.Parameter.empty
"""The default of a setting that must be given."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def taken(
    constructor: Callable[..., object], *, without: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each parameter that can be a setting, by name.

    Args:
        constructor: A class or a function.
        without: Parameters that are left out.

    Raises:
        ValueError: If a parameter without a default cannot be one.
    """
    hints = _hints(constructor)
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in parameters_of(constructor).items():
        if name in without:
            continue
        default = parameter.default
        annotation = hints.get(name, REQUIRED if default is REQUIRED else type(default))
        if typing.get_origin(annotation) is list:
            (element,) = typing.get_args(annotation)
            annotation = tuple.__class_getitem__((element, ...))
        if default is None and annotation is not type(None):
            annotation = annotation | None
        if _can_be_set(annotation) and (default is REQUIRED or fits(default, annotation)):
            found[name] = annotation, default
        elif default is REQUIRED:
            raise ValueError(
                f"its {name} needs a type that settings have (bool, int, float, str, Path, Literal "
                "or a tuple of one), or a default."
            )
    return found


def call(
    name: str,
    constructor: Callable[..., Any],
    options: Mapping[str, Any],
    **common: Any,
) -> Any:
    """Return what a constructor makes of its own options and of what all of its kind are given.

    What is common, it is given if it takes it; ``checkpoint_activations`` and other switches that
    it does not take must be off.

    Args:
        name: Of what is made, for messages.
        constructor: A class or a function.
        options: Its own keywords.
        **common: Keywords that all of its kind may have.

    Raises:
        ValueError: If it has no such option, or a value is not of its type and range.
    """
    parameters, hints = parameters_of(constructor), _hints(constructor)
    own = [key for key in parameters if key not in common]
    takes_any = any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(constructor).parameters.values()
    )
    for key, value in options.items():
        if key not in own and not takes_any:
            raise ValueError(f"{key} = {to_value(value)}: {no_such(key, name, own)}")
        if _can_be_set(hints.get(key, REQUIRED)) and not fits(value, hints[key]):
            raise ValueError(
                f"{key} = {to_value(value)}: must be {with_article(rule(hints[key]))}, for {name}."
            )
    for key, value in common.items():
        if value is True and key not in parameters and not takes_any:
            raise ValueError(f"{key} = true: {name} has no such switch. Remove it.")
    given = {key: value for key, value in common.items() if key in parameters or takes_any}
    return constructor(**given, **options)


def no_such(key: str, name: str, own: Collection[str]) -> str:
    """Return that there is no such option, which was meant, and which there are."""
    near = difflib.get_close_matches(key, own, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    takes = f"It takes {', '.join(own)}." if own else "It takes none."
    return f"{name} has no such option.{hint} {takes}"


def parameters_of(constructor: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return what can be given by name; nothing of a function that does not say what it takes."""
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}
    return {name: one for name, one in parameters.items() if one.kind in _BY_NAME}


def _hints(constructor: Any) -> dict[str, Any]:
    function = getattr(constructor, "func", constructor)  # of a functools.partial
    if isinstance(function, type):
        function = function.__init__  # type: ignore[misc]
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # of names for type checkers alone
        return {}


def _can_be_set(annotation: Any) -> bool:
    try:
        return bool(rule(annotation))
    except (KeyError, ValueError, IndexError, TypeError):
        return False
