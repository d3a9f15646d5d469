"""Code of a user's own, by the names that settings have for it.

A plug-in is a module. Settings name it in ``run.plugins``, and then have the names of its
dictionaries ``BACKBONES``, ``MARGINS``, ``LOSSES``, ``ROW_RULES`` and ``SINKS``; or they name what
is in it, as "my.module:Name" where they would have a name of ours.

To import a module is to run it. :func:`load` alone does so, and is called with the modules that a
user names: in the settings that they start from, or with ``--plugin``. What a checkpoint's own
settings name is never imported for their sake; :func:`refuse_strangers` says what to do.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from partialfc.definitions.backbones import NAMES, TIMM
from partialfc.definitions.losses import LOSSES
from partialfc.definitions.margins import MARGINS
from partialfc.errors import ConfigError, in_words

REGISTRIES = {
    "backbone": "BACKBONES",
    "margin": "MARGINS",
    "loss": "LOSSES",
    "row rule": "ROW_RULES",
    "sink": "SINKS",
}
"""What a plug-in may have, and the dictionary in which it says so by name."""

_OURS = {
    "backbone": {*NAMES},
    "margin": {*MARGINS},
    "loss": {*LOSSES, "center", "inter_class", "teacher"},
    "row rule": {"sgd", "adamw", "adagrad"},
    "sink": {"wandb", "mlflow"},
}
"""Names that settings have already: what a plug-in has by one of them could not be reached."""

_loaded: dict[str, ModuleType] = {}


def place_of(name: str) -> tuple[str, str] | None:
    """Return module and attribute of "my.module:Name"; ``None`` for any other name."""
    module, colon, attribute = name.partition(":")
    return (
        (module, attribute) if colon and attribute.isidentifier() and _is_module(module) else None
    )


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def named_in(settings: Mapping[str, Any]) -> list[str]:
    """Return the modules of the plug-ins that settings name, each once.

    A sink as "my.module:Name" is not among them: rank 0 alone imports it, when it opens it.

    Args:
        settings: By section, as a file has them or as they are resolved; what is of a wrong type is
            left to who checks it.
    """
    listed = at(settings, "run", "plugins")
    found = [listed] if isinstance(listed, str) else _strings(listed)
    for name in _names(settings):
        if isinstance(name, str) and (place := place_of(name)):
            found.append(place[0])
    return list(dict.fromkeys(found))


def _names(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Whatever stands where a plug-in may."""
    yield at(settings, "backbone", "name")
    heads = at(settings, "heads")
    named = (at(heads, name) for name in (heads if isinstance(heads, Mapping) else ()))
    for head in (at(settings, "head"), *named):
        yield at(head, "margin", "name")
        yield at(head, "optimizer", "name")
    losses = at(settings, "losses")
    for label in losses if isinstance(losses, Mapping) else ():
        yield at(losses, label, "name")
    stages = at(settings, "stages")
    for stage in stages if isinstance(stages, list | tuple) else ():
        yield from _names(stage if isinstance(stage, Mapping) else {})


def at(settings: Any, *keys: str) -> Any:
    """Return what settings have at keys below each other; ``None`` if nothing, or no section."""
    for key in keys:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | tuple) else []


def load(modules: Iterable[str]) -> None:
    """Import modules whose code the user wants to run; each once in a process.

    Raises:
        ConfigError: If there is no such module, it fails when it is imported, or it has one of our
            names.
    """
    for name in modules:
        if name in _loaded:
            continue
        if not _is_module(name):
            raise ConfigError(
                f'plug-in "{name}": must be the name of a module, as an import has it: '
                '"my.module", not a path.'
            )
        try:
            _loaded[name] = importlib.import_module(name)
            _version(name)  # of what was imported, not of what is written there later
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(f"plug-in {name}: {in_words(error)}.") from error
            raise ConfigError(
                f"plug-in {name}: there is no module {error.name}. Install it, or start in the "
                "folder that it lies in with python -m partialfc or torchrun -m partialfc, or set "
                "PYTHONPATH."
            ) from None
        except Exception as error:
            raise ConfigError(
                f"plug-in {name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if refused := _with_our_names(_loaded[name]):
            del _loaded[name]
            raise ConfigError(f"plug-in {name}: {refused}")


def _with_our_names(module: ModuleType) -> str:
    """What is wrong, if it has one; a dictionary of ours that it imports is none of its own."""
    of_us = [code for name, code in sys.modules.items() if name.startswith("partialfc.")]
    for kind, registry in REGISTRIES.items():
        names = getattr(module, registry, None)
        imported = any(names is vars(code).get(registry) for code in of_us)
        for one in names if isinstance(names, Mapping) and not imported else ():
            if one in _OURS[kind] or (kind == "backbone" and str(one).startswith(TIMM)):
                return f'{registry} has "{one}", which is a {kind} of ours. Give it another name.'
    return ""


def refuse_strangers(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are not the user's own and name a plug-in that nobody has loaded.

    Raises:
        ConfigError: It says which, and how the user names it.
    """
    if strange := [name for name in named_in(settings) if name not in _loaded]:
        raise ConfigError(
            f"these settings name the plug-in{'s' * (len(strange) > 1)} {', '.join(strange)}: code "
            "that would run here. If it is yours, or you have read it, name it: "
            f"{' '.join(f'--plugin {name}' for name in strange)}, or for a new run in its "
            "run.plugins."
        )


def find(kind: str, name: str) -> Any:
    """Return what a loaded plug-in has of a kind by a name; ``None`` if none has.

    Args:
        kind: A key of :data:`REGISTRIES`.
        name: "my.module:Name", or a name in a plug-in's dictionary.

    Raises:
        ConfigError: If the module has no such attribute, or two plug-ins have the name.
    """
    if place := place_of(name):
        module, attribute = place
        if module not in _loaded:
            return None
        if not hasattr(_loaded[module], attribute):
            raise ConfigError(f'{kind} "{name}": {module} has no {attribute}.')
        return getattr(_loaded[module], attribute)
    registry = REGISTRIES[kind]
    having = {
        module: found[name]
        for module, code in _loaded.items()
        if isinstance(found := getattr(code, registry, None), Mapping) and name in found
    }
    if len(having) > 1:
        raise ConfigError(
            f'{kind} "{name}": {" and ".join(having)} both have it in {registry}. Name one as '
            '"my.module:Name".'
        )
    return next(iter(having.values()), None)


def versions(settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what tells one state of each loaded plug-in from another, by module.

    That is its ``__version__``, if it has one, and 12 hex digits of the SHA-256 of its source: of
    the module, or of all ``.py`` files of the package that it is in.

    Args:
        settings: Of those that they name alone, which all ranks have; rank 0 has sinks besides.
    """
    names = _loaded if settings is None else named_in(settings)
    return {name: _version(name) for name in names if name in _loaded}


@cache
def _version(name: str) -> str:
    module = _loaded[name]
    top = name
    while "." in top and getattr(sys.modules[top.rpartition(".")[0]], "__file__", None):
        top = top.rpartition(".")[0]
    file = getattr(sys.modules[top], "__file__", None)
    if file is None or not Path(file).is_file():  # a namespace, or a member of an archive
        source = "unknown"
    else:
        digest, folder = hashlib.sha256(), Path(file).parent
        package = Path(file).name == "__init__.py"
        for path in sorted(folder.rglob("*.py")) if package else [Path(file)]:
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
        source = digest.hexdigest()[:12]
    version = getattr(module, "__version__", None) or getattr(sys.modules[top], "__version__", None)
    return f"{version}, source {source}" if version else f"source {source}"
